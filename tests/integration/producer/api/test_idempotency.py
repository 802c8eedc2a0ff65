"""Asking again: the same key and submission is one submission, whatever happened to the first answer."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.integration.producer.api.test_jobs import assert_problem

JOBS, BATCHES = "/api/v1/jobs", "/api/v1/batches"
ROW = json.dumps({"prompt": "a paper boat", "width": 64, "height": 64}).encode()
JSON, NDJSON = "application/json", "application/x-ndjson"

Post = Callable[..., httpx.Response]


def poster(api: httpx.Client, path: str, media_type: str, body: bytes, **params: str) -> Post:
    """Posts this with a key; a body or parameters may be others."""

    def post(key: str, body: bytes = body, **others: str) -> httpx.Response:
        headers = {"Content-Type": media_type, "Idempotency-Key": key}
        return api.post(path, content=body, params=params | others, headers=headers)

    return post


DOCUMENT = b'{"name": "boats", "jobs": [' + ROW + b"," + ROW + b"]}"
WAYS: dict[str, tuple[str, str, bytes, dict[str, str]]] = {
    "a job": (JOBS, JSON, ROW, {}),
    "a document": (BATCHES, JSON, DOCUMENT, {}),
    "lines": (BATCHES, NDJSON, ROW + b"\n" + ROW, {"name": "boats"}),
}


@pytest.fixture(params=WAYS)
def post(api: httpx.Client, request: pytest.FixtureRequest) -> Post:
    path, media_type, body, params = WAYS[request.param]
    return poster(api, path, media_type, body, **params)


def submitted(api: httpx.Client) -> tuple[int, int]:
    """Jobs and batches that are there."""
    return len(api.get(JOBS).json()["jobs"]), len(api.get(BATCHES).json()["batches"])


def test_the_same_key_and_body_are_answered_as_at_first_and_submit_nothing(api: httpx.Client, post: Post) -> None:
    first = post("k1")
    there = submitted(api)
    again = post("k1")
    assert (again.status_code, again.headers["location"]) == (201, first.headers["location"])
    assert again.json()["id"] == first.json()["id"]
    assert submitted(api) == there
    assert post("k2").json()["id"] != first.json()["id"]


def test_the_same_key_with_another_body_is_refused_and_names_the_header(api: httpx.Client, post: Post) -> None:
    body = post("k1").request.content
    there = submitted(api)
    problem = assert_problem(post("k1", body.replace(b"boat", b"ship")), 422)
    assert problem["type"] == "urn:ovis-batch:problem:key-reused"
    assert [error["field"] for error in problem["errors"]] == ["Idempotency-Key"]
    assert submitted(api) == there


def test_without_a_key_the_same_body_is_another_submission(api: httpx.Client) -> None:
    ids = {api.post(JOBS, content=ROW, headers={"Content-Type": JSON}).json()["id"] for _ in range(2)}
    assert len(ids) == 2


def test_a_refused_submission_keeps_no_key(api: httpx.Client, post: Post) -> None:
    good = post("another").request.content
    assert_problem(post("k1", good.replace(b": 64", b": 1")), 422)
    assert post("k1").status_code == 201


def test_parameters_that_say_what_is_submitted_count_and_the_tenant_has_keys_of_its_own(api: httpx.Client) -> None:
    post = poster(api, BATCHES, NDJSON, ROW, name="boats")
    first = post("k1").json()["id"]
    assert post("k1", weight="1").json()["id"] == first
    assert_problem(post("k1", name="ships"), 422)
    assert_problem(post("k1", weight="2"), 422)
    assert post("k1", tenant="acme").json()["id"] != first


def test_a_key_is_of_one_path(api: httpx.Client) -> None:
    assert poster(api, JOBS, JSON, ROW)("k1").status_code == 201
    assert_problem(poster(api, BATCHES, NDJSON, ROW, name="boats")("k1"), 422)


def test_those_who_ask_at_the_same_time_with_one_key_get_one_batch(api: httpx.Client) -> None:
    post = poster(api, BATCHES, NDJSON, (ROW + b"\n") * 3000, name="boats")
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(post, ["k1"] * 6))
    assert [answer.status_code for answer in answers] == [201] * 6
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert len(api.get(BATCHES).json()["batches"]) == 1


def test_a_key_that_is_none_is_refused_by_the_headers_name(api: httpx.Client) -> None:
    for key in (b"", b"a" * 256, b"a b", b"a\tb", b"caf\xe9", b"\x7f"):
        headers = {b"Content-Type": JSON.encode(), b"Idempotency-Key": key}
        problem = assert_problem(api.post(JOBS, content=ROW, headers=headers), 422)
        assert [error["field"] for error in problem["errors"]] == ["Idempotency-Key"]
    assert submitted(api) == (0, 0)


def test_a_key_may_have_255_visible_characters(api: httpx.Client) -> None:
    key = ('"!~' * 85)[:255]
    post = poster(api, JOBS, JSON, ROW)
    assert post(key).json()["id"] == post(key).json()["id"]
