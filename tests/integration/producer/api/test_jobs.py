"""The paths of jobs against the real servers."""

import hashlib
from typing import Any
from uuid import uuid4

import httpx
import pytest

from producer.jobs.contract import Job, Message
from producer.jobs.storage import preview_key
from tests.farm import Farmhand
from tests.waiting import until

JOBS = "/api/v1/jobs"
PROBLEM = "application/problem+json"


def submit(api: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = api.post(JOBS, json={"prompt": "a paper boat", "width": 64, "height": 64} | fields)
    assert response.status_code == 201, response.text
    return dict(response.json())


def as_job(answer: dict[str, Any]) -> Job:
    return Job.model_validate(answer)


def assert_problem(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, f"{response.url}: {response.text}"
    assert response.headers["content-type"] == PROBLEM
    problem: dict[str, Any] = response.json()
    assert {"type", "title", "status", "detail", "instance"} <= problem.keys()
    assert problem["status"] == status
    return problem


def test_a_submitted_job_is_found_under_its_location(api: httpx.Client) -> None:
    response = api.post(JOBS, json={"prompt": "一杯茶", "name": "tea", "priority": "interactive", "format": "jpeg"})
    assert response.status_code == 201
    found = api.get(response.headers["location"]).json()
    assert found["state"] == "queued"
    assert found["request"]["prompt"] == "一杯茶"
    assert found["request"]["seed"] is not None
    assert (found["file_name"], found["image_url"], found["priority"]) == ("tea.jpg", None, "interactive")


def test_jobs_are_paged_from_the_newest_back(api: httpx.Client) -> None:
    ids = [submit(api)["id"] for _ in range(5)]
    first = api.get(JOBS, params={"limit": 3}).json()
    second = api.get(JOBS, params={"limit": 3, "cursor": first["next"]}).json()
    assert [job["id"] for job in first["jobs"] + second["jobs"]] == ids[::-1]
    assert second["next"] is None
    assert api.get(JOBS, params={"state": "failed"}).json() == {"jobs": [], "next": None}


def test_jobs_and_batches_are_found_by_what_is_asked(api: httpx.Client) -> None:
    body = {"name": "Summer", "jobs": [{"prompt": "a red banner"}, {"prompt": "a blue banner"}]}
    batch = api.post("/api/v1/batches", json=body).json()
    single = submit(api)
    asked = {"batch": batch["id"], "prompt": "red ban", "state": "queued", "submitted_before": "2100-01-01T00:00:00Z"}
    assert [job["request"]["prompt"] for job in api.get(JOBS, params=asked).json()["jobs"]] == ["a red banner"]
    assert api.get(JOBS, params={"sort": "created_at"}).json()["jobs"][-1]["id"] == single["id"]
    found = api.get("/api/v1/batches", params={"name": "summ", "state": "open"}).json()
    assert [one["id"] for one in found["batches"]] == [batch["id"]]
    assert api.get("/api/v1/batches", params={"state": "finished"}).json() == {"batches": [], "next": None}


def test_a_preview_is_shown_while_the_job_is_drawn(api: httpx.Client, hand: Farmhand) -> None:
    job = api.post(JOBS, json={"prompt": "a", "width": 64, "height": 64}, params={"previews": 2}).json()
    assert job["preview_url"] is None
    assert_problem(api.get(f"{JOBS}/{job['id']}/preview"), 404)
    hand.beat()
    claim = hand.claim(hand.store.job(job["id"]))
    assert claim.previews == 2
    key = preview_key(claim.job_id, 1, 7)
    hand.storage.put(key, b"picture", "image/jpeg")
    hand.store.note_preview(claim, key)
    shown = api.get(f"{JOBS}/{job['id']}").json()["preview_url"]
    assert httpx.get(api.get(shown).headers["location"]).content == b"picture"
    hand.store.give_back(claim)
    assert_problem(api.get(shown), 404)


def test_a_job_is_cancelled_once_and_a_finished_one_not_at_all(api: httpx.Client, hand: Farmhand) -> None:
    job = submit(api)
    for _ in range(2):
        assert api.post(f"{JOBS}/{job['id']}/cancel").json()["state"] == "cancelled"
    drawn = submit(api)
    hand.succeed(as_job(drawn))
    assert assert_problem(api.post(f"{JOBS}/{drawn['id']}/cancel"), 409)["state"] == "succeeded"
    assert_problem(api.post(f"{JOBS}/{uuid4()}/cancel"), 404)


def test_a_queued_job_is_cancelled_at_once_and_never_drawn_though_its_message_is_out(
    api: httpx.Client, hand: Farmhand
) -> None:
    job = as_job(submit(api))
    batch = api.post("/api/v1/batches", json={"name": "b", "jobs": [{"prompt": "a"}] * 3}).json()
    until(lambda: sum(hand.store.window(lease_s=20).published.values()))  # the API's own dispatcher publishes
    assert api.post(f"{JOBS}/{job.id}/cancel").json()["state"] == "cancelled"
    assert api.post(f"/api/v1/batches/{batch['id']}/cancel").json()["counts"]["cancelled"] == 3
    for one in [job, *hand.store.batch_jobs(batch["id"])]:
        assert hand.store.claim(Message(one.id, one.claim + 1), hand.id) is None
    until(lambda: not sum(hand.store.window(lease_s=20).published.values()))  # and its place is another's
    assert api.get("/api/v1/farm").json()["counts"]["cancelled"] == 4


def test_the_image_of_a_succeeded_job_is_a_redirect_to_the_bucket(api: httpx.Client, hand: Farmhand) -> None:
    job = submit(api, name="boat")
    waiting = assert_problem(api.get(f"{JOBS}/{job['id']}/image"), 409)
    assert waiting["state"] == "queued"
    body = hand.succeed(as_job(job))
    found = api.get(f"{JOBS}/{job['id']}").json()
    redirect = api.get(found["image_url"])
    assert redirect.status_code == 307
    image = httpx.get(redirect.headers["location"])
    assert image.content == body
    assert image.headers["content-type"] == "image/png"
    assert "boat.png" in image.headers["content-disposition"]
    assert hashlib.sha256(image.content).hexdigest() == found["sha256"]
    assert_problem(api.get(f"{JOBS}/{uuid4()}/image"), 404)


def test_the_history_tells_each_claim(api: httpx.Client, hand: Farmhand) -> None:
    job = submit(api)
    assert api.get(f"{JOBS}/{job['id']}/history").json() == {"claims": []}
    hand.beat(device="cuda:0")
    hand.fail(as_job(job), "too many tokens")
    (claim,) = api.get(f"{JOBS}/{job['id']}/history").json()["claims"]
    assert (claim["claim"], claim["outcome"], claim["device"]) == (1, "failed", "cuda:0")
    assert claim["error"] == "too many tokens"
    assert_problem(api.get(f"{JOBS}/{uuid4()}/history"), 404)


BAD_BODIES: dict[str, tuple[bytes, str, int]] = {
    "no JSON": (b"{", "application/json", 400),
    "empty": (b"", "application/json", 400),
    "NaN": (b'{"prompt": "a", "guidance": NaN}', "application/json", 400),
    "not UTF-8": (b'{"prompt": "\xff"}', "application/json", 400),
    "nested": (b"[" * 200_000, "application/json", 400),
    "huge number": (b'{"prompt": "a", "width": 1e999}', "application/json", 422),
    "many digits": (b'{"prompt": "a", "width": ' + b"9" * 9000 + b"}", "application/json", 400),
    "list": (b"[]", "application/json", 422),
    "null": (b"null", "application/json", 422),
    "NUL": (b'{"prompt": "a\\u0000b"}', "application/json", 422),
    "surrogate": (b'{"prompt": "\\ud800"}', "application/json", 422),
    "surrogate as a field": (b'{"prompt": "a", "\\ud800": 1}', "application/json", 422),
    "surrogate as a priority": (b'{"prompt": "a", "priority": "\\ud800"}', "application/json", 422),
    "form": (b"prompt=a", "application/x-www-form-urlencoded", 415),
    "plain": (b'{"prompt": "a"}', "text/plain", 415),
    "no type": (b'{"prompt": "a"}', "", 415),
    "large": (b'{"prompt": "' + b"a" * 1_000_001 + b'"}', "application/json", 413),
}


def test_no_body_ends_in_an_error_of_the_server(api: httpx.Client) -> None:
    for name, (body, media_type, status) in BAD_BODIES.items():
        response = api.post(JOBS, content=body, headers={"Content-Type": media_type} if media_type else {})
        assert response.status_code == status, f"{name}: {response.status_code} {response.text}"
        assert_problem(response, status)
    assert api.get(JOBS).json()["jobs"] == []


def test_a_wrong_field_is_named(api: httpx.Client) -> None:
    problem = assert_problem(api.post(JOBS, json={"prompt": "a", "width": 0, "hight": 64}), 422)
    assert [error["field"] for error in problem["errors"]] == ["width", "hight"]
    assert problem["type"] == "urn:ovis-batch:problem:invalid"
    assert problem["instance"] == JOBS


@pytest.mark.parametrize("declared", [True, False])
def test_a_huge_body_is_refused_while_it_is_read(api: httpx.Client, declared: bool) -> None:
    headers = {"Content-Type": "application/json"}
    body = b" " * 30_000_000
    content: Any = body if declared else (body[at : at + 65536] for at in range(0, len(body), 65536))
    problem = assert_problem(api.post(JOBS, content=content, headers=headers), 413)
    assert "x-ndjson" in problem["detail"]


REFUSALS = [
    ("GET", f"{JOBS}/not-a-uuid", 422),
    ("GET", f"{JOBS}/%00", 422),
    ("GET", f"{JOBS}/{uuid4()}", 404),
    ("GET", f"{JOBS}?limit=0", 422),
    ("GET", f"{JOBS}?limit=99999999999999999999999", 422),
    ("GET", f"{JOBS}?cursor=-1", 422),
    ("GET", f"{JOBS}?cursor=LWNyZWF0ZWRfYXQgMjAyNi0wMS0wMSAx", 422),
    ("GET", f"{JOBS}?cursor=%00", 422),
    ("GET", f"{JOBS}?prompt=%21", 422),
    ("GET", f"{JOBS}?prompt=a&sort=finished_at", 422),
    ("GET", f"{JOBS}?submitted_after=2026-01-01T00:00:00", 422),
    ("GET", f"{JOBS}?error_code=%00", 422),
    ("GET", f"{JOBS}?previews=4&sort=up", 422),
    ("GET", f"{JOBS}/{uuid4()}/preview", 404),
    ("GET", "/api/v1/batches?cursor=rubbish", 422),
    ("GET", f"{JOBS}?state=lost%00", 422),
    ("GET", "/api/v1/batches?limit=101", 422),
    ("GET", f"/api/v1/batches/{uuid4()}", 404),
    ("GET", f"/api/v1/batches/{uuid4()}/jobs", 404),
    ("GET", f"/api/v1/batches/{uuid4()}/jobs?after=2147483648", 422),
    ("GET", "/api/v1/nothing", 404),
    ("GET", "/static/..%2fpage.py", 404),
    ("GET", "/static/nothing.css", 404),
    ("DELETE", JOBS, 405),
    ("PUT", "/", 405),
]


def test_every_refusal_is_a_problem_document(api: httpx.Client) -> None:
    for method, path, status in REFUSALS:
        assert_problem(api.request(method, path), status)
