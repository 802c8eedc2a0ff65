"""The lease against a real Postgres: what happens when the table and the worker think differently of a claim."""

import time
from collections.abc import Iterator
from uuid import UUID, uuid4

import pytest

from pipeline.engine import Progress
from producer.jobs.contract import Job, Message, Priority, State, Submission
from producer.jobs.settings import Settings
from producer.jobs.store import Store
from tests.waiting import until
from worker.lease import Lease
from worker.outages import Outages

DESCRIPTION = {"host": "h", "pid": 1, "device": "cpu", "model": "m", "revision": "r", "version": "0", "capacity": 1}


@pytest.fixture
def worker_id() -> UUID:
    return uuid4()


@pytest.fixture
def lost() -> list[Message]:
    return []


@pytest.fixture
def gave_way() -> list[Message]:
    return []


@pytest.fixture
def drawn() -> dict[Message, Progress]:
    """What the device tells of its work."""
    return {}


@pytest.fixture
def lease(
    settings: Settings, store: Store, worker_id: UUID,
    drawn: dict[Message, Progress], lost: list[Message], gave_way: list[Message],
) -> Iterator[Lease]:  # fmt: skip
    lease = Lease(
        store, worker_id, DESCRIPTION, settings.durations, Outages(),
        progress=lambda: drawn, on_lost=lost.append, make_room=gave_way.append,
    )  # fmt: skip
    lease.start()
    yield lease
    lease.stop()


def submit(store: Store, priority: str = "standard") -> Job:
    return store.submit(Submission(prompt="a", priority=Priority(priority)), max_failures=3)


def test_a_claim_whose_answer_was_lost_goes_back_to_the_queue(store: Store, lease: Lease, worker_id: UUID) -> None:
    job = submit(store)
    assert store.claim(Message(job.id, 1), worker_id) is not None  # and nobody holds it
    until(lambda: store.job(job.id).state is State.QUEUED)
    assert (store.job(job.id).failures, store.history(job.id)[0]["outcome"]) == (0, "drained")


def test_a_claim_that_is_held_stays(store: Store, lease: Lease, worker_id: UUID, settings: Settings) -> None:
    job = submit(store)
    claim = store.claim(Message(job.id, 1), worker_id)
    assert claim is not None
    with lease.holding(claim):
        time.sleep(5 * settings.durations.claim_check_s)
        assert store.job(job.id).state is State.RUNNING
        assert not lease.lost(claim)
        store.cancel(job.id)
        until(lambda: lease.lost(claim))


def test_who_holds_a_cancelled_claim_is_told_until_it_lets_go(
    store: Store, lease: Lease, worker_id: UUID, lost: list[Message]
) -> None:
    job = submit(store)
    claim = store.claim(Message(job.id, 1), worker_id)
    assert claim is not None
    with lease.holding(claim):
        store.cancel(job.id)
        until(lambda: len(lost) >= 2)
    assert set(lost) == {claim.message}


@pytest.mark.parametrize(
    ("held", "is_drawn", "waits", "gives_way"),
    [
        ("bulk", True, "interactive", True),
        ("bulk", True, "standard", True),
        ("bulk", True, "bulk", False),
        ("standard", True, "bulk", False),
        ("bulk", False, "interactive", False),
    ],
)
def test_a_full_worker_gives_way_to_what_is_more_urgent_and_waits(
    store: Store, lease: Lease, drawn: dict[Message, Progress], gave_way: list[Message], worker_id: UUID,
    settings: Settings, held: str, is_drawn: bool, waits: str, gives_way: bool,
) -> None:  # fmt: skip
    leader = uuid4()
    assert store.lead(leader, leader_s=600)
    claim = store.claim(Message(submit(store, held).id, 1), worker_id)
    assert claim is not None
    if is_drawn:  # else its image waits to be stored, and no place of the device would become free
        drawn[claim.message] = Progress(1, 2)
    with lease.holding(claim):
        submit(store, waits)
        time.sleep(3 * settings.durations.claim_check_s)
        assert not gave_way, "nobody was asked to take it yet"
        assert store.next_messages(leader, {lane.id: 1 for lane in store.lanes()})
        if gives_way:
            until(lambda: gave_way)
        time.sleep(3 * settings.durations.claim_check_s)
    assert set(gave_way) == ({claim.message} if gives_way else set())
