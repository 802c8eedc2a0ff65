"""What a person does with a batch that is there, in SQL: retry, pause, prioritise, delete."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Event, Thread
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text

from producer.jobs.contract import (
    Batch,
    Entry,
    Job,
    Message,
    Priority,
    Rejection,
    State,
    Submission,
)
from producer.jobs.dispatcher import Dispatcher
from producer.jobs.errors import IllegalTransition, LostClaim, NotFound
from producer.jobs.queue import Queue
from producer.jobs.results import Results
from producer.jobs.settings import Settings
from producer.jobs.store import Store
from tests.integration.producer.jobs.test_store import IMAGE, beat, claim, next_messages, outcomes, sql, sql_value
from tests.integration.producer.jobs.test_store import worker as beating_worker
from tests.waiting import until


@pytest.fixture
def worker(store: Store) -> UUID:
    return beating_worker(store)


def submission(**fields: object) -> Submission:
    return Submission.model_validate({"prompt": "a", "width": 64, "height": 64} | fields)


def submit_batch(store: Store, count: int = 3, **fields: object) -> tuple[Batch, list[Job]]:
    batch = store.submit_batch("b", [submission(**fields) for _ in range(count)], max_failures=1)
    return batch, store.batch_jobs(batch.id)


def fail(store: Store, job: Job, worker: UUID) -> None:
    store.fail(claim(store, job, worker), "invalid", "the prompt is too long")


def messages(store: Store) -> object:
    return sql_value(store, "SELECT count(*) FROM messages")


def open_messages(store: Store, leader: UUID) -> set[UUID]:
    return {message.job_id for message in next_messages(store, leader)}


# Retry.


def test_a_failed_job_that_is_retried_is_drawn_as_if_for_the_first_time(
    store: Store, leader: UUID, worker: UUID
) -> None:
    _, (job, *_) = submit_batch(store, 1)
    fail(store, job, worker)
    sql(store, "UPDATE lanes SET open = false")  # as the leader does once the lane is empty
    again = store.retry_job(job.id)
    assert (again.state, again.failures, again.claim, again.finished_at) == (State.QUEUED, 0, 1, None)
    assert (again.error_code, again.error_message) == (None, None)
    assert again.request == job.request  # its seed too
    assert next_messages(store, leader) == [Message(job.id, 2)]
    store.record(claim(store, job, worker), IMAGE)
    assert store.job(job.id).state is State.SUCCEEDED
    assert outcomes(store, job) == ["failed", "succeeded"]


def test_a_retried_suspect_has_neighbours_again(store: Store, worker: UUID) -> None:
    _, (job,) = submit_batch(store, 1)
    fail(store, job, worker)
    sql(store, "UPDATE jobs SET suspect = true")
    store.retry_job(job.id)
    assert not claim(store, job, worker).suspect


def test_a_job_is_retried_once_however_often_it_is_asked_for(store: Store, worker: UUID) -> None:
    _, (job,) = submit_batch(store, 1)
    store.cancel(job.id)
    assert store.retry_job(job.id) == store.retry_job(job.id)
    claim(store, job, worker)
    assert store.retry_job(job.id).state is State.RUNNING


def test_what_has_succeeded_stays(store: Store, worker: UUID) -> None:
    batch, (job,) = submit_batch(store, 1)
    store.record(claim(store, job, worker), IMAGE)
    with pytest.raises(IllegalTransition):
        store.retry_job(job.id)
    assert store.retry_batch(batch.id, list(State)).counts[State.SUCCEEDED] == 1


def test_a_worker_that_still_draws_for_the_cancelled_claim_cannot_end_the_retried_job(
    store: Store, worker: UUID
) -> None:
    _, (job,) = submit_batch(store, 1)
    lost = claim(store, job, worker)
    store.cancel(job.id)
    store.retry_job(job.id)
    held = claim(store, job, worker)
    for write in (lambda: store.record(lost, IMAGE), lambda: store.fail(lost, "x", "y")):
        with pytest.raises(LostClaim):
            write()
    store.record(held, IMAGE)
    assert outcomes(store, job) == ["cancelled", "succeeded"]


def test_of_a_batch_the_failed_ones_are_retried_and_the_cancelled_only_when_named(store: Store, worker: UUID) -> None:
    batch, (failed, cancelled, good) = submit_batch(store)
    fail(store, failed, worker)
    store.record(claim(store, good, worker), IMAGE)
    store.cancel_batch(batch.id)
    sql(store, "UPDATE batches SET finished_at = now()")
    again = store.retry_batch(batch.id)
    assert (again.finished_at, again.cancelled_at, again.done) == (None, None, False)
    assert [store.job(job.id).state for job in (failed, cancelled, good)] == ["queued", "cancelled", "succeeded"]
    again = store.retry_batch(batch.id, [State.FAILED, State.CANCELLED])
    assert again.counts == {**dict.fromkeys(State, 0), State.QUEUED: 2, State.SUCCEEDED: 1}


def test_a_retry_that_finds_nothing_leaves_the_batch_finished(store: Store, worker: UUID) -> None:
    batch, (job,) = submit_batch(store, 1)
    store.record(claim(store, job, worker), IMAGE)
    sql(store, "UPDATE batches SET finished_at = now(), cancelled_at = now()")
    again = store.retry_batch(batch.id, [State.FAILED, State.CANCELLED])
    assert None not in (again.finished_at, again.cancelled_at)


def test_another_batch_is_not_touched_by_any_step(store: Store, worker: UUID) -> None:
    batch, _ = submit_batch(store)
    other, (failed, cancelled, _) = submit_batch(store)
    fail(store, failed, worker)
    store.cancel(cancelled.id)
    before = store.batch_jobs(other.id), store.batch(other.id)
    store.cancel_batch(batch.id)
    store.retry_batch(batch.id, [State.FAILED, State.CANCELLED])
    store.pause_batch(batch.id, paused=True)
    store.prioritise_batch(batch.id, Priority.BULK)
    store.delete_batch(batch.id)
    assert (store.batch_jobs(other.id), store.batch(other.id)) == before


# Pause.


def test_no_job_of_a_paused_batch_is_claimed_and_what_is_drawn_is_recorded(
    store: Store, leader: UUID, worker: UUID
) -> None:
    batch, (running, published, _) = submit_batch(store)
    drawn = claim(store, running, worker)
    assert store.pause_batch(batch.id, paused=True).paused
    assert store.lanes() == []
    assert store.claim(Message(published.id, 1), worker) is None
    store.record(drawn, IMAGE)
    assert not store.pause_batch(batch.id, paused=False).paused
    assert store.claim(Message(published.id, 1), worker) is not None


def test_a_message_that_was_forgotten_while_its_batch_was_paused_comes_again(
    settings: Settings, store: Store, worker: UUID
) -> None:
    """By the real dispatcher and the real Redis."""
    queue = Queue(settings.require("redis_url"))
    dispatcher = Dispatcher(store, queue, settings.durations)
    stop = Event()
    thread = Thread(target=dispatcher.run, args=(stop,))
    thread.start()
    try:
        batch, (job,) = submit_batch(store, 1)
        until(lambda: messages(store) == 1)
        store.pause_batch(batch.id, paused=True)
        assert store.claim(Message(job.id, 1), worker) is None  # as a worker that takes it from Redis
        until(lambda: messages(store) == 0)
        store.pause_batch(batch.id, paused=False)
        until(lambda: messages(store) == 1)
    finally:
        stop.set()
        thread.join(30)
        queue.close()
    assert not thread.is_alive()


# Priority.


def test_what_has_not_ended_of_a_batch_goes_by_its_new_priority(store: Store, leader: UUID, worker: UUID) -> None:
    batch, (running, published, failed) = submit_batch(store)
    drawn = claim(store, running, worker)
    fail(store, failed, worker)
    assert open_messages(store, leader) == {published.id}
    store.prioritise_batch(batch.id, Priority.BULK)
    assert [store.job(job.id).priority for job in (running, published, failed)] == ["bulk", "bulk", "standard"]
    (lane,) = [lane for lane in store.lanes() if lane.priority is Priority.BULK]
    assert [found.lane_id for found in store.next_messages(leader, {lane.id: 5})] == [lane.id]
    store.give_back(drawn)
    assert [found.message for found in store.next_messages(leader, {lane.id: 5})] == [Message(running.id, 2)]


def test_a_batch_has_one_lane_a_priority_however_often_it_changes(store: Store, leader: UUID) -> None:
    batch, jobs = submit_batch(store)
    for priority in (Priority.BULK, Priority.INTERACTIVE, Priority.BULK, Priority.STANDARD):
        store.prioritise_batch(batch.id, priority)
    assert sql_value(store, "SELECT count(*) FROM lanes") == len(Priority)
    assert open_messages(store, leader) == {job.id for job in jobs}


# Delete.


def test_a_deleted_batch_is_gone_with_all_that_belongs_to_it(store: Store, leader: UUID, worker: UUID) -> None:
    entries = [
        Entry(submission(), 1, {"sku": "A"}),
        Rejection(2, {"sku": "B"}, "invalid", "is empty", "prompt"),
        Entry(submission(), 3, {"sku": "C"}),
    ]
    batch = store.submit_batch("b", entries, max_failures=3)
    first, second = store.batch_jobs(batch.id)
    store.record(claim(store, first, worker), IMAGE)
    open_messages(store, leader)
    assert [found.line for found in store.rejections(batch.id)] == [2]
    store.delete_batch(batch.id)
    for read in (lambda: store.batch(batch.id), lambda: store.batch_jobs(batch.id), lambda: store.job(second.id)):
        with pytest.raises(NotFound):
            read()
    for table in ("jobs", "claims", "messages", "rejections", "lanes"):
        assert sql_value(store, f"SELECT count(*) FROM {table}") == 0, table
    assert store.claim(Message(second.id, 1), worker) is None


@pytest.mark.parametrize("step", ["batch", "cancel", "retry", "pause", "prioritise", "delete"])
def test_a_batch_that_is_not_there_is_not_found(store: Store, step: str) -> None:
    steps = {
        "batch": lambda: store.batch(uuid4()),
        "cancel": lambda: store.cancel_batch(uuid4()),
        "retry": lambda: store.retry_batch(uuid4()),
        "pause": lambda: store.pause_batch(uuid4(), paused=True),
        "prioritise": lambda: store.prioritise_batch(uuid4(), Priority.BULK),
        "delete": lambda: store.delete_batch(uuid4()),
    }
    with pytest.raises(NotFound):
        steps[step]()
    with pytest.raises(NotFound):
        store.retry_job(uuid4())


def test_a_worker_that_draws_for_a_deleted_job_writes_nothing(store: Store, worker: UUID) -> None:
    batch, (job,) = submit_batch(store, 1)
    lost = claim(store, job, worker)
    store.delete_batch(batch.id)
    assert store.holding(worker) == set()
    for write in (
        lambda: store.record(lost, IMAGE),
        lambda: store.fail(lost, "x", "y"),
        lambda: store.give_back(lost),
        lambda: store.note_checkpoint(lost, "checkpoints/x", 1),
    ):
        with pytest.raises(LostClaim):
            write()


def test_what_is_to_go_from_the_bucket_is_noted_and_waits(store: Store, worker: UUID) -> None:
    batch, (running, stopped, _) = submit_batch(store)
    claim(store, running, worker)
    claim(store, stopped, worker)
    store.cancel(stopped.id)
    store.delete_batch(batch.id)
    assert store.deletions(after_s=60) == []
    ((deletion, prefixes),) = store.deletions(after_s=0)
    assert prefixes[0] == f"images/{batch.id}/"
    assert set(prefixes[1:]) == {f"checkpoints/{job.id}/" for job in (running, stopped)}
    store.deleted(deletion)
    assert store.deletions(after_s=0) == []


def test_an_image_that_several_share_goes_with_the_last_of_them(store: Store, worker: UUID) -> None:
    first, (drawn,) = submit_batch(store, 1, seed=7)
    beat(store, worker)
    key = f"images/{first.id}/{drawn.id}/1.png"
    store.record(claim(store, drawn, worker), replace(IMAGE, object_key=key))
    copies = [
        store.submit_batch("copy", [submission(seed=7), submission(seed=7)], max_failures=1, deduplicate=True)
        for _ in range(2)
    ]
    assert all(copy.counts[State.SUCCEEDED] == 2 for copy in copies)
    store.delete_batch(copies[0].id)
    assert [prefixes for _, prefixes in store.deletions(after_s=0)] == [[f"images/{copies[0].id}/"]]
    store.delete_batch(first.id)
    assert store.deletable([key, "images/other"]) == ["images/other"]
    store.delete_batch(copies[1].id)
    assert store.deletions(after_s=0)[-1][1] == [f"images/{copies[1].id}/", key]
    assert store.deletable([key]) == [key]


def test_a_tenant_steers_its_own_batch_and_finds_no_other(store: Store, worker: UUID) -> None:
    entries = [Entry(submission(), 1, {"b": "1", "a": "2"}), Rejection(2, {"c": ""}, "invalid", "is empty")]
    batch = store.submit_batch("b", entries, max_failures=1, tenant="acme")
    (job,) = store.batch_jobs(batch.id)
    fail(store, job, worker)
    theirs, strangers = store.of("acme"), store.of("zenith")
    assert Results(strangers).columns(batch.id) == strangers.rejections(batch.id) == []
    for step in (
        lambda: strangers.retry_batch(batch.id),
        lambda: strangers.retry_job(job.id),
        lambda: strangers.pause_batch(batch.id, paused=True),
        lambda: strangers.prioritise_batch(batch.id, Priority.BULK),
        lambda: strangers.delete_batch(batch.id),
        lambda: list(Results(strangers).of(batch.id)),
    ):
        with pytest.raises(NotFound):
            step()
    assert theirs.batch(batch.id).counts[State.FAILED] == 1
    assert theirs.pause_batch(batch.id, paused=True).paused
    assert theirs.retry_job(job.id).state is State.QUEUED
    theirs.prioritise_batch(batch.id, Priority.BULK)
    assert theirs.job(job.id).priority is Priority.BULK
    assert Results(theirs).columns(batch.id) == ["b", "a", "c"]
    assert [result.line for result in Results(theirs).of(batch.id)] == [1, 2]
    theirs.delete_batch(batch.id)
    assert len(store.deletions(after_s=0)) == 1


def test_checkpoints_of_claims_that_a_drawn_job_lost_go_with_its_batch(store: Store, worker: UUID) -> None:
    batch, (once, again) = submit_batch(store, 2)
    for job in (once, again):
        taken = claim(store, job, worker)
        if job is again:
            store.give_back(taken)
            taken = claim(store, job, worker)
        store.record(taken, IMAGE)
    store.delete_batch(batch.id)
    assert [prefixes for _, prefixes in store.deletions(after_s=0)] == [
        [f"images/{batch.id}/", f"checkpoints/{again.id}/"]
    ]


@pytest.mark.parametrize(
    "step",
    [
        lambda store, batch, job: store.cancel_batch(batch.id),
        lambda store, batch, job: store.retry_batch(batch.id, [State.FAILED]),
        lambda store, batch, job: store.prioritise_batch(batch.id, Priority.BULK),
        lambda store, batch, job: store.delete_batch(batch.id),
        lambda store, batch, job: store.retry_job(job.id),
    ],
)
def test_a_step_that_waits_for_another_with_the_same_batch_holds_none_of_its_jobs_meanwhile(
    store: Store, worker: UUID, step: Callable[[Store, Batch, Job], object]
) -> None:
    batch, (job, _) = submit_batch(store, 2)
    fail(store, job, worker)
    waiting = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    with ThreadPoolExecutor() as pool:
        with store.database.begin() as other:
            other.execute(text("SELECT FROM batches FOR NO KEY UPDATE"))
            done = pool.submit(step, store, batch, job)
            until(lambda: sql_value(store, f"SELECT EXISTS ({waiting})"))
            other.execute(text("SELECT FROM jobs FOR UPDATE NOWAIT"))
        done.result(10)


def test_a_batch_that_has_finished_is_not_paused_and_one_that_finishes_is_so_no_longer(
    store: Store, leader: UUID
) -> None:
    batch, _ = submit_batch(store, 2)
    assert store.pause_batch(batch.id, paused=True).paused
    store.cancel_batch(batch.id)
    assert store.finish_batches(leader) == 1
    assert not store.batch(batch.id).paused
    assert not store.pause_batch(batch.id, paused=True).paused
