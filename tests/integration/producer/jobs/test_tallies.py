from collections.abc import Sequence
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.exc import ProgrammingError

from producer.jobs.contract import Entry, Priority, State, Submission
from producer.jobs.estimate import estimate
from producer.jobs.lines import LineCounts, Lines
from producer.jobs.postgres import Database
from producer.jobs.store import Store
from tests.miscounted import MISCOUNTED

A, B = Submission(prompt="a"), Submission(prompt="b", steps=20)


def rows(database: Database, statement: str) -> Sequence[Any]:
    with database.begin() as connection:
        return connection.execute(text(statement)).all()


def tallies(store: Store) -> int:
    return len(rows(store.database, "SELECT FROM tallies"))


def test_folding_leaves_one_row_a_batch_priority_and_state_and_changes_no_sum(store: Store, leader: UUID) -> None:
    batch = store.submit_batch("b", [A, B, A], max_failures=3)
    for job in store.batch_jobs(batch.id)[:2]:
        store.cancel(job.id)
    before, farm = store.batch(batch.id), store.farm(lease_s=10).counts
    assert before.counts == {**dict.fromkeys(State, 0), State.QUEUED: 1, State.CANCELLED: 2}
    assert tallies(store) == 10
    assert store.fold_tallies(uuid4()) == 0, "only the leader does"
    assert [store.fold_tallies(leader) for _ in range(2)] == [10, 0]
    assert tallies(store) == 4, "queued and cancelled, of the batch and of the tenant"
    assert (store.batch(batch.id), store.farm(lease_s=10).counts) == (before, farm)
    store.cancel_batch(batch.id)
    assert store.fold_tallies(leader) == 4
    assert tallies(store) == 2
    assert not rows(store.database, MISCOUNTED)


def test_what_comes_while_the_tallies_are_folded_is_counted_once(store: Store, leader: UUID) -> None:
    batch = store.submit_batch("b", [A, B], max_failures=3)
    first, second = store.batch_jobs(batch.id)
    store.cancel(first.id)
    with store.database.begin() as late:
        late.execute(text("UPDATE jobs SET state = 'cancelled' WHERE id = :id"), {"id": second.id})
        store.fold_tallies(leader)
        folded = tallies(store)
    assert store.batch(batch.id).counts[State.CANCELLED] == 2
    store.fold_tallies(leader)
    assert (folded, tallies(store)) == (4, 2)
    assert not rows(store.database, MISCOUNTED)


def test_a_leader_that_is_one_no_more_folds_nothing_twice(store: Store, leader: UUID) -> None:
    batch = store.submit_batch("b", [A, B], max_failures=3)
    store.cancel(store.batch_jobs(batch.id)[0].id)
    with store.database.begin() as frozen:
        held = text("SELECT FROM tallies WHERE state = 'queued' AND NOT folded FOR UPDATE")
        frozen.execute(held)
        assert store.fold_tallies(leader) == 2, "it waits for nobody's rows"
    assert store.fold_tallies(leader) == 4
    assert not rows(store.database, MISCOUNTED)


def test_a_deleted_batch_leaves_no_tally(store: Store, leader: UUID) -> None:
    batch = store.submit_batch("b", [A, B], max_failures=3)
    store.submit(A, max_failures=3)
    store.delete_batch(batch.id)
    store.fold_tallies(leader)
    assert rows(store.database, "SELECT batch_id, state, jobs FROM tallies") == [(None, "queued", 1)]


def test_a_batch_that_gets_another_priority_is_tallied_there(store: Store) -> None:
    batch = store.submit_batch("b", [A, B], max_failures=3)
    store.cancel(store.batch_jobs(batch.id)[0].id)
    store.prioritise_batch(batch.id, Priority.BULK)
    (backlog,) = store.backlog()
    assert (backlog["priority"], backlog["waiting"], backlog["running"]) == ("bulk", 1, 0)
    assert not rows(store.database, MISCOUNTED)


def test_the_backlog_tells_of_each_priority_what_waits_what_is_delayed_and_since_when(store: Store) -> None:
    store.submit_batch("b", [Submission(prompt="a", priority=Priority.BULK)] * 3, max_failures=3)
    old, delayed = (store.submit(A, max_failures=3) for _ in range(2))
    with store.database.begin() as connection:
        changed = "UPDATE jobs SET created_at = now() - interval '1 hour', not_before = created_at WHERE id = :id"
        connection.execute(text(changed), {"id": old.id})
        connection.execute(
            text("UPDATE jobs SET not_before = now() + interval '1 hour' WHERE id = :id"), {"id": delayed.id}
        )
    found = {row["priority"]: row for row in store.backlog()}
    assert [tuple(found[name].values())[1:4] for name in ("standard", "bulk")] == [(1, 1, 0), (3, 0, 0)]
    assert found["standard"]["oldest_waiting_s"] == pytest.approx(3600, abs=60)
    assert found["bulk"]["oldest_waiting_s"] < 60


def test_steps_that_leave_the_state_leave_no_tally(store: Store) -> None:
    job = store.submit(A, max_failures=3)
    before = tallies(store)
    rows_changed = text("UPDATE jobs SET name = 'other' WHERE id = :id")
    with store.database.begin() as connection:
        connection.execute(rows_changed, {"id": job.id})
    assert tallies(store) == before


def test_a_tenant_is_told_its_own_counts_and_writes_none(store: Store) -> None:
    store.submit(A, max_failures=3, tenant="acme")
    job = store.submit(A, max_failures=3, tenant="other")
    acme, other = store.of("acme"), store.of("other")
    assert acme.farm(lease_s=10).counts[State.QUEUED] == 1
    other.cancel(job.id)
    assert other.farm(lease_s=10).counts == {**dict.fromkeys(State, 0), State.CANCELLED: 1}
    with pytest.raises(ProgrammingError, match="permission denied"):
        rows(
            acme.database,
            "INSERT INTO tallies (tenant, priority, state, jobs, pixel_steps) VALUES ('acme', 1, 'queued', 9, 9)",
        )


def test_a_line_of_several_images_is_one_line(store: Store) -> None:
    entries = [Entry(A, 1, {}), Entry(B, 1, {}), Entry(A, 2, {})]
    batch = store.submit_batch("b", entries, max_failures=3, file_id="file-1")
    single = store.submit_batch("s", [A, B], max_failures=3)
    assert (batch.lines, batch.jobs, single.lines) == (2, 3, 2)
    store.cancel(store.batch_jobs(batch.id)[0].id)
    store.cancel(store.batch_jobs(single.id)[0].id)
    counted = Lines(store.database).counts([store.batch(batch.id), store.batch(single.id)])
    assert counted == {batch.id: LineCounts(2, 0, 0), single.id: LineCounts(2, 0, 1)}


def test_batches_end_when_their_last_job_does(store: Store, leader: UUID) -> None:
    batches = [store.submit_batch("b", [A, B], max_failures=3) for _ in range(3)]
    for batch in batches:
        store.cancel_batch(batch.id)
    store.fold_tallies(leader)
    assert [store.finish_batches(leader) for _ in range(2)] == [3, 0]
    for batch in batches:
        assert store.batch(batch.id).finished_at == store.batch_jobs(batch.id)[-1].finished_at


def test_an_estimate_counts_its_part_beside_what_is_queued_alone_or_in_batches_but_not_in_a_paused_one(
    store: Store,
) -> None:
    large = Submission(prompt="a", width=1024, height=1024, steps=50)  # some 14 s on the assumed device
    one_s = estimate(store.database, large.work, lease_s=10).gpu_s

    def images_s(images: int) -> float:
        asked = estimate(store.database, images * large.work, lease_s=10)
        assert asked.finishes_at
        return round((asked.finishes_at - store.farm(lease_s=10).at).total_seconds() / one_s)

    assert images_s(5) == 5
    store.submit(large, max_failures=3)
    assert images_s(5) == 6
    batch = store.submit_batch("b", [large] * 10, max_failures=3)
    assert images_s(5) == 11
    assert images_s(40) == 51
    store.pause_batch(batch.id, paused=True)
    assert store.farm(lease_s=10).paused == 10
    assert images_s(5) == 6
