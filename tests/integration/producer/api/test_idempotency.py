"""Asking again: the same key and submission is one submission, whatever happened to the first answer."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from sqlalchemy import text

from producer.jobs.answers import LOST_S, Answers, Held
from producer.jobs.contract import Scope, Submission
from producer.jobs.errors import KeyAtWork
from producer.jobs.keys import Keys
from producer.jobs.store import Store
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


def test_of_those_who_ask_at_the_same_time_with_one_key_one_submits(api: httpx.Client) -> None:
    post = poster(api, BATCHES, NDJSON, (ROW + b"\n") * 3000, name="boats")
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(post, ["k1"] * 6))
    early = [answer for answer in answers if answer.status_code == 409]
    assert all(assert_problem(answer, 409)["type"].endswith(":key-at-work") for answer in early)
    assert all(answer.headers["retry-after"] == "1" for answer in early)
    assert len({answer.json()["id"] for answer in [*answers, post("k1")] if answer not in early}) == 1
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


def test_the_same_bytes_of_another_media_type_are_another_submission(api: httpx.Client) -> None:
    first = poster(api, BATCHES, f"{NDJSON}; charset=utf-8", ROW, name="boats")("k1")
    assert first.status_code == 201
    problem = assert_problem(poster(api, BATCHES, "text/csv", ROW, name="boats")("k1"), 422)
    assert problem["type"] == "urn:ovis-batch:problem:key-reused"
    assert poster(api, BATCHES, NDJSON.upper(), ROW, name="boats")("k1").json()["id"] == first.json()["id"]


def test_what_was_deleted_is_not_submitted_again_by_a_late_retry(api: httpx.Client) -> None:
    post = poster(api, BATCHES, NDJSON, ROW, name="boats")
    assert api.delete(post("k1").headers["location"]).status_code == 204
    problem = assert_problem(post("k1"), 410)
    assert problem["type"] == "urn:ovis-batch:problem:deleted"
    assert_problem(post("k1", name="ships"), 422)
    assert submitted(api) == (0, 0)
    assert post("k2").status_code == 201


# All other POSTs: answered from what was kept of the first answer.


def keyed(key: str) -> dict[str, str]:
    return {"Idempotency-Key": key}


@pytest.fixture
def job(api: httpx.Client) -> str:
    """The path of a queued job."""
    return str(api.post(JOBS, content=ROW, headers={"Content-Type": JSON}).headers["location"])


def test_a_post_is_answered_as_at_first_though_things_have_changed(api: httpx.Client, job: str) -> None:
    first = api.post(f"{job}/cancel", headers=keyed("k1"))
    assert "idempotency-replayed" not in first.headers
    assert api.post(f"{job}/retry").json()["state"] == "queued"
    again = api.post(f"{job}/cancel", headers=keyed("k1"))
    assert (again.status_code, again.content) == (first.status_code, first.content)
    assert again.headers["idempotency-replayed"] == "true"
    assert again.headers["content-type"] == first.headers["content-type"]
    assert api.get(job).json()["state"] == "queued"
    assert api.post(f"{job}/cancel", headers=keyed("k2")).json()["state"] == "cancelled"


def test_a_key_that_stands_for_another_post_is_refused(api: httpx.Client, job: str) -> None:
    assert api.post(f"{job}/cancel", headers=keyed("k1")).is_success
    for path, body in ((f"{job}/retry", b""), (f"{job}/cancel", b"{}"), (f"{job}/cancel?a=1", b"")):
        problem = assert_problem(api.post(path, content=body, headers=keyed("k1")), 422)
        assert problem["type"] == "urn:ovis-batch:problem:key-reused"
    assert api.get(job).json()["state"] == "cancelled"


def test_a_refusal_is_forgotten_so_that_it_can_be_asked_again_corrected(api: httpx.Client) -> None:
    headers = {"Content-Type": JSON} | keyed("k1")
    assert_problem(api.post("/api/v1/keys", content=b"{}", headers=headers), 422)
    assert api.post("/api/v1/keys", content=b'{"name": "shop"}', headers=headers).status_code == 201


def test_while_the_first_is_at_work_the_others_are_told_so(api: httpx.Client, job: str, store: Store) -> None:
    answers = Answers(store.database)
    held = answers.begin("default", "k1")
    answer = api.post(f"{job}/cancel", headers=keyed("k1"))
    assert assert_problem(answer, 409)["type"] == "urn:ovis-batch:problem:key-at-work"
    assert answer.headers["retry-after"] == "1"
    assert isinstance(held, Held)
    answers.give_up(held)
    assert api.post(f"{job}/cancel", headers=keyed("k1")).is_success


def test_what_a_dead_process_left_at_work_is_done_by_who_asks_next(store: Store) -> None:
    answers = Answers(store.database)
    dead = answers.begin("default", "k1")
    assert isinstance(dead, Held)
    grow_old(store, LOST_S - 30)
    answers.renew(dead)
    grow_old(store, LOST_S - 30)
    with pytest.raises(KeyAtWork):
        answers.begin("default", "k1")
    grow_old(store, 40)
    heir = answers.begin("default", "k1")
    assert isinstance(heir, Held)
    answers.give_up(dead)  # it was only frozen: what it says counts no more
    with pytest.raises(KeyAtWork):
        answers.begin("default", "k1")


def test_answers_are_removed_after_some_days(api: httpx.Client, job: str, store: Store) -> None:
    assert api.post(f"{job}/cancel", headers=keyed("k1")).is_success
    assert Answers(store.database).prune() == 0
    grow_old(store, 8 * 24 * 3600)
    Answers(store.database).prune()  # the API does so, too, now and then
    with store.database.begin() as connection:
        assert connection.execute(text("SELECT key FROM answers")).all() == []


def test_keys_of_submissions_are_removed_after_some_days_and_what_they_made_stays(
    api: httpx.Client, post: Post, store: Store
) -> None:
    post("k1")
    assert Answers(store.database).prune() == 0
    with store.database.begin() as connection:
        connection.execute(text("UPDATE submissions SET created_at = created_at - interval '8 days'"))
    post("k2")
    there = submitted(api)
    Answers(store.database).prune()  # the API does so, too, now and then
    assert submitted(api) == there
    with store.database.begin() as connection:
        assert connection.execute(text("SELECT key FROM submissions")).scalars().all() == ["k2"]
    post("k2")
    assert submitted(api) == there
    post("k1")
    assert submitted(api) > there, "it is a new key by now"


def grow_old(store: Store, seconds: float) -> None:
    with store.database.begin() as connection:
        statement = text("UPDATE answers SET seen_at = seen_at - make_interval(secs => :seconds)")
        connection.execute(statement, {"seconds": seconds})


def test_a_new_api_key_is_never_kept_and_no_second_one_is_made(api: httpx.Client, store: Store) -> None:
    body = b'{"name": "shop"}'
    headers = {"Content-Type": JSON} | keyed("k1")
    assert api.post("/api/v1/keys", content=body, headers=headers).status_code == 201
    again = assert_problem(api.post("/api/v1/keys", content=body, headers=headers), 409)
    assert again["type"] == "urn:ovis-batch:problem:answer-not-kept"
    assert len(api.get("/api/v1/keys").json()["keys"]) == 1
    with store.database.begin() as connection:
        assert connection.execute(text("SELECT status, body FROM answers")).one() == (201, None)


SECRETS = {
    "/api/v1/keys": ({"name": "shop"}, {"name": "other"}),
    "/api/v1/webhooks": ({"url": "https://a.example/"}, {"url": "https://b.example/"}),
}


@pytest.mark.parametrize("path", SECRETS)
def test_another_body_is_told_from_the_first_though_no_answer_is_kept(api: httpx.Client, path: str) -> None:
    first, other = SECRETS[path]
    assert api.post(path, json=first, headers=keyed("k1")).status_code == 201
    assert assert_problem(api.post(path, json=other, headers=keyed("k1")), 422)["type"].endswith(":key-reused")
    assert assert_problem(api.post(path, json=first, headers=keyed("k1")), 409)["type"].endswith(":answer-not-kept")
    assert len(api.get(path).json()[path.rpartition("/")[2]]) == 1


@pytest.mark.parametrize("path", SECRETS)
def test_no_second_is_made_though_the_answer_was_lost_behind_the_commit(
    api: httpx.Client, store: Store, path: str
) -> None:
    made = api.post(path, json=SECRETS[path][0], headers=keyed("k1"))
    with store.database.begin() as connection:
        connection.execute(text("DELETE FROM answers"))  # as after any failure
    problem = assert_problem(api.post(path, json=SECRETS[path][0], headers=keyed("k1")), 409)
    assert problem["type"] == "urn:ovis-batch:problem:answer-not-kept"
    assert made.json()["id"] in problem["detail"], "so that it can be found and removed"
    assert len(api.get(path).json()[path.rpartition("/")[2]]) == 1
    assert api.post(path, json=SECRETS[path][0], headers=keyed("k2")).status_code == 201


def test_what_an_administrator_was_told_of_other_tenants_is_told_to_no_other(api: httpx.Client, store: Store) -> None:
    def bearer(*scopes: Scope) -> dict[str, str]:
        return {"Authorization": f"Bearer {Keys(store.database).create('default', 'test', scopes)[1]}"}

    admin, plain = bearer(Scope.ADMIN), bearer(Scope.SUBMIT, Scope.READ)
    batch = store.submit_batch("secret", [Submission(prompt="a")], max_failures=3, tenant="acme")
    path = f"{BATCHES}/{batch.id}/pause"
    assert api.post(path, headers=admin | keyed("k1")).json()["name"] == "secret"
    assert_problem(api.post(path, headers=plain), 404)
    refused = api.post(path, headers=plain | keyed("k1"))
    assert assert_problem(refused, 422)["type"] == "urn:ovis-batch:problem:key-reused"
    assert "secret" not in refused.text
    assert api.post(path, headers=bearer(Scope.ADMIN) | keyed("k1")).headers["idempotency-replayed"] == "true"


def test_a_form_is_the_same_whatever_boundary_its_library_drew(api: httpx.Client) -> None:
    row = {"custom_id": "1", "method": "POST", "url": "/v1/images/generations", "body": {"prompt": "a boat"}}
    line = json.dumps(row).encode() + b"\n"

    def upload(content: bytes) -> httpx.Response:
        files = {"file": ("rows.jsonl", content, "application/jsonl")}
        return api.post("/v1/files", data={"purpose": "batch"}, files=files, headers=keyed("k1"))

    first, again = upload(line * 5000), upload(line * 5000)
    assert first.request.headers["content-type"] != again.request.headers["content-type"]
    assert (again.status_code, again.json()) == (200, first.json())
    assert again.headers["idempotency-replayed"] == "true"
    other = upload(line * 4999)
    assert (other.status_code, other.json()["error"]["code"]) == (422, "key_reused")


def test_every_key_is_checked(api: httpx.Client, job: str) -> None:
    problem = assert_problem(api.post(f"{job}/cancel", headers={"Idempotency-Key": "a b"}), 422)
    assert [error["field"] for error in problem["errors"]] == ["Idempotency-Key"]
    assert api.get(job).json()["state"] == "queued"
    posts = [path["post"] for path in api.get("/openapi.json").json()["paths"].values() if "post" in path]
    offered = [[parameter["name"] for parameter in post["parameters"]].count("Idempotency-Key") for post in posts]
    assert offered == [1] * len(posts)


def test_two_tenants_may_use_the_same_key(api: httpx.Client, job: str, store: Store) -> None:
    assert api.post(f"{job}/cancel", headers=keyed("k1")).is_success
    assert isinstance(Answers(store.database).begin("other", "k1"), Held)
