"""A state machine over the store's transitions against real Postgres: any order of steps, stale and doubled ones too.

The model is what DESIGN.md says of a job, in a few lines of Python. After each step every row is compared with it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import text

from pipeline.request import ImageFormat
from producer.jobs.contract import (
    TRANSITIONS,
    Claim,
    Fence,
    Message,
    Outcome,
    Priority,
    Recorded,
    State,
    Submission,
    SubmissionKey,
)
from producer.jobs.errors import IllegalTransition, KeyReused, LostClaim
from producer.jobs.storage import checkpoint_key, object_key
from producer.jobs.store import Store
from tests.miscounted import MISCOUNTED

TENANTS = ("default", "another")
WORKERS = tuple(UUID(int=n) for n in (1, 2))
LEASE_S = 60.0
HOUR_S = 3600.0
COLUMNS = (
    "id, batch_id, state, claim, failures, max_failures, worker_id, suspect, drawn_alone, checkpoint_key,"
    " checkpoint_step, object_key"
)
A_CLAIM = st.tuples(st.integers(0, 4), st.integers(0, 50))
"""Picks one of those given: one time in five any, however old, else one that still holds if there is one."""
TABLES = "jobs, batches, tallies, lanes, tenants, submissions, claims, messages, workers, leader"


@dataclass(frozen=True)
class Modelled:
    """A job as it should be."""

    state: State = State.QUEUED
    claim: int = 0
    failures: int = 0
    worker_id: UUID | None = None
    suspect: bool = False
    drawn_alone: bool = False
    checkpoint_key: str | None = None
    checkpoint_step: int = 0
    object_key: str | None = None
    due: bool = True
    batch_id: UUID | None = None
    max_failures: int = 1

    def settled(self, *, charge: int, final: bool = False, due: bool = True) -> "Modelled":
        failed = final or (charge > 0 and self.failures + charge >= self.max_failures)
        kept = {} if charge == 0 else {"checkpoint_key": None, "checkpoint_step": 0}
        return replace(
            self,
            state=State.FAILED if failed else State.QUEUED,
            failures=self.failures + charge,
            worker_id=None,
            drawn_alone=False,
            due=due,
            **kept,
        )


class StoreMachine(RuleBasedStateMachine):
    """Everybody who speaks to the store, in any order."""

    store: Store

    jobs = Bundle("jobs")
    keys = Bundle("keys")
    messages = Bundle("messages")

    def __init__(self) -> None:
        super().__init__()
        self._sql(f"TRUNCATE {TABLES} CASCADE")
        self.model: dict[UUID, Modelled] = {}
        self.before: dict[UUID, Modelled] = {}
        self.window: set[Message] = set()
        self.outcomes: dict[Message, str | None] = {}
        self.given: list[Claim] = []
        self.leader = uuid4()
        assert self.store.lead(self.leader, leader_s=HOUR_S)
        for worker_id in WORKERS:
            self._beat(worker_id)

    @initialize(target=jobs, alone=st.booleans(), step=st.integers(0, 2))
    def a_farm_at_work(self, alone: bool, step: int) -> object:
        """Where the interesting begins: from nothing the machine seldom comes so far."""
        ids = [self.submit("default", Priority.BULK, max_failures) for max_failures in (1, 2, 2)]
        for job_id, worker_id in zip(ids, WORKERS, strict=False):
            self._draw(job_id, worker_id, alone, step)
        return multiple(*ids)

    # Producers and persons.

    @rule(
        target=jobs,
        tenant=st.sampled_from(TENANTS),
        priority=st.sampled_from(Priority),
        max_failures=st.integers(1, 2),
    )
    def submit(self, tenant: str, priority: Priority, max_failures: int) -> UUID:
        job = self.store.submit(_submission(priority), max_failures=max_failures, tenant=tenant)
        self.model[job.id] = Modelled(max_failures=max_failures)
        return job.id

    @rule(target=jobs, tenant=st.sampled_from(TENANTS), priorities=st.lists(st.sampled_from(Priority), max_size=3))
    def submit_batch(self, tenant: str, priorities: list[Priority]) -> object:
        rows = [_submission(priority) for priority in priorities]
        batch = self.store.submit_batch("b", rows, max_failures=1, tenant=tenant)
        ids = [job.id for job in self.store.batch_jobs(batch.id)]
        assert len(ids) == len(rows)
        self.model |= {job_id: Modelled(batch_id=batch.id) for job_id in ids}
        return multiple(*ids)

    @rule(target=keys, tenant=st.sampled_from(TENANTS))
    def submit_with_a_key(self, tenant: str) -> tuple[str, SubmissionKey, UUID]:
        key = SubmissionKey(str(uuid4()), "a" * 64)
        job = self.store.submit(_submission(), max_failures=1, tenant=tenant, key=key)
        self.model[job.id] = Modelled()
        return tenant, key, job.id

    @rule(target=jobs, kept=keys)
    def ask_again_with_the_key(self, kept: tuple[str, SubmissionKey, UUID]) -> UUID:
        tenant, key, job_id = kept
        again = self.store.submit(_submission(), max_failures=1, tenant=tenant, key=key)
        assert again.id == job_id
        other = replace(key, fingerprint="b" * 64)
        with pytest.raises(KeyReused):
            self.store.submit(_submission(), max_failures=1, tenant=tenant, key=other)
        return job_id

    @rule(job_id=jobs)
    def cancel(self, job_id: UUID) -> None:
        job = self.model[job_id]
        if job.state in (State.SUCCEEDED, State.FAILED):
            with pytest.raises(IllegalTransition):
                self.store.cancel(job_id)
        else:
            self.store.cancel(job_id)
            self._cancelled(job_id)

    @rule(job_id=jobs)
    def cancel_its_batch(self, job_id: UUID) -> None:
        batch_id = self.model[job_id].batch_id
        if batch_id is not None:
            self.store.cancel_batch(batch_id)
            for one, job in self.model.items():
                if job.batch_id == batch_id and not job.state.terminal:
                    self._cancelled(one)

    def _cancelled(self, job_id: UUID) -> None:
        job = self.model[job_id]
        if job.state is State.RUNNING:
            self.outcomes[Message(job_id, job.claim)] = Outcome.CANCELLED
        self.model[job_id] = replace(job, state=State.CANCELLED, checkpoint_key=None, checkpoint_step=0)
        self.window = {message for message in self.window if message.job_id != job_id}

    # Workers. Every claim that was ever given may write, at any time.

    @rule(message=messages, worker_id=st.sampled_from(WORKERS))
    def claim(self, message: Message, worker_id: UUID) -> None:
        self._claim(message, worker_id)

    def _claim(self, message: Message, worker_id: UUID) -> Claim | None:
        job = self.model[message.job_id]
        holds = job.state is State.QUEUED and job.claim == message.claim - 1 and job.due
        claim = self.store.claim(message, worker_id)
        assert (claim is not None) == holds
        if claim is None:
            return None
        assert (claim.checkpoint_key, claim.checkpoint_step) == (job.checkpoint_key, job.checkpoint_step)
        assert claim.suspect == job.suspect
        self.model[message.job_id] = replace(
            job, state=State.RUNNING, claim=message.claim, worker_id=worker_id, drawn_alone=False
        )
        self.window = {other for other in self.window if other.job_id != message.job_id}
        self.outcomes[message] = None
        self.given.append(claim)
        return claim

    @rule(job_id=jobs, worker_id=st.sampled_from(WORKERS), alone=st.booleans(), step=st.integers(0, 2))
    def take(self, job_id: UUID, worker_id: UUID, alone: bool, step: int) -> None:
        """The usual way into the midst of drawing, as a shortcut."""
        self._draw(job_id, worker_id, alone, step)

    def _draw(self, job_id: UUID, worker_id: UUID, alone: bool, step: int) -> None:
        self.publish_all()
        claim = self._claim(Message(job_id, self.model[job_id].claim + 1), worker_id)
        if claim is not None and alone:
            self.store.mark_alone(claim)
            self._change(claim, drawn_alone=True)
        if claim is not None and step:
            key = checkpoint_key(job_id, claim.claim, step)
            self.store.note_checkpoint(claim, key, step)
            self._change(claim, checkpoint_key=key, checkpoint_step=step)

    @precondition(lambda self: self.given)
    @rule(pick=A_CLAIM)
    def mark_alone(self, pick: tuple[int, int]) -> None:
        claim = self._picked(pick)
        if self._fenced(claim, lambda: self.store.mark_alone(claim)):
            self._change(claim, drawn_alone=True)

    @precondition(lambda self: self.given)
    @rule(pick=A_CLAIM, step=st.integers(1, 50))
    def note_checkpoint(self, pick: tuple[int, int], step: int) -> None:
        claim = self._picked(pick)
        key = checkpoint_key(claim.job_id, claim.claim, step)
        if self._fenced(claim, lambda: self.store.note_checkpoint(claim, key, step)):
            self._change(claim, checkpoint_key=key, checkpoint_step=step)

    @precondition(lambda self: self.given)
    @rule(pick=A_CLAIM)
    def record(self, pick: tuple[int, int]) -> None:
        claim = self._picked(pick)
        key = object_key(claim.batch_id, claim.job_id, claim.claim, ImageFormat.PNG)
        job = self.model[claim.job_id]
        if job.state is State.SUCCEEDED and job.claim == claim.claim:
            self.store.record(claim, _recorded(key))  # asked twice: recorded once
        elif self._fenced(claim, lambda: self.store.record(claim, _recorded(key))):
            self._change(claim, state=State.SUCCEEDED, object_key=key, checkpoint_key=None, checkpoint_step=0)
            self.outcomes[claim.message] = Outcome.SUCCEEDED

    @precondition(lambda self: self.given)
    @rule(pick=A_CLAIM)
    def fail(self, pick: tuple[int, int]) -> None:
        claim = self._picked(pick)
        if self._fenced(claim, lambda: self.store.fail(claim, "x", "y")):
            self._settled(claim, Outcome.FAILED, charge=1, final=True)

    @precondition(lambda self: self.given)
    @rule(pick=A_CLAIM, delay_s=st.sampled_from([0.0, HOUR_S]))
    def retry(self, pick: tuple[int, int], delay_s: float) -> None:
        claim = self._picked(pick)
        if self._fenced(claim, lambda: self.store.retry(claim, "x", "y", delay_s=delay_s)):
            self._settled(claim, Outcome.RETRIED, charge=1, due=delay_s == 0)

    @precondition(lambda self: self.given)
    @rule(pick=A_CLAIM)
    def give_back(self, pick: tuple[int, int]) -> None:
        claim = self._picked(pick)
        if self._fenced(claim, lambda: self.store.give_back(claim)):
            self._settled(claim, Outcome.DRAINED, charge=0)

    def _picked(self, pick: tuple[int, int]) -> Claim:
        holding = [claim for claim in self.given if self._holds(claim)]
        among = holding if pick[0] and holding else self.given
        return among[pick[1] % len(among)]

    def _holds(self, fence: Fence) -> bool:
        job = self.model[fence.job_id]
        return job.state is State.RUNNING and (job.claim, job.worker_id) == (fence.claim, fence.worker_id)

    def _fenced(self, fence: Fence, write: Callable[[], None]) -> bool:
        """Whether the write was let through; it must be exactly if the claim still holds."""
        holds = self._holds(fence)
        if holds:
            write()
        else:
            with pytest.raises(LostClaim):
                write()
        return holds

    def _change(self, fence: Fence, **changes: object) -> None:
        self.model[fence.job_id] = replace(self.model[fence.job_id], **changes)  # type: ignore[arg-type]

    def _settled(self, claim: Claim, outcome: Outcome, *, charge: int, final: bool = False, due: bool = True) -> None:
        job = self.model[claim.job_id] = self.model[claim.job_id].settled(charge=charge, final=final, due=due)
        self.outcomes[claim.message] = Outcome.FAILED if job.state is State.FAILED else outcome

    # The leader, and time.

    @rule(target=messages, most=st.integers(1, 3))
    def publish(self, most: int) -> object:
        found = self.store.next_messages(self.leader, {lane.id: most for lane in self.store.lanes()})
        for one in found:
            job = self.model[one.message.job_id]
            assert job.state is State.QUEUED
            assert job.due
            assert one.message.claim == job.claim + 1
            assert one.message not in self.window
        self.window |= {one.message for one in found}
        return multiple(*(one.message for one in found))

    @rule()
    def publish_all(self) -> None:
        """No queued job is out of the dispatcher's reach."""
        found = self.store.next_messages(self.leader, {lane.id: 1000 for lane in self.store.lanes()})
        published = {message.job_id for message in self.window}
        reachable = {job_id for job_id, job in self.model.items() if job.state is State.QUEUED and job.due}
        assert {one.message.job_id for one in found} == reachable - published
        self.window |= {one.message for one in found}

    @rule(target=messages)
    def audit(self) -> object:
        """What Redis should hold, and nothing else."""
        self.window = {
            message
            for message in self.window
            if (job := self.model[message.job_id]).state is State.QUEUED and job.claim == message.claim - 1
        }
        overdue = self.store.overdue_messages(self.leader, audit_s=-1)
        assert {one.message for one in overdue} == self.window
        self.store.republishing(self.leader, [one.message for one in overdue])
        return multiple(*(one.message for one in overdue))

    @rule()
    def fold_tallies(self) -> None:
        self.store.fold_tallies(self.leader)

    @rule()
    def close_lanes(self) -> None:
        self.store.close_lanes(self.leader, [lane.id for lane in self.store.lanes()])

    @rule(worker_id=st.sampled_from(WORKERS))
    def a_worker_falls_silent(self, worker_id: UUID) -> None:
        self._sql("UPDATE workers SET heartbeat_at = now() - interval '1 day' WHERE id = :id", id=worker_id)
        told = dict(self.store.reclaim(self.leader, lease_s=LEASE_S))
        lost = {
            job_id for job_id, job in self.model.items() if job.worker_id == worker_id and job.state == State.RUNNING
        }
        assert told.keys() == lost
        for job_id in lost:
            job = self.model[job_id]
            self.outcomes[Message(job_id, job.claim)] = Outcome.LEASE_LOST
            after = replace(job.settled(charge=int(job.drawn_alone)), suspect=True, due=job.due)
            kept = {} if after.state is State.FAILED else {
                "checkpoint_key": job.checkpoint_key, "checkpoint_step": job.checkpoint_step
            }  # fmt: skip
            self.model[job_id] = replace(after, **kept)  # type: ignore[arg-type]
            assert told[job_id] is after.state
        self._beat(worker_id)

    @rule()
    def an_hour_passes(self) -> None:
        self._sql("UPDATE jobs SET not_before = not_before - interval '2 hours'")
        self.model = {job_id: replace(job, due=True) for job_id, job in self.model.items()}

    @rule()
    def sweep(self) -> None:
        """It takes nothing that a row points to or that a claim may still come to point to."""
        keys = {}
        for message in self.outcomes:
            batch_id = self.model[message.job_id].batch_id
            keys[object_key(batch_id, message.job_id, message.claim, ImageFormat.PNG)] = message
            keys[checkpoint_key(message.job_id, message.claim, 7)] = message
        kept = {key for job in self.model.values() for key in (job.object_key, job.checkpoint_key)}
        running = {
            key for key, message in keys.items()
            if (job := self.model[message.job_id]).state is State.RUNNING and job.claim == message.claim
        }  # fmt: skip
        assert set(self.store.sweepable(list(keys))) == keys.keys() - kept - running

    # What holds after every step.

    @invariant()
    def rows_are_as_the_model_says(self) -> None:
        rows = self._rows(f"SELECT {COLUMNS}, not_before <= now() AS due FROM jobs")
        found = {row.pop("id"): Modelled(**{**row, "state": State(row["state"])}) for row in rows}
        for job_id, job in found.items():
            if job.state is State.SUCCEEDED:
                found[job_id] = replace(job, worker_id=self.model[job_id].worker_id)
            if job.state is State.CANCELLED:
                expected = self.model[job_id]
                found[job_id] = replace(job, worker_id=expected.worker_id, drawn_alone=expected.drawn_alone)
        assert found == self.model

    @invariant()
    def states_move_only_as_they_may_and_claims_only_grow(self) -> None:
        for job_id, before in self.before.items():
            now = self.model[job_id]
            assert now.state == before.state or now.state in TRANSITIONS[before.state]
            assert now.claim >= before.claim
        self.before = dict(self.model)

    @invariant()
    def each_claim_has_one_end_and_each_job_one_success_at_most(self) -> None:
        rows = self._rows("SELECT job_id, claim, outcome, ended_at IS NULL AS open FROM claims")
        assert {Message(row["job_id"], row["claim"]): row["outcome"] for row in rows} == self.outcomes
        assert all(row["open"] == (row["outcome"] is None) for row in rows)
        winners = [row["job_id"] for row in rows if row["outcome"] == Outcome.SUCCEEDED]
        assert len(winners) == len(set(winners))

    @invariant()
    def the_lane_of_a_queued_job_is_open(self) -> None:
        assert not self._rows("SELECT 1 FROM jobs JOIN lanes ON lanes.id = lane_id WHERE state = 'queued' AND NOT open")

    @invariant()
    def messages_are_for_queued_jobs(self) -> None:
        rows = self._rows("SELECT messages.job_id, messages.claim FROM messages")
        assert {Message(row["job_id"], row["claim"]) for row in rows} == self.window

    @invariant()
    def the_tallies_are_what_a_count_finds(self) -> None:
        assert not self._rows(MISCOUNTED)

    def _beat(self, worker_id: UUID) -> None:
        row = {"host": "h", "pid": 1, "device": "cpu", "model": "m", "revision": "r", "version": "0", "capacity": 1}
        self.store.beat(worker_id, row, "[]")

    def _sql(self, statement: str, **values: object) -> None:
        with self.store._begin() as connection:
            connection.execute(text(statement), values)

    def _rows(self, statement: str) -> "list[dict[str, object]]":
        with self.store._begin() as connection:
            return [dict(row) for row in connection.execute(text(statement)).mappings()]


def _submission(priority: Priority = Priority.STANDARD) -> Submission:
    return Submission(prompt="a", priority=priority)


def _recorded(key: str) -> Recorded:
    return Recorded(
        object_key=key, sha256="00" * 32, size_bytes=10, width_px=64, height_px=64, format=ImageFormat.PNG,
        drawing_s=1.0, encoding_s=0.1, uploading_s=0.1, warnings=[],
    )  # fmt: skip


def test_whatever_the_order_of_steps_rows_are_as_the_design_says(store: Store) -> None:
    machine = type("Machine", (StoreMachine,), {"store": store})
    run_state_machine_as_test(
        machine,
        settings=hypothesis_settings(
            max_examples=20, stateful_step_count=30, deadline=None, database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
