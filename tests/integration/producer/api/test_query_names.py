"""A misspelt query parameter is told, never ignored."""

import httpx
import pytest
from fastapi.routing import APIRoute, iter_route_contexts

from producer.api import create_app
from producer.api.answers import PREFIX
from producer.api.query_names import names_of
from producer.jobs.settings import Settings
from tests.integration.producer.api.test_jobs import assert_problem, submit

CSV = {"Content-Type": "text/csv"}


def told(response: httpx.Response) -> dict[str, str]:
    problem = assert_problem(response, 422)
    return {fault["field"]: fault["message"] for fault in problem["errors"]}


def test_a_batch_with_misspelt_parameters_is_not_made(api: httpx.Client) -> None:
    asked = {"name": "typo", "vari": "seed=1..4", "tempalte": "x"}
    for path in ("/api/v1/batches", "/api/v1/manifests/preview"):
        found = told(api.post(path, params=asked, content="prompt\na boat\na tea\n", headers=CSV))
        assert found["vari"] == "is no parameter here; 'vary' is one"
        assert found["tempalte"] == "is no parameter here; 'template' is one"
    assert api.get("/api/v1/batches").json()["batches"] == []


@pytest.mark.parametrize(
    "query", ["promt=sale", "promt", "Prompt=sale", "prompt=sale&promt=sale", "job_id=x", "=x", "%ff"]
)
def test_a_list_is_not_answered_to_a_misspelt_question(api: httpx.Client, query: str) -> None:
    (message,) = told(api.get(f"/api/v1/jobs?{query}")).values()
    assert message.startswith("is no parameter here")


def test_what_has_no_parameters_and_what_is_a_path_s_is_refused_too(api: httpx.Client) -> None:
    job = submit(api)["id"]
    asks = (("GET", "sizes"), ("GET", f"jobs/{job}/events"), ("POST", f"jobs/{job}/cancel"), ("GET", f"jobs/{job}"))
    for method, path in asks:
        assert told(api.request(method, f"{PREFIX}/{path}", params={"job_id": "x"})) == {
            "job_id": "is no parameter here"
        }
    assert api.get(f"{PREFIX}/jobs/{job}").json()["state"] == "queued"


def test_what_takes_one_value_is_not_given_two(api: httpx.Client) -> None:
    assert told(api.get("/api/v1/jobs?state=queued&state=failed&limit=3")) == {
        "state": "is given 2 times, and takes one value"
    }
    asked = "name=a&name=b&vary=seed%3D1..2&vary=steps%3D1,2"
    found = told(api.post(f"/api/v1/batches?{asked}", content="prompt\na boat\n", headers=CSV))
    assert list(found) == ["name"]
    assert api.get("/api/v1/batches").json()["batches"] == []


def test_what_takes_several_values_may_be_given_several(api: httpx.Client) -> None:
    asked = "name=a&vary=seed%3D1..2&vary=steps%3D1,2"
    batch = api.post(f"/api/v1/batches?{asked}", content="prompt\na boat\n", headers=CSV).json()
    assert batch["jobs"] == 4
    assert api.post(f"/api/v1/batches/{batch['id']}/retry?state=failed&state=cancelled").status_code == 200


def test_of_very_many_names_the_first_are_told(api: httpx.Client) -> None:
    query = "&".join(f"x{number}" for number in range(3_000))
    assert len(told(api.get(f"/api/v1/jobs?{query}"))) == 20


def test_openais_door_takes_what_its_package_sends(api: httpx.Client) -> None:
    assert api.get("/v1/batches", params={"anything": "x"}).status_code == 200


def test_the_names_that_are_known_are_those_that_the_document_tells(settings: Settings) -> None:
    app = create_app(settings)
    document = app.openapi()["paths"]
    seen = 0
    routes = [found.original_route for found in iter_route_contexts(app.routes)]
    for route in (one for one in routes if isinstance(one, APIRoute) and one.path.startswith(f"{PREFIX}/")):
        for method in route.methods:
            described = document[route.path][method.lower()]
            assert "422" in described["responses"]
            asked = {
                one["name"]: "array" in str(one["schema"])
                for one in described.get("parameters", [])
                if one["in"] == "query"
            }
            assert names_of(route.dependant) == asked, route.path
            seen += len(asked)
    assert seen > 30
