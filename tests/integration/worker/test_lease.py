"""The lease against a real Postgres: what happens when the table and the worker think differently of a claim."""

import time
from collections.abc import Iterator
from uuid import UUID, uuid4

import pytest

from producer.jobs.contract import Job, Message, State, Submission
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
def lease(settings: Settings, store: Store, worker_id: UUID, lost: list[Message]) -> Iterator[Lease]:
    lease = Lease(store, worker_id, DESCRIPTION, settings.durations, Outages(), drawing=list, on_lost=lost.append)
    lease.start()
    yield lease
    lease.stop()


def submit(store: Store) -> Job:
    return store.submit(Submission(prompt="a"), max_failures=3)


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
