"""What a person does with a batch or a job that is there, over HTTP."""

from typing import Any
from uuid import uuid4

import httpx
import pytest

from producer.jobs.contract import Batch, Entry, Job, Rejection, State, Submission
from tests.farm import Farmhand
from tests.integration.producer.api.test_jobs import assert_problem

BATCHES = "/api/v1/batches"


def submission(**fields: Any) -> Submission:
    return Submission.model_validate({"prompt": "a boat", "width": 64, "height": 64} | fields)


@pytest.fixture
def handed_in(hand: Farmhand) -> tuple[Batch, list[Job]]:
    """A batch of three: one failed, one cancelled, one succeeded."""
    batch = hand.store.submit_batch("b", [submission(seed=n) for n in range(3)], max_failures=1)
    failed, cancelled, good = hand.store.batch_jobs(batch.id)
    hand.fail(failed)
    hand.store.cancel(cancelled.id)
    hand.succeed(good)
    return batch, hand.store.batch_jobs(batch.id)


def counts(response: httpx.Response) -> dict[str, int]:
    assert response.status_code == 200, response.text
    return {state: count for state, count in response.json()["counts"].items() if count}


@pytest.mark.parametrize(
    ("query", "after"),
    [
        ("", {"queued": 1, "cancelled": 1, "succeeded": 1}),
        ("?state=failed", {"queued": 1, "cancelled": 1, "succeeded": 1}),
        ("?state=cancelled", {"queued": 1, "failed": 1, "succeeded": 1}),
        ("?state=failed&state=cancelled", {"queued": 2, "succeeded": 1}),
    ],
)
def test_a_batch_is_retried_in_part(
    api: httpx.Client, handed_in: tuple[Batch, list[Job]], query: str, after: dict[str, int]
) -> None:
    response = api.post(f"{BATCHES}/{handed_in[0].id}/retry{query}")
    assert counts(response) == after
    assert (response.json()["done"], response.json()["finished_at"]) == (False, None)


def test_what_is_retried_is_drawn_and_succeeds(
    api: httpx.Client, handed_in: tuple[Batch, list[Job]], hand: Farmhand
) -> None:
    batch, (failed, *_) = handed_in
    api.post(f"{BATCHES}/{batch.id}/retry")
    hand.succeed(hand.store.job(failed.id))
    assert counts(api.get(f"{BATCHES}/{batch.id}")) == {"succeeded": 2, "cancelled": 1}


def test_a_state_that_nothing_is_retried_from_is_refused(api: httpx.Client, handed_in: tuple[Batch, list[Job]]) -> None:
    for state in ("succeeded", "running", "all"):
        assert_problem(api.post(f"{BATCHES}/{handed_in[0].id}/retry?state={state}"), 422)


def test_one_job_is_retried_and_one_that_succeeded_is_not(
    api: httpx.Client, handed_in: tuple[Batch, list[Job]]
) -> None:
    failed, cancelled, good = handed_in[1]
    for job in (failed, cancelled):
        answer = api.post(f"/api/v1/jobs/{job.id}/retry").json()
        assert (answer["state"], answer["failures"], answer["error_message"]) == ("queued", 0, None)
    assert assert_problem(api.post(f"/api/v1/jobs/{good.id}/retry"), 409)["state"] == "succeeded"
    assert_problem(api.post(f"/api/v1/jobs/{uuid4()}/retry"), 404)


def test_one_item_of_a_batch_is_cancelled_alone(api: httpx.Client, hand: Farmhand) -> None:
    batch = hand.store.submit_batch("b", [submission(), submission()], max_failures=1)
    job = hand.store.batch_jobs(batch.id)[0]
    api.post(f"/api/v1/jobs/{job.id}/cancel")
    assert counts(api.get(f"{BATCHES}/{batch.id}")) == {"queued": 1, "cancelled": 1}


def test_a_batch_is_paused_and_resumed_however_often(api: httpx.Client, handed_in: tuple[Batch, list[Job]]) -> None:
    path = f"{BATCHES}/{handed_in[0].id}"
    for step, paused in (("pause", True), ("pause", True), ("resume", False), ("resume", False)):
        assert api.post(f"{path}/{step}").json()["paused"] is paused
        assert api.get(path).json()["paused"] is paused


def test_a_batch_gets_another_priority(api: httpx.Client, hand: Farmhand) -> None:
    batch = hand.store.submit_batch("b", [submission(), submission()], max_failures=1)
    path = f"{BATCHES}/{batch.id}"
    assert api.put(f"{path}/priority", json={"priority": "bulk"}).status_code == 200
    assert {job["priority"] for job in api.get(f"{path}/jobs").json()["jobs"]} == {"bulk"}
    for body in ({}, {"priority": "now"}, {"priority": "bulk", "more": 1}, []):
        assert_problem(api.put(f"{path}/priority", json=body), 422)
    assert_problem(api.put(f"{path}/priority", content=b"bulk"), 415)


def test_a_deleted_batch_is_gone_at_once_with_jobs_and_images_links(
    api: httpx.Client, handed_in: tuple[Batch, list[Job]]
) -> None:
    batch, jobs = handed_in
    path = f"{BATCHES}/{batch.id}"
    response = api.delete(path)
    assert (response.status_code, response.content) == (204, b"")
    for gone in (path, f"{path}/jobs", f"{path}/results", f"{path}/images.zip", f"{path}/rejections"):
        assert_problem(api.get(gone), 404)
    assert_problem(api.get(f"/api/v1/jobs/{jobs[2].id}/image"), 404)
    assert_problem(api.delete(path), 404)
    assert api.get(BATCHES).json()["batches"] == []


def test_rejected_lines_come_page_by_page(api: httpx.Client, hand: Farmhand) -> None:
    entries = [Entry(submission(), 1, {})]
    refused = [Rejection(n, {"sku": f"{n}"}, "invalid", "is empty", "prompt") for n in range(2, 7)]
    batch = hand.store.submit_batch("b", [*entries, *refused], max_failures=1)
    assert api.get(f"{BATCHES}/{batch.id}").json()["rejected"] == 5
    found, after = [], 0
    while after is not None:
        page = api.get(f"{BATCHES}/{batch.id}/rejections", params={"limit": 2, "after": after}).json()
        found += page["rejections"]
        after = page["next"]
    assert [line["line"] for line in found] == [2, 3, 4, 5, 6]
    assert found[0] == {"line": 2, "source": {"sku": "2"}, "code": "invalid", "message": "is empty", "field": "prompt"}


@pytest.mark.parametrize("step", ["pause", "resume", "cancel", "retry"])
def test_a_step_of_an_unknown_batch_is_not_found(api: httpx.Client, step: str) -> None:
    assert_problem(api.post(f"{BATCHES}/{uuid4()}/{step}"), 404)


def test_a_finished_batch_is_unfinished_again_by_the_retry_of_one_job(
    api: httpx.Client, handed_in: tuple[Batch, list[Job]]
) -> None:
    batch, (failed, *_) = handed_in
    assert api.get(f"{BATCHES}/{batch.id}").json()["done"] is True
    api.post(f"/api/v1/jobs/{failed.id}/retry")
    now = api.get(f"{BATCHES}/{batch.id}").json()
    assert (now["done"], now["finished_at"], now["counts"][State.QUEUED]) == (False, None, 1)
