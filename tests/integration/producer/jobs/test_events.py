"""What the triggers write, and what is read of it."""

from collections.abc import Iterator
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text

from producer.jobs.contract import Batch, Rejection, State, Submission
from producer.jobs.events import Cursor, Event, Events, Target
from producer.jobs.settings import Settings
from producer.jobs.store import Store
from tests.farm import Farmhand


@pytest.fixture
def events(store: Store) -> Events:
    return Events(store.database)


@pytest.fixture
def hand(settings: Settings) -> Iterator[Farmhand]:
    farmhand = Farmhand(settings)
    yield farmhand
    farmhand.close()


def submit(store: Store, count: int, tenant: str = "default") -> Batch:
    return store.submit_batch("boats", [Submission(prompt="a")] * count, max_failures=3, tenant=tenant)


def read(events: Events, target: Target, cursor: Cursor | None = None) -> list[Event]:
    (news,) = events.read([(target, cursor or Cursor())])
    assert not news.more
    return list(news.events)


def kinds(events: Events, target: Target, cursor: Cursor | None = None) -> list[str]:
    return [event.kind.value for event in read(events, target, cursor)]


def test_a_submission_tells_nothing_and_each_change_of_state_is_told(
    store: Store, events: Events, hand: Farmhand
) -> None:
    job = store.submit(Submission(prompt="a", name="boat"), max_failures=3)
    target = Target(job_id=job.id)
    assert kinds(events, target) == []
    claim = hand.claim(job)
    store.mark_alone(claim)
    store.note_checkpoint(claim, "checkpoints/x", 3)
    store.give_back(claim)
    store.fail(hand.claim(store.job(job.id)), "invalid", "too long")
    store.retry_job(job.id)
    store.cancel(job.id)
    assert kinds(events, target) == [
        "job.running", "job.queued", "job.running", "job.failed", "job.queued", "job.cancelled",
    ]  # fmt: skip
    failed = read(events, target)[3]
    assert failed.data == {"state": "failed", "name": "boat", "error_code": "invalid"}
    assert (failed.job_id, failed.batch_id) == (job.id, None)


def test_a_batch_is_told_of_its_jobs_and_a_job_of_itself_alone(store: Store, events: Events) -> None:
    batch = submit(store, 3)
    other = submit(store, 1)
    store.cancel_batch(batch.id)
    store.cancel_batch(other.id)
    jobs = store.batch_jobs(batch.id)
    told = read(events, Target(batch_id=batch.id))
    assert {event.job_id for event in told} == {job.id for job in jobs}
    assert [event.job_id for event in read(events, Target(job_id=jobs[1].id))] == [jobs[1].id]


def test_many_jobs_that_change_at_once_are_told_page_by_page_and_none_twice(store: Store, events: Events) -> None:
    store.cancel(store.submit(Submission(prompt="a"), max_failures=3).id)  # this session's plan is made for one row
    batch = submit(store, 1200)
    store.cancel_batch(batch.id)
    cursor, heard = Cursor(), []
    for _ in range(3):
        (news,) = events.read([(Target(batch_id=batch.id), cursor)])
        heard += [event.job_id for event in news.events]
        cursor = Cursor.parse(str(news.events[-1].cursor))
    assert not news.more
    assert len(heard) == len(set(heard)) == 1200


def test_a_tenant_that_may_write_no_event_by_hand_is_told_of_what_it_changes(store: Store, events: Events) -> None:
    batch = submit(store, 2, tenant="acme")
    store.of("acme").cancel_batch(batch.id)
    assert kinds(events, Target(batch_id=batch.id)) == ["job.cancelled"] * 2
    with store.database.single() as connection:
        assert connection.execute(text("SELECT DISTINCT tenant FROM events")).scalars().all() == ["acme"]
    assert kinds(Events(store.database.of("other")), Target(batch_id=batch.id)) == []
    assert not Events(store.database.of("other")).exists(Target(batch_id=batch.id))


def test_a_transaction_that_ends_late_is_told_late_and_delays_nobody(store: Store, events: Events) -> None:
    batch = submit(store, 2)
    first, second = store.batch_jobs(batch.id)
    target = Target(batch_id=batch.id)
    with store.database.begin() as slow:
        slow.execute(text("UPDATE jobs SET state = 'cancelled' WHERE id = :id"), {"id": first.id})
        store.cancel(second.id)
        (told,) = read(events, target)
        assert told.job_id == second.id
        assert told.cursor is not None
        assert read(events, target, told.cursor) == []
    (late,) = read(events, target, told.cursor)
    assert late.job_id == first.id
    assert read(events, target, late.cursor) == []


def test_several_are_read_for_in_one_statement_each_from_its_own_place(store: Store, events: Events) -> None:
    batches = [submit(store, 1) for _ in range(3)]
    for batch in batches:
        store.cancel_batch(batch.id)
    (job,) = store.batch_jobs(batches[2].id)
    end = read(events, Target(batch_id=batches[1].id))[-1].cursor
    assert end is not None
    asked = [
        (Target(batch_id=batches[0].id), Cursor()),
        (Target(batch_id=batches[1].id), end),
        (Target(job_id=job.id), Cursor()),
        (Target(batch_id=uuid4()), Cursor()),
    ]
    assert [len(news.events) for news in events.read(asked)] == [1, 0, 1, 0]


def test_a_batch_is_finished_once_nothing_of_it_waits_or_is_drawn(
    store: Store, events: Events, hand: Farmhand, leader: UUID
) -> None:
    batch = submit(store, 2)
    first, second = store.batch_jobs(batch.id)
    hand.succeed(first)
    claim = hand.claim(second)
    assert store.finish_batches(leader) == 0
    store.fail(claim, "invalid", "no")
    assert store.finish_batches(leader) == 1
    assert store.finish_batches(leader) == 0, "once"
    assert store.batch(batch.id).finished_at == store.job(second.id).finished_at
    finished = read(events, Target(batch_id=batch.id))[-1]
    assert finished.kind == "batch.finished"
    assert finished.data == {
        "name": "boats",
        "jobs": 2,
        "rejected": 0,
        "counts": {"queued": 0, "running": 0, "succeeded": 1, "failed": 1, "cancelled": 0},
    }


def test_a_retried_batch_is_open_again_and_finishes_again(store: Store, events: Events, leader: UUID) -> None:
    batch = submit(store, 1)
    store.cancel_batch(batch.id)
    assert store.finish_batches(leader) == 1
    store.retry_batch(batch.id, [State.CANCELLED])
    assert store.batch(batch.id).finished_at is None
    assert store.finish_batches(leader) == 0
    store.cancel_batch(batch.id)
    assert store.finish_batches(leader) == 1
    assert kinds(events, Target(batch_id=batch.id)) == [
        "job.cancelled", "batch.finished", "job.queued", "job.cancelled", "batch.finished",
    ]  # fmt: skip


def test_a_paused_batch_is_not_finished_and_one_that_only_holds_rejections_is(store: Store, leader: UUID) -> None:
    paused = submit(store, 1)
    store.pause_batch(paused.id, paused=True)
    rejected = store.submit_batch("bad", [Rejection(1, {}, "invalid", "no prompt")], max_failures=3)
    assert store.finish_batches(leader) == 1
    assert store.batch(paused.id).finished_at is None
    assert store.batch(rejected.id).finished_at is not None


def test_only_the_leader_finishes_batches(store: Store, leader: UUID) -> None:
    store.cancel_batch(submit(store, 1).id)
    assert store.finish_batches(uuid4()) == 0
    assert store.finish_batches(leader) == 1


def test_a_retry_that_is_under_way_is_not_overtaken_by_the_end_of_its_batch(store: Store, leader: UUID) -> None:
    batch = submit(store, 1)
    store.cancel_batch(batch.id)
    with store.database.begin() as retrying:
        retrying.execute(text("UPDATE jobs SET state = 'queued' WHERE batch_id = :id"), {"id": batch.id})
        retrying.execute(text("UPDATE batches SET finished_at = NULL WHERE id = :id"), {"id": batch.id})
        assert store.finish_batches(leader) == 0, "its row is locked: it is left for the next look"
    assert store.finish_batches(leader) == 0
    assert store.batch(batch.id).finished_at is None


def test_a_refused_input_is_a_batch_that_is_finished_at_once(store: Store, events: Events) -> None:
    batch = store.refuse_batch("bad", [{"line": 1, "message": "no JSON"}])
    assert kinds(events, Target(batch_id=batch.id)) == ["batch.finished"]


def test_the_progress_of_a_job_is_what_the_worker_that_holds_it_said_last(
    store: Store, events: Events, hand: Farmhand
) -> None:
    batch = submit(store, 2)
    first, second = store.batch_jobs(batch.id)
    hand.claim(first)
    hand.beat([{"job": str(job.id), "step": 3, "steps": 50} for job in (first, second)])
    for target in (Target(batch_id=batch.id), Target(job_id=first.id)):
        (progress,) = events.progress([target], lease_s=60)
        assert (progress.job_id, progress.batch_id, progress.step, progress.steps) == (first.id, batch.id, 3, 50)
    assert events.progress([Target(job_id=second.id), Target(batch_id=uuid4())], lease_s=60) == []
    assert events.progress([Target(job_id=first.id)], lease_s=0) == [], "a worker that is silent draws nothing"


def test_events_are_kept_for_some_days(store: Store, events: Events) -> None:
    old, new = submit(store, 3), submit(store, 1)
    store.cancel_batch(old.id)
    with store.database.single() as connection:
        connection.execute(text("UPDATE events SET at = now() - interval '7 days 1 minute'"))
    store.cancel_batch(new.id)
    assert [events.prune(most=2) for _ in range(3)] == [2, 1, 0]
    assert len(read(events, Target(batch_id=new.id))) == 1


def test_a_cursor_of_another_database_is_known_by_its_transactions(store: Store, events: Events) -> None:
    assert events.ahead(Cursor(2**62, 1))
    store.cancel_batch((batch := submit(store, 1)).id)
    cursor = read(events, Target(batch_id=batch.id))[0].cursor
    assert cursor is not None
    assert not events.ahead(cursor)
