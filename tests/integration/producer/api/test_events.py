"""Streams of events, over HTTP, while jobs end."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from producer.jobs.contract import Scope, Submission
from producer.jobs.keys import Keys
from producer.jobs.settings import Settings
from producer.jobs.store import Store
from tests.farm import Farmhand, serving
from tests.integration.producer.api.test_jobs import assert_problem
from tests.waiting import until

BATCHES, JOBS = "/api/v1/batches", "/api/v1/jobs"


class Heard:
    """A stream, event by event."""

    def __init__(self, response: httpx.Response) -> None:
        self.comments = 0
        self._lines = response.iter_lines()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        event: dict[str, Any] = {}
        for line in self._lines:
            name, _, value = line.partition(": ")
            if not line:
                if event:
                    yield event
                event = {}
            elif not name:
                self.comments += 1
            else:
                event[name] = json.loads(value) if name == "data" else value


@contextmanager
def streaming(
    api: httpx.Client, path: str, last: str | None = None, headers: dict[str, str] | None = None
) -> Iterator[Heard]:
    asked = (headers or {}) | ({"Last-Event-ID": last} if last else {})
    with api.stream("GET", f"{path}/events", headers=asked) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-store"
        yield Heard(response)


def batch_of(api: httpx.Client, count: int) -> dict[str, Any]:
    batch: dict[str, Any] = api.post(BATCHES, json={"name": "boats", "jobs": [{"prompt": "a boat"}] * count}).json()
    return batch


def test_the_previews_of_a_batch_are_told_where_it_is_followed(api: httpx.Client, hand: Farmhand) -> None:
    jobs = {"name": "boats", "jobs": [{"prompt": "a boat"}]}
    batch = api.post(BATCHES, params={"previews": 1}, json=jobs).json()
    (job,) = hand.store.batch_jobs(batch["id"])
    with streaming(api, f"{BATCHES}/{batch['id']}") as heard:
        told = iter(heard)
        hand.beat([{"job": str(job.id), "step": 25, "steps": 50}])
        claim = hand.claim(job)
        assert claim.previews == 1
        hand.store.note_preview(claim, "previews/1")
        shown = next(event for event in told if (event["data"] or {}).get("preview_url"))
        assert (shown["event"], shown["data"]["preview_url"]) == ("job.progress", f"{JOBS}/{job.id}/preview")
        hand.store.give_back_all(hand.id)
        hand.succeed(job)


def test_a_job_is_followed_until_it_has_its_image(api: httpx.Client, hand: Farmhand, store: Store) -> None:
    job = store.submit(Submission(prompt="a", width=64, height=64), max_failures=3)
    with streaming(api, f"{JOBS}/{job.id}") as heard:
        told = iter(heard)
        hand.beat([{"job": str(job.id), "step": 3, "steps": 50}])
        hand.claim(job)
        progress, running = sorted((next(told), next(told)), key=lambda event: str(event["event"]))
        hand.beat([{"job": str(job.id), "step": 4, "steps": 50}])
        hand.store.give_back_all(hand.id)
        hand.succeed(job)
        rest = list(told)
    assert rest[-1]["event"] == "job.succeeded"
    assert running["event"] == running["data"]["kind"] == "job.running"
    assert (running["data"]["job_id"], running["data"]["batch_id"]) == (str(job.id), None)
    assert progress["event"] == "job.progress"
    assert "id" not in progress
    expected = {"state": "running", "step": 3, "steps": 50, "preview_url": None, "job_id": str(job.id)}
    assert expected.items() <= progress["data"].items()


def test_a_finished_batch_is_told_whole_and_from_its_end_on_answers_at_once(api: httpx.Client) -> None:
    batch = batch_of(api, 2)
    path = f"{BATCHES}/{batch['id']}"
    with streaming(api, path) as heard:
        api.post(f"{path}/cancel")
        events = list(heard)
    assert [event["event"] for event in events] == ["job.cancelled", "job.cancelled", "batch.finished"]
    assert events[-1]["data"]["counts"]["cancelled"] == 2
    with streaming(api, path) as heard:
        assert list(heard) == events
    with streaming(api, path, events[1]["id"]) as heard:
        assert list(heard) == events[2:]
    with streaming(api, path, events[2]["id"]) as heard:
        (last,) = heard
    assert (last["id"], last["event"]) == (events[2]["id"], "batch.finished")
    assert last["data"]["counts"] == events[2]["data"]["counts"]


def test_what_ended_before_events_were_kept_ends_its_stream_too(
    api: httpx.Client, hand: Farmhand, store: Store
) -> None:
    job = store.submit(Submission(prompt="a"), max_failures=3)
    hand.fail(job)
    with store.database.single() as connection:
        connection.exec_driver_sql("DELETE FROM events")
    with streaming(api, f"{JOBS}/{job.id}") as heard:
        (event,) = heard
    assert event["data"]["error_code"] == "invalid"
    assert event["event"] == "job.failed"


def test_a_retried_job_is_followed_beyond_its_first_end(api: httpx.Client, hand: Farmhand, store: Store) -> None:
    job = store.submit(Submission(prompt="a"), max_failures=3)
    hand.fail(job)
    store.retry_job(job.id)
    with streaming(api, f"{JOBS}/{job.id}") as heard:
        told = iter(heard)
        assert [next(told)["event"] for _ in range(3)] == ["job.running", "job.failed", "job.queued"]
        store.cancel(job.id)
        assert [event["event"] for event in told] == ["job.cancelled"]


def test_a_stream_that_is_cut_off_again_and_again_misses_nothing_and_repeats_nothing(
    settings: Settings, api: httpx.Client, store: Store
) -> None:
    batch = batch_of(api, 60)
    jobs = store.batch_jobs(batch["id"])
    parts = [jobs[place::3] for place in range(3)]
    hands = [Farmhand(settings) for _ in parts]

    def work(hand: Farmhand, part: list[Any]) -> None:
        hand.beat()
        for job in part:
            hand.fail(job)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(hands, parts, strict=True)]
    for thread in threads:
        thread.start()
    stored: list[dict[str, Any]] = []
    while not stored or stored[-1]["event"] != "batch.finished":
        with streaming(api, f"{BATCHES}/{batch['id']}", stored[-1]["id"] if stored else None) as heard:
            for count, event in enumerate((event for event in heard if "id" in event), start=1):
                stored.append(event)
                if count == 7:
                    break
    for thread in threads:
        thread.join()
    for hand in hands:
        hand.close()
    with store.database.single() as connection:
        kept = connection.exec_driver_sql("SELECT kind, job_id::text FROM events ORDER BY 1, 2").all()
    heard_all = sorted((event["event"], event["data"]["job_id"]) for event in stored[:-1])
    assert heard_all == [tuple(row) for row in kept if row[0] != "batch.finished"]
    assert len({event["id"] for event in stored}) == len(stored)
    assert stored[-1]["data"]["counts"]["failed"] == 60


def test_many_streams_hold_up_nobody_and_hear_of_the_same_end(api: httpx.Client, store: Store) -> None:
    batch = batch_of(api, 1)
    ended: list[list[str]] = []

    def follow() -> None:
        with (
            httpx.Client(base_url=api.base_url, timeout=60) as own,
            streaming(own, f"{BATCHES}/{batch['id']}") as heard,
        ):
            begun.release()
            ended.append([event["event"] for event in heard])

    begun = threading.Semaphore(0)
    threads = [threading.Thread(target=follow) for _ in range(60)]  # more than the server has threads for requests
    for thread in threads:
        thread.start()
    for _ in threads:
        assert begun.acquire(timeout=60)
    began = time.monotonic()
    assert api.get(f"{BATCHES}/{batch['id']}").status_code == 200, "others are answered meanwhile"
    assert time.monotonic() - began < 10
    api.post(f"{BATCHES}/{batch['id']}/cancel")
    for thread in threads:
        thread.join(60)
    assert ended == [["job.cancelled", "batch.finished"]] * 60


def test_a_silent_stream_says_that_it_lives_and_ends_when_its_batch_is_deleted(api: httpx.Client, store: Store) -> None:
    batch = batch_of(api, 1)
    with streaming(api, f"{BATCHES}/{batch['id']}") as heard:
        threading.Timer(2, lambda: store.delete_batch(batch["id"])).start()
        assert list(heard) == []
    assert heard.comments >= 1


def test_a_stream_ends_when_its_key_is_revoked(settings: Settings, store: Store) -> None:
    keys = Keys(store.database)
    key, secret = keys.create("acme", "acme's", [Scope.READ])
    job = store.submit(Submission(prompt="a"), max_failures=3, tenant="acme")
    with (
        serving(settings.model_copy(update={"require_keys": True})) as url,
        httpx.Client(base_url=url, timeout=60, headers={"Authorization": f"Bearer {secret}"}) as client,
        streaming(client, f"{JOBS}/{job.id}") as heard,
    ):
        keys.revoke(key.id)
        assert list(heard) == []


def test_open_streams_take_none_of_the_tenants_requests_a_second(settings: Settings, store: Store) -> None:
    _, secret = Keys(store.database).create("acme", "acme's", [Scope.READ])
    job = store.submit(Submission(prompt="a"), max_failures=3, tenant="acme")
    own = settings.model_copy(update={"require_keys": True, "time_scale": 0.01})  # which beats each 0.15 s
    with (
        serving(own) as url,
        httpx.Client(base_url=url, timeout=60, headers={"Authorization": f"Bearer {secret}"}) as client,
        streaming(client, f"{JOBS}/{job.id}"),
    ):
        store.set_tenant("acme", {"max_requests_s": 1})
        answers = []
        for _ in range(4):
            time.sleep(1.2)
            answers.append(client.get(f"{JOBS}/{job.id}").status_code)
    assert answers == [200] * 4


def test_nobody_follows_another_tenants_jobs(settings: Settings, store: Store) -> None:
    _, secret = Keys(store.database).create("other", "other's", [Scope.READ])
    job = store.submit(Submission(prompt="a"), max_failures=3, tenant="acme")
    batch = store.submit_batch("b", [Submission(prompt="a")], max_failures=3, tenant="acme")
    with serving(settings) as url, httpx.Client(base_url=url, headers={"Authorization": f"Bearer {secret}"}) as client:
        assert_problem(client.get(f"{JOBS}/{job.id}/events"), 404)
        assert_problem(client.get(f"{BATCHES}/{batch.id}/events"), 404)


def test_a_server_that_stops_ends_its_streams_at_once(settings: Settings, store: Store) -> None:
    job = store.submit(Submission(prompt="a"), max_failures=3)
    ended: list[float] = []

    def follow(url: str) -> None:
        with httpx.Client(base_url=url, timeout=60) as client, streaming(client, f"{JOBS}/{job.id}") as heard:
            begun.set()
            assert list(heard) == []
            ended.append(time.monotonic())

    begun = threading.Event()
    with serving(settings) as url:
        thread = threading.Thread(target=follow, args=(url,))
        thread.start()
        assert begun.wait(60)
        stopped_at = time.monotonic()
    thread.join(60)
    assert ended[0] - stopped_at < 8, "requests that are under way would have ten seconds"


RUBBISH = ("x", "1", "-1-1", "99999999999999999999-1", "9-1~10-1", f"{2**62}-1", "1-1 OR 1=1")


def test_a_last_event_id_that_is_none_is_refused(api: httpx.Client) -> None:
    batch = batch_of(api, 1)
    (job,) = api.get(f"{BATCHES}/{batch['id']}/jobs").json()["jobs"]
    for path in (f"{BATCHES}/{batch['id']}", f"{JOBS}/{job['id']}"):
        for last in RUBBISH:
            problem = assert_problem(api.get(f"{path}/events", headers={"Last-Event-ID": last}), 422)
            assert [error["field"] for error in problem["errors"]] == ["Last-Event-ID"]


def test_what_is_not_there_has_no_events(api: httpx.Client) -> None:
    for path in (BATCHES, JOBS):
        assert_problem(api.get(f"{path}/00000000-0000-0000-0000-000000000000/events"), 404)
        assert_problem(api.get(f"{path}/x/events"), 422)


def test_streams_go_on_when_postgres_comes_back(api: httpx.Client, store: Store, hand: Farmhand) -> None:
    job = store.submit(Submission(prompt="a"), max_failures=3)
    with streaming(api, f"{JOBS}/{job.id}") as heard:
        told = iter(heard)
        hand.claim(job)
        assert next(told)["event"] == "job.running"
        with store.database.single() as connection:
            connection.exec_driver_sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        until(lambda: _cancelled(store, job.id))
        assert [event["event"] for event in told][-1] == "job.cancelled"


def _cancelled(store: Store, job_id: Any) -> bool:
    return store.cancel(job_id).state == "cancelled"
