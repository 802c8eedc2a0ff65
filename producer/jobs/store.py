"""The jobs' way in SQL, from submission to record. Other nouns of the farm have files of their own beside this one;
SQL stands in no other folder.

Invariants that the statements keep, whoever calls them and whatever dies in between:

- a job's state moves only along ``contract.TRANSITIONS``, each move one conditional UPDATE;
- every write of a worker is fenced by job, claim and worker: it changes the row or raises ``LostClaim``;
- a row of ``messages`` exists only for a queued job and its next claim;
- a lane that holds a queued job is open: whoever queues one writes the lane's row in the same transaction, and the
  leader closes a lane only after it has locked that row and looked again;
- no transaction is open while anything is drawn, encoded or uploaded; times are the database's clock.

Every method raises ``Unavailable`` when Postgres does not answer, and the caller may simply ask again. A claim may
then stand though its answer was lost: asked again it looks like a duplicate, and the worker's claim check
(``worker.lease``) gives the job back.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import UUID, uuid4

import psycopg
from psycopg.types.json import Json
from sqlalchemy import Connection, text

from producer.jobs.contract import (
    DEFAULT_TENANT,
    RETRIED,
    Batch,
    Claim,
    Entry,
    Farm,
    Fence,
    Job,
    Lane,
    Message,
    Next,
    Outcome,
    Outgoing,
    Priority,
    Recorded,
    Rejection,
    Standing,
    State,
    Submission,
    SubmissionKey,
    Tenant,
    Window,
    Worker,
)
from producer.jobs.errors import (
    IllegalTransition,
    LostClaim,
    NotFound,
)
from producer.jobs.limits import Allowance
from producer.jobs.postgres import Database, reaching
from producer.jobs.submitting import (
    COMPLETE_BATCH,
    INSERT_BATCH,
    REFUSE_BATCH,
    SHARE_DRAWN,
    Destination,
    batch_lanes,
    came_before,
    copy_jobs,
    drawn_before,
    insert_rejections,
    single_lane,
    without_rejections,
)
from producer.jobs.table import jobs as jobs_table
from producer.jobs.tallies import BATCH_COUNTS, BATCH_OPEN, FARM_COUNTS

CHANNEL = "ovis_jobs"
"""Notified by every commit that queues a job."""


class Store:
    """The farm's Postgres, as producers, dispatcher and workers use it. Safe to share between threads."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self._begin = database.begin
        self._single = database.single

    @classmethod
    def at(cls, database_url: str, *, connections: int = 5, ping: bool = True) -> "Store":
        return cls(Database.at(database_url, connections=connections, ping=ping))

    def of(self, tenant: str) -> "Store":
        """The same, for which no other tenant's jobs are there."""
        return Store(self.database.of(tenant))

    def close(self) -> None:
        self.database.close()

    def ping(self) -> None:
        """Return if Postgres answers."""
        with self._single() as connection:
            connection.execute(text("SELECT 1"))

    def schema_revision(self) -> str | None:
        """The migration that the database is at, None if it is empty. ``schema.compare`` says whether it fits."""
        with self._single() as connection:
            if connection.scalar(text("SELECT to_regclass('alembic_version')")) is None:
                return None
            revision: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
            return revision

    # Submission: the commit is the promise.

    def submit(
        self,
        submission: Submission,
        *,
        max_failures: int,
        tenant: str = DEFAULT_TENANT,
        key: SubmissionKey | None = None,
        deduplicate: bool = False,
        previews: int = 0,
    ) -> Job:
        """Insert one job, alone. A ``key`` that came before gives the job of then. Raises: KeyReused, Overloaded.

        ``previews`` unfinished pictures are wanted on the way, 0 to 3.
        ``deduplicate``: if the tenant has the very image already, its job is the answer, and nothing is inserted.
        """
        with self._begin() as connection:
            drawn = drawn_before(connection, submission, tenant) if deduplicate else None
            job_id = drawn or uuid4()
            earlier = came_before(connection, tenant, key, job_id=job_id)
            if earlier is None and drawn is None:
                allowance = Allowance(connection, tenant)
                lanes = {submission.priority: single_lane(connection, tenant, submission.priority)}
                to = Destination(tenant, None, lanes, max_failures, previews)
                copy_jobs(connection, to, [submission], [job_id])
                allowance.settle(1)
                _notify(connection)
        return self.job(job_id if earlier is None else earlier.job_id)

    def submit_batch(
        self,
        name: str,
        entries: Iterable[Submission | Entry | Rejection],
        *,
        max_failures: int,
        tenant: str = DEFAULT_TENANT,
        weight: float = 1.0,
        key: SubmissionKey | None = None,
        deduplicate: bool = False,
        file_id: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Batch:
        """Insert a batch and its jobs in one transaction: all of them or none.

        ``entries`` is read once, row by row, so it may be a generator over a large file; an exception that it raises
        undoes everything and passes on. Rejections are held in memory until the jobs are in. A ``key`` that came
        before gives the batch of then, and reads nothing.

        Raises: KeyReused, Overloaded, TooManyJobs, TooManyRejections.

        ``deduplicate``: what the tenant has drawn already is not drawn again; such jobs have succeeded at once, with
        the image of the other (``Job.copy_of``).
        """
        batch_id = uuid4()
        with self._begin() as connection:
            earlier = came_before(connection, tenant, key, batch_id=batch_id)
            if earlier is None:
                allowance = Allowance(connection, tenant)
                connection.execute(text("SET LOCAL statement_timeout = 0"))
                batch = {"id": batch_id, "tenant": tenant, "name": name, "weight": weight, "file": file_id}
                connection.execute(INSERT_BATCH, batch | {"metadata": Json(dict(metadata or {}))})
                lanes = batch_lanes(connection, tenant, batch_id)
                rejections: list[Rejection] = []
                good = without_rejections(entries, rejections)
                if not deduplicate:  # else nobody knows yet how many will wait
                    good = allowance.within(good)
                count, lines = copy_jobs(connection, Destination(tenant, batch_id, lanes, max_failures), good)
                insert_rejections(connection, tenant, batch_id, rejections)
                counts = {"jobs": count, "lines": lines, "rejected": len(rejections)}
                connection.execute(COMPLETE_BATCH, {"id": batch_id, **counts})
                if deduplicate:
                    connection.execute(SHARE_DRAWN, {"batch": batch_id, "tenant": tenant})
                allowance.settle(count)
                _notify(connection)
        return self.batch(batch_id if earlier is None else earlier.batch_id)

    def refuse_batch(
        self,
        name: str,
        refused: Sequence[Mapping[str, Any]],
        *,
        tenant: str = DEFAULT_TENANT,
        key: SubmissionKey | None = None,
        file_id: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Batch:
        """Insert a batch that holds no job, and why: its whole input was refused. A ``key`` that came before gives the
        batch of then. Raises: KeyReused."""
        batch_id = uuid4()
        batch = {"id": batch_id, "tenant": tenant, "name": name, "weight": 1.0, "file": file_id}
        values = batch | {"metadata": Json(dict(metadata or {})), "refused": Json([dict(fault) for fault in refused])}
        with self._begin() as connection:
            earlier = came_before(connection, tenant, key, batch_id=batch_id)
            if earlier is None:
                connection.execute(REFUSE_BATCH, values)
        return self.batch(batch_id if earlier is None else earlier.batch_id)

    # Reading.

    def job(self, job_id: UUID) -> Job:
        """Raises: NotFound."""
        with self._begin() as connection:
            row = (
                connection.execute(text(f"SELECT {JOB_COLUMNS} FROM jobs WHERE id = :id"), {"id": job_id})
                .mappings()
                .first()
            )
        if row is None:
            raise NotFound("job", job_id)
        return job_of(row)

    def standings(self, job_ids: Sequence[UUID]) -> dict[UUID, Standing]:
        """Where these jobs are; one that does not exist is left out."""
        statement = text("SELECT id, state, preview_key FROM jobs WHERE id = ANY(:ids)")
        with self._single() as connection:
            rows = connection.execute(statement, {"ids": list(job_ids)})
            return {row.id: Standing(State(row.state), row.preview_key) for row in rows}

    def batch(self, batch_id: UUID) -> Batch:
        """Raises: NotFound."""
        with self._begin() as connection:
            found = batches_where(connection, "WHERE b.id = :id", {"id": batch_id})
        if not found:
            raise NotFound("batch", batch_id)
        return found[0]

    def batches(self, limit: int = 20, *, after: UUID | None = None) -> list[Batch]:
        """The newest batches first, those behind ``after``."""
        which = """
            WHERE CAST(:after AS uuid) IS NULL
               OR (b.created_at, b.id) < (SELECT created_at, id FROM batches WHERE id = :after)
            ORDER BY b.created_at DESC, b.id DESC LIMIT :limit
        """
        with self._begin() as connection:
            return batches_where(connection, which, {"limit": limit, "after": after})

    def batch_jobs(
        self, batch_id: UUID, *, after: int = -1, limit: int = 1000, state: State | None = None
    ) -> list[Job]:
        """The batch's jobs in the order of submission, those behind position ``after``. Raises: NotFound."""
        statement = text(
            f"""
            SELECT {JOB_COLUMNS} FROM jobs
            WHERE batch_id = :batch AND position > :after AND (CAST(:state AS text) IS NULL OR state = :state)
            ORDER BY position LIMIT :limit
            """
        )
        values = {"batch": batch_id, "after": after, "limit": limit, "state": state}
        with self._begin() as connection:
            rows = connection.execute(statement, values).mappings().all()
            if not rows and not connection.scalar(
                text("SELECT count(*) FROM batches WHERE id = :id"), {"id": batch_id}
            ):
                raise NotFound("batch", batch_id)
        return [job_of(row) for row in rows]

    def last_failures(self, limit: int = 10) -> list[Job]:
        """The jobs that failed last, newest first."""
        return self._by_end("failed", limit)

    def last_images(self, limit: int = 12) -> list[Job]:
        """The jobs that succeeded last, newest first."""
        return self._by_end("succeeded", limit)

    def _by_end(self, state: str, limit: int) -> list[Job]:
        statement = text(
            f"SELECT {JOB_COLUMNS} FROM jobs WHERE state = :state AND finished_at IS NOT NULL"
            " ORDER BY finished_at DESC LIMIT :limit"
        )
        with self._begin() as connection:
            rows = connection.execute(statement, {"state": state, "limit": limit}).mappings().all()
        return [job_of(row) for row in rows]

    def history(self, job_id: UUID) -> list[dict[str, Any]]:
        """The job's claims, first to last: when, where, how each ended."""
        statement = text(
            """
            SELECT c.claim, c.worker_id, w.host, w.device, c.claimed_at, c.ended_at, c.outcome, c.error
            FROM claims c LEFT JOIN workers w ON w.id = c.worker_id WHERE c.job_id = :id ORDER BY c.claim
            """
        )
        with self._begin() as connection:
            return [dict(row) for row in connection.execute(statement, {"id": job_id}).mappings()]

    def farm(self, *, lease_s: float) -> Farm:
        """The whole farm at one moment. Workers that ended in order are left out; silent ones stay for an hour.

        A tenant is told all workers, and of what they draw its own jobs.
        """
        with self._begin() as connection:
            row = connection.execute(_FARM).mappings().one()
            workers = [dict(worker) for worker in connection.execute(_WORKERS, {"lease": lease_s}).mappings()]
            if self.database.tenant is not None:
                _keep_own_drawing(connection, workers)
        return Farm(
            at=row["at"],
            counts={state: row["counts"].get(state.value, 0) for state in State},
            paused=row["paused"],
            oldest_queued_s=row["oldest_queued_s"],
            images_last_minute=row["images_last_minute"],
            published=row["published"],
            workers=[Worker(**worker) for worker in workers],
        )

    def backlog(self) -> list[dict[str, Any]]:
        """The view ``ops_backlog``: for each priority with open jobs how many wait, are delayed, and run."""
        with self._begin() as connection:
            return [dict(row) for row in connection.execute(text("SELECT * FROM ops_backlog")).mappings()]

    def tenants(self) -> list[Tenant]:
        """Those that were given a weight or a limit."""
        with self._begin() as connection:
            rows = connection.execute(text(f"SELECT {_TENANT_COLUMNS} FROM tenants ORDER BY name")).mappings()
            return [Tenant(**row) for row in rows]

    def rejections(self, batch_id: UUID, *, after: int = 0, limit: int = 1000) -> list[Rejection]:
        """The lines of the batch's input that became no job, in their order, behind line ``after``."""
        statement = text(
            """
            SELECT line, source, code, message, field FROM rejections
            WHERE batch_id = :batch AND line > :after ORDER BY line LIMIT :limit
            """
        )
        with self._begin() as connection:
            rows = connection.execute(statement, {"batch": batch_id, "after": after, "limit": limit}).mappings()
            return [Rejection(**row) for row in rows]

    # A person's steps.

    def set_tenant(self, name: str, changes: Mapping[str, float | None]) -> Tenant:
        """Change what is named of the tenant's weight and limits (fields of ``Tenant``); None takes a limit away."""
        changed = ", ".join(f"{field} = :{field}" for field in Tenant.model_fields if field in changes)
        statement = f"UPDATE tenants SET {changed or 'name = name'} WHERE name = :name RETURNING {_TENANT_COLUMNS}"
        with self._begin() as connection:
            connection.execute(_MAKE_TENANT, {"name": name})
            return Tenant(**connection.execute(text(statement), {**changes, "name": name}).mappings().one())

    def cancel(self, job_id: UUID) -> Job:
        """Cancel a queued or running job. Cancelling it twice is one cancel. Raises: NotFound, IllegalTransition."""
        with self._single() as connection:
            connection.execute(_CANCEL, {"job": job_id, "batch": None})
        job = self.job(job_id)
        if job.state is not State.CANCELLED:
            raise IllegalTransition(job_id, job.state, State.CANCELLED)
        return job

    def cancel_batch(self, batch_id: UUID) -> Batch:
        """Cancel all of a batch that has not ended; what has, stays. Raises: NotFound."""
        with self._begin() as connection:
            _lock_batch(connection, batch_id)
            connection.execute(_CANCEL, {"job": None, "batch": batch_id})
            connection.execute(_NOTE_CANCEL, {"batch": batch_id})
        return self.batch(batch_id)

    def retry_job(self, job_id: UUID) -> Job:
        """Send a failed or cancelled job back to the queue, its failures forgiven. Raises: NotFound,
        IllegalTransition: it has succeeded."""
        with self._begin() as connection:
            connection.execute(_LOCK_BATCH_OF, {"job": job_id})
            connection.execute(_RETRY, {"job": job_id, "batch": None, "states": list(RETRIED)})
            _notify(connection)
        job = self.job(job_id)
        if job.state is State.SUCCEEDED:
            raise IllegalTransition(job_id, job.state, State.QUEUED)
        return job

    def retry_batch(self, batch_id: UUID, states: Iterable[State] = (State.FAILED,)) -> Batch:
        """Send those of the batch's jobs that ended so back to the queue. ``states`` are of ``contract.RETRIED``.
        Raises: NotFound."""
        wanted = sorted(RETRIED & set(states))
        with self._begin() as connection:
            _lock_batch(connection, batch_id)
            connection.execute(_RETRY, {"job": None, "batch": batch_id, "states": wanted})
            _notify(connection)
        return self.batch(batch_id)

    def pause_batch(self, batch_id: UUID, *, paused: bool) -> Batch:
        """Claim nothing more of the batch, or claim again; what is being drawn is drawn. One that has finished stays as
        it is. Raises: NotFound."""
        statement = text("UPDATE batches SET paused = :paused WHERE id = :id AND finished_at IS NULL")
        with self._begin() as connection:
            connection.execute(statement, {"id": batch_id, "paused": paused})
            _notify(connection)
        return self.batch(batch_id)

    def prioritise_batch(self, batch_id: UUID, priority: Priority) -> Batch:
        """Give all of the batch that has not ended another priority. Raises: NotFound."""
        with self._begin() as connection:
            _lock_batch(connection, batch_id)
            connection.execute(_PRIORITISE, {"batch": batch_id, "priority": priority.rank})
            _notify(connection)
        return self.batch(batch_id)

    def delete_batch(self, batch_id: UUID) -> None:
        """Delete the batch with its jobs and history; its images go with the next sweep. Raises: NotFound."""
        with self._begin() as connection:
            _lock_batch(connection, batch_id)
            connection.execute(_DELETE_BATCH, {"batch": batch_id})

    def deletions(self, *, after_s: float) -> list[tuple[int, list[str]]]:
        """What is to be deleted from the bucket: the beginnings of keys, of rows that went ``after_s`` seconds ago or
        earlier, so that no worker still writes there."""
        statement = text(
            "SELECT id, prefixes FROM deletions WHERE deleted_at < now() - make_interval(secs => :after) ORDER BY id"
        )
        with self._single() as connection:
            return [(row.id, row.prefixes) for row in connection.execute(statement, {"after": after_s})]

    def deletable(self, keys: Sequence[str]) -> list[str]:
        """Of these object keys, those that are no other job's image too (``Job.copy_of``)."""
        statement = text("SELECT object_key FROM jobs WHERE copy_of IS NOT NULL AND object_key = ANY(:keys)")
        with self._single() as connection:
            kept = {row.object_key for row in connection.execute(statement, {"keys": list(keys)})}
        return [key for key in keys if key not in kept]

    def deleted(self, deletion: int) -> None:
        """All of it is gone from the bucket."""
        with self._single() as connection:
            connection.execute(text("DELETE FROM deletions WHERE id = :id"), {"id": deletion})

    # A worker's steps, in the order of a job's way.

    def beat(self, worker_id: UUID, description: dict[str, Any], drawing: str, speed: float | None = None) -> None:
        """The worker's heartbeat: host, pid, device, model, revision, version, capacity, what it draws (JSON), and its
        ``speed`` in megapixel-steps a second."""
        with self._single() as connection:
            connection.execute(_BEAT, {"id": worker_id, "drawing": drawing, "speed": speed, **description})

    def farewell(self, worker_id: UUID) -> None:
        """The worker ends in order."""
        with self._single() as connection:
            connection.execute(text("UPDATE workers SET stopped_at = now() WHERE id = :id"), {"id": worker_id})

    def claim(self, message: Message, worker_id: UUID) -> Claim | None:
        """Take the job, if the message still holds; None otherwise: duplicates and stale messages cost nothing."""
        values = {"job": message.job_id, "claim": message.claim, "worker": worker_id}
        with self._single() as connection:
            row = connection.execute(_CLAIM, values).mappings().first()
        if row is None:
            return None
        facts = {**row, "priority": Priority.of_rank(row["priority"])}
        return Claim(job_id=message.job_id, claim=message.claim, worker_id=worker_id, **facts)

    def holding(self, worker_id: UUID) -> set[Message]:
        """The claims that are this worker's now; of others that it held, each was cancelled or reclaimed."""
        statement = text("SELECT id, claim FROM jobs WHERE state = 'running' AND worker_id = :worker")
        with self._single() as connection:
            return {Message(row.id, row.claim) for row in connection.execute(statement, {"worker": worker_id})}

    def urgent_messages_per_worker(self, priority: Priority, *, waiting_s: float, lease_s: float) -> float:
        """Messages that are more urgent than ``priority`` and that nobody has taken for ``waiting_s``, for each worker
        that lives."""
        values = {"rank": priority.rank, "waiting": waiting_s, "lease": lease_s}
        with self._single() as connection:
            row = connection.execute(_URGENT_MESSAGES, values).one()
        return float(row.messages / max(1, row.workers))

    def mark_alone(self, claim: Claim) -> None:
        """The suspect has the process to itself: a death from here on is its own. Raises: LostClaim."""
        with self._single() as connection:
            marked = connection.execute(_MARK_ALONE, _fence(claim))
        if marked.rowcount != 1:
            raise LostClaim(claim.job_id, claim.claim)

    def note_checkpoint(self, fence: Fence, key: str, step: int) -> None:
        """From now on the job goes on after ``step`` steps, with what lies at ``key``. Raises: LostClaim."""
        with self._single() as connection:
            noted = connection.execute(_NOTE_CHECKPOINT, _fence(fence) | {"key": key, "step": step})
        if noted.rowcount != 1:
            raise LostClaim(fence.job_id, fence.claim)

    def note_preview(self, fence: Fence, key: str) -> None:
        """From now on the job's unfinished image is shown by what lies at ``key``. Raises: LostClaim."""
        with self._single() as connection:
            noted = connection.execute(_NOTE_PREVIEW, _fence(fence) | {"key": key})
        if noted.rowcount != 1:
            raise LostClaim(fence.job_id, fence.claim)

    def record(self, claim: Claim, recorded: Recorded) -> None:
        """The job succeeded, with this image. Asking twice is recording once. Raises: LostClaim."""
        values = _fence(claim) | vars(recorded)
        with self._single() as connection:
            if connection.execute(_RECORD, values).scalar_one():
                return
            if connection.execute(_RECORDED_ALREADY, values).first() is None:
                raise LostClaim(claim.job_id, claim.claim)

    def fail(self, claim: Claim, code: str, message: str, *, trace: str | None = None) -> None:
        """The job failed for good. Raises: LostClaim."""
        self._settle(claim, Outcome.FAILED, code, message, trace=trace, charge=1, final=True)

    def retry(self, claim: Claim, code: str, message: str, *, delay_s: float, trace: str | None = None) -> None:
        """The claim failed; the job waits and is tried again, or fails if this was its last. Raises: LostClaim."""
        self._settle(claim, Outcome.RETRIED, code, message, trace=trace, charge=1, delay_s=delay_s)

    def give_back(self, fence: Fence) -> None:
        """The worker drains, or never learnt of its claim: the job goes back to its place in the queue, no failure
        charged. Raises: LostClaim."""
        self._settle(fence, Outcome.DRAINED, None, None, charge=0)

    def give_back_all(self, worker_id: UUID) -> int:
        """Give back whatever is still this worker's, which ends now; returns how many jobs that were."""
        with self._begin() as connection:
            given = connection.execute(_GIVE_BACK_ALL, {"worker": worker_id}).scalar_one()
            _notify(connection)
        return int(given)

    def _settle(
        self,
        claim: Fence,
        outcome: Outcome,
        code: str | None,
        message: str | None,
        *,
        charge: int,
        delay_s: float = 0.0,
        trace: str | None = None,
        final: bool = False,
    ) -> None:
        values = _fence(claim) | {
            "outcome": outcome,
            "code": code,
            "message": _storable(message),
            "trace": _storable(trace or message),
            "charge": charge,
            "delay": delay_s,
            "final": final,
        }
        with self._begin() as connection:
            if not connection.execute(_SETTLE, values).scalar_one():
                raise LostClaim(claim.job_id, claim.claim)
            _notify(connection)

    # The dispatcher's steps. Each is the leader's alone, and changes nothing for anybody else.

    def lead(self, holder: UUID, *, leader_s: float) -> bool:
        """Take or renew the dispatcher's post for ``leader_s`` seconds of the database's clock."""
        with self._single() as connection:
            return connection.execute(_LEAD, {"holder": holder, "ttl": leader_s}).first() is not None

    def resign(self, holder: UUID) -> None:
        """Give the post up at once, so that another need not wait for the expiry."""
        with self._begin() as connection:
            connection.execute(text("DELETE FROM leader WHERE holder = :holder"), {"holder": holder})

    def window(self, *, lease_s: float) -> Window:
        """What Redis should hold, by priority, and who is there to take it."""
        with self._single() as connection:
            row = connection.execute(_WINDOW, {"lease": lease_s}).one()
        published = {int(rank): count for rank, count in (row.published or {}).items()}
        return Window({priority: published.get(priority.rank, 0) for priority in Priority}, row.workers, row.free)

    def lanes(self) -> list[Lane]:
        """The lanes that may hold a queued job of a batch that is not paused."""
        priorities = list(Priority)  # looked up once: there are thousands of lanes, several times a second
        with self._single() as connection:
            driver: Any = connection.connection.driver_connection  # in psycopg's binary form: half the time
            return [
                Lane(lane_id, tenant, tenant_weight, batch_id, batch_weight, priorities[rank])
                for lane_id, tenant, tenant_weight, batch_id, batch_weight, rank in driver.execute(
                    _LANES.text, binary=True
                )
            ]

    def next_messages(self, holder: UUID, wanted: Mapping[int, int], limit: int | None = None) -> list[Next]:
        """Put the next ``wanted[lane_id]`` queued jobs of each lane into the window; returns what is to be published.

        A lane that holds fewer gives fewer. The oldest of a lane come first. Once ``limit`` jobs are found, the lanes
        that ``wanted`` names later are not asked.
        """
        values = {"holder": holder, "lanes": list(wanted), "counts": list(wanted.values()), "limit": limit}
        with self._single() as connection:
            rows = connection.execute(_NEXT_MESSAGES, values)
            return [
                Next(Message(row.job_id, row.claim), Priority.of_rank(row.priority), row.lane_id, row.work)
                for row in rows
            ]

    def close_lanes(self, holder: UUID, lane_ids: Sequence[int]) -> None:
        """Close those that hold no queued job. One in which a job is being queued right now stays open.

        Two statements: the second sees what had been committed when the first took the locks.
        """
        values = {"holder": holder, "ids": list(lane_ids)}
        with self._begin() as connection:
            locked = [row.id for row in connection.execute(_LOCK_LANES, values)]
            connection.execute(_CLOSE_LANES, {"ids": locked})

    def reopen_lanes(self, holder: UUID) -> int:
        """Open the lanes that hold a queued job and are closed; returns how many.

        There are none, unless somebody has queued a job in another way: an older worker, or a person with SQL.
        """
        with self._single() as connection:
            return connection.execute(_REOPEN_LANES, {"holder": holder}).rowcount

    def overdue_messages(self, holder: UUID, *, audit_s: float) -> list[Outgoing]:
        """The messages that should be in Redis for longer than ``audit_s``; rows that should not are removed."""
        with self._begin() as connection:
            connection.execute(_STALE_MESSAGES, {"holder": holder})
            rows = connection.execute(_OVERDUE_MESSAGES, {"holder": holder, "audit": audit_s})
            return [Outgoing(Message(row.job_id, row.claim), Priority.of_rank(row.priority)) for row in rows]

    def republishing(self, holder: UUID, messages: Sequence[Message]) -> None:
        """Note that these are published again now."""
        with self._single() as connection:
            connection.execute(_REPUBLISHING, {"ids": [message.job_id for message in messages], "holder": holder})

    def reclaim(self, holder: UUID, *, lease_s: float) -> list[tuple[UUID, State]]:
        """Take back the jobs of workers that have been silent for a lease; returns each job and its new state.

        Every one becomes a suspect and is next drawn alone; only a death while alone is charged as a failure.
        """
        with self._begin() as connection:
            rows = connection.execute(_RECLAIM, {"holder": holder, "lease": lease_s}).all()
            if rows:
                _notify(connection)
        return [(row.id, State(row.state)) for row in rows]

    def finish_batches(self, holder: UUID) -> int:
        """Note of each batch that nothing of it is queued or running any more; returns how many, 1,000 at most.

        Two statements: the second sees what had been committed when the first took the locks. So a retry, which writes
        the batch's row too, comes wholly before or wholly after.
        """
        with self._begin() as connection:
            ended = [row.id for row in connection.execute(_LOCK_ENDED_BATCHES, {"holder": holder})]
            return connection.execute(_FINISH_BATCHES, {"ids": ended}).rowcount if ended else 0

    def fold_tallies(self, holder: UUID) -> int:
        """Add new tallies to those that stand for all before them; returns how many, 10,000 at most. Nothing changes
        for who reads."""
        with self._single() as connection:
            folded = int(connection.execute(_FOLD_TALLIES, {"holder": holder}).scalar_one())
            connection.execute(_DROP_EMPTY_TALLIES)
        return folded

    def sweepable(self, keys: Sequence[str]) -> list[str]:
        """Of these object keys, those to which no row points, and no claim that may still write ever will.

        Keys of unknown jobs are never among them: another farm may share the bucket.
        """
        read = [(key, found["job"], int(found["claim"])) for key in keys if (found := _OBJECT_KEY.fullmatch(key))]
        columns: list[list[Any]] = [list(column) for column in zip(*read, strict=True)] or [[], [], []]
        with self._single() as connection:
            rows = connection.execute(_SWEEPABLE, dict(zip(("keys", "jobs", "claims"), columns, strict=True)))
            return [row.key for row in rows]

    @contextmanager
    def listening(self) -> Iterator["Listener"]:
        """A connection of its own that wakes up when a job is queued."""
        with self.database.listening(CHANNEL) as connection:
            yield Listener(connection)


class Listener:
    """Waits for a commit that queues a job."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._connection = connection

    def wait(self, timeout_s: float) -> bool:
        """Whether a job was queued within ``timeout_s``. Raises: Unavailable."""
        with reaching("Postgres"):
            return any(True for _ in self._connection.notifies(timeout=timeout_s, stop_after=1))


def _storable(words: str | None) -> str | None:
    """Without what Postgres cannot keep in a text: an error's words must never keep its job from ending."""
    return (
        None if words is None else words.replace("\x00", "\N{REPLACEMENT CHARACTER}").encode(errors="replace").decode()
    )


def _fence(claim: Fence) -> dict[str, Any]:
    return {"job": claim.job_id, "claim": claim.claim, "worker": claim.worker_id}


def _notify(connection: Connection) -> None:
    connection.execute(text(f"SELECT pg_notify('{CHANNEL}', '')"))


def _keep_own_drawing(connection: Connection, workers: Sequence[dict[str, Any]]) -> None:
    """Row security cannot look into what a worker draws, so others' jobs are taken out here."""
    own = {str(job_id) for job_id in connection.scalars(text("SELECT id FROM jobs WHERE state = 'running'"))}
    for worker in workers:
        worker["drawing"] = [entry for entry in worker["drawing"] if entry.get("job") in own]


def _lock_batch(connection: Connection, batch_id: UUID) -> None:
    """Before anything is done to all of a batch, however long it takes: two steps at once would else wait for each
    other's rows for ever. Raises: NotFound."""
    connection.execute(text("SET LOCAL statement_timeout = 0"))
    if connection.execute(_LOCK_BATCH, {"batch": batch_id}).first() is None:
        raise NotFound("batch", batch_id)


_TENANT_COLUMNS = ", ".join(Tenant.model_fields)
_MAKE_TENANT = text("INSERT INTO tenants (name, weight) VALUES (:name, 1) ON CONFLICT DO NOTHING")

JOB_COLUMNS = ", ".join(column.name for column in jobs_table.columns if column.name in Job.model_fields)


def job_of(row: Any) -> Job:
    return Job.model_validate({**row, "priority": Priority.of_rank(row["priority"])})


def batches_where(connection: Connection, which: str, values: dict[str, Any]) -> list[Batch]:
    statement = text(
        f"""
        SELECT b.id, b.tenant, b.name, b.weight, b.created_at, b.paused, b.cancelled_at, b.finished_at, b.file_id,
               b.metadata, b.refused, b.jobs, b.lines, b.rejected, {BATCH_COUNTS} AS counts
        FROM batches b {which}
        """
    )
    return [Batch.of(**row) for row in connection.execute(statement, values).mappings()]


_FARM = text(
    f"""
    SELECT now() AS at, {FARM_COUNTS} AS counts,
           (SELECT coalesce(sum(tallies.jobs), 0) FROM batches JOIN tallies ON batch_id = batches.id
            WHERE paused AND finished_at IS NULL AND state = 'queued') AS paused,
           (SELECT extract(epoch FROM now() - min(created_at))::float
            FROM jobs WHERE state = 'queued') AS oldest_queued_s,
           (SELECT count(*) FROM jobs WHERE state = 'succeeded' AND finished_at > now() - interval '1 minute')
               AS images_last_minute,
           (SELECT count(*) FROM messages) AS published
    """
)

_WORKERS = text(
    """
    SELECT id, host, pid, device, model, revision, version, capacity, started_at, heartbeat_at, stopped_at,
           extract(epoch FROM now() - heartbeat_at)::float AS heartbeat_age_s,
           heartbeat_at > now() - make_interval(secs => :lease) AS live,
           CASE WHEN heartbeat_at > now() - make_interval(secs => :lease) THEN drawing ELSE '[]' END AS drawing
    FROM workers WHERE stopped_at IS NULL AND heartbeat_at > now() - interval '1 hour' ORDER BY host, device, started_at
    """
)

_LOCK_BATCH = text("SELECT id FROM batches WHERE id = :batch FOR NO KEY UPDATE")
_LOCK_BATCH_OF = text("SELECT id FROM batches WHERE id = (SELECT batch_id FROM jobs WHERE id = :job) FOR NO KEY UPDATE")

_CANCEL = text(
    """
    WITH cancelled AS (
        UPDATE jobs SET state = 'cancelled', finished_at = now(), worker_id = NULL,
                        checkpoint_key = NULL, checkpoint_step = 0, preview_key = NULL
        WHERE (id = :job OR batch_id = :batch) AND state IN ('queued', 'running')
        RETURNING id, claim
    ), noted AS (
        UPDATE claims SET ended_at = now(), outcome = 'cancelled' FROM cancelled
        WHERE claims.job_id = cancelled.id AND claims.claim = cancelled.claim AND ended_at IS NULL
    )
    DELETE FROM messages USING cancelled WHERE messages.job_id = cancelled.id
    """
)

_NOTE_CANCEL = text(
    "UPDATE batches SET cancelled_at = now() WHERE id = :batch AND cancelled_at IS NULL AND finished_at IS NULL"
)

_RETRY = text(
    """
    WITH again AS (
        UPDATE jobs SET state = 'queued', failures = 0, suspect = false, drawn_alone = false, not_before = now(),
                        finished_at = NULL, error_code = NULL, error_message = NULL
        WHERE (id = :job OR batch_id = :batch) AND state = ANY(:states)
        RETURNING lane_id, batch_id
    ), unfinished AS (
        UPDATE batches SET finished_at = NULL, cancelled_at = NULL
        WHERE id IN (SELECT batch_id FROM again)
    )
    UPDATE lanes SET open = true WHERE id IN (SELECT lane_id FROM again)
    """
)

_PRIORITISE = text(
    f"""
    WITH lane AS (
        INSERT INTO lanes (tenant, batch_id, priority, open)
        SELECT tenant, id, CAST(:priority AS smallint), true FROM batches WHERE id = :batch
        ON CONFLICT (tenant, coalesce(batch_id, CAST('{UUID(int=0)}' AS uuid)), priority) DO UPDATE SET open = true
        RETURNING id
    ), moved AS (
        UPDATE jobs SET priority = :priority, lane_id = lane.id FROM lane
        WHERE batch_id = :batch AND state IN ('queued', 'running') AND lane_id <> lane.id
        RETURNING jobs.id
    )
    DELETE FROM messages USING moved WHERE messages.job_id = moved.id
    """
)

_DELETE_BATCH = text(
    """
    WITH gone AS (
        SELECT id, copy_of, object_key, previews, claim > 1 OR claim > 0 AND state <> 'succeeded' AS unfinished
        FROM jobs WHERE batch_id = :batch
    ), noted AS (
        INSERT INTO deletions (tenant, prefixes)
        SELECT tenant, 'images/' || id || '/'
            || ARRAY(SELECT 'checkpoints/' || id || '/' FROM gone WHERE unfinished)
            || ARRAY(SELECT 'previews/' || id || '/' FROM gone WHERE previews > 0)
            || ARRAY(SELECT DISTINCT object_key FROM gone
                     WHERE copy_of IS NOT NULL AND NOT EXISTS (SELECT 1 FROM jobs WHERE jobs.id = gone.copy_of))
        FROM batches WHERE id = :batch
    )
    DELETE FROM batches WHERE id = :batch
    """
)
"""Of a shared image whose first job went before, the last job that shares it takes it along. A job that succeeded may
have left checkpoints of claims that it lost."""

_BEAT = text(
    """
    INSERT INTO workers (id, host, pid, device, model, revision, version, capacity, drawing, speed)
    VALUES (:id, :host, :pid, :device, :model, :revision, :version, :capacity, CAST(:drawing AS jsonb), :speed)
    ON CONFLICT (id) DO UPDATE SET heartbeat_at = now(), drawing = excluded.drawing, speed = excluded.speed
    """
)

_CLAIM = text(
    """
    WITH claimed AS (
        UPDATE jobs SET state = 'running', claim = :claim, worker_id = :worker, claimed_at = now(), drawn_alone = false,
                        waiting_s = extract(epoch FROM now() - greatest(created_at, not_before))
        WHERE id = :job AND state = 'queued' AND claim = :claim - 1 AND not_before <= now()
          AND NOT EXISTS (SELECT 1 FROM batches WHERE batches.id = jobs.batch_id AND paused)
        RETURNING batch_id, priority, suspect, failures, waiting_s, request, checkpoint_key, checkpoint_step,
                  previews
    ), noted AS (
        INSERT INTO claims (job_id, claim, worker_id) SELECT :job, :claim, :worker FROM claimed
    ), gone AS (
        DELETE FROM messages WHERE job_id = :job AND claim <= :claim
    )
    SELECT * FROM claimed
    """
)

_MARK_ALONE = text(
    """
    UPDATE jobs SET drawn_alone = true
    WHERE id = :job AND state = 'running' AND claim = :claim AND worker_id = :worker
    """
)

_NOTE_CHECKPOINT = text(
    """
    UPDATE jobs SET checkpoint_key = :key, checkpoint_step = :step
    WHERE id = :job AND state = 'running' AND claim = :claim AND worker_id = :worker
    """
)

_NOTE_PREVIEW = text(
    """
    UPDATE jobs SET preview_key = :key
    WHERE id = :job AND state = 'running' AND claim = :claim AND worker_id = :worker
    """
)

_RECORD = text(
    """
    WITH recorded AS (
        UPDATE jobs SET state = 'succeeded', finished_at = now(), error_code = NULL, error_message = NULL,
               object_key = :object_key, sha256 = :sha256, size_bytes = :size_bytes, width_px = :width_px,
               height_px = :height_px, format = :format, drawing_s = :drawing_s, encoding_s = :encoding_s,
               uploading_s = :uploading_s, warnings = :warnings, checkpoint_key = NULL, checkpoint_step = 0,
               preview_key = NULL
        WHERE id = :job AND state = 'running' AND claim = :claim AND worker_id = :worker
        RETURNING id
    ), noted AS (
        UPDATE claims SET ended_at = now(), outcome = 'succeeded' FROM recorded
        WHERE job_id = :job AND claim = :claim
    )
    SELECT count(*) FROM recorded
    """
)

_RECORDED_ALREADY = text(
    """
    SELECT 1 FROM jobs
    WHERE id = :job AND state = 'succeeded' AND claim = :claim AND worker_id = :worker AND object_key = :object_key
    """
)

_SETTLE = text(
    """
    WITH settled AS (
        UPDATE jobs SET
            state = CASE WHEN :final OR (:charge > 0 AND failures + :charge >= max_failures)
                         THEN 'failed' ELSE 'queued' END,
            finished_at = CASE WHEN :final OR (:charge > 0 AND failures + :charge >= max_failures) THEN now() END,
            failures = failures + :charge, worker_id = NULL, drawn_alone = false, preview_key = NULL,
            not_before = CASE WHEN :charge > 0 THEN now() + make_interval(secs => :delay) ELSE not_before END,
            checkpoint_key = CASE WHEN :charge > 0 THEN NULL ELSE checkpoint_key END,
            checkpoint_step = CASE WHEN :charge > 0 THEN 0 ELSE checkpoint_step END,
            error_code = coalesce(:code, error_code), error_message = coalesce(:message, error_message)
        WHERE id = :job AND state = 'running' AND claim = :claim AND worker_id = :worker
        RETURNING state, lane_id
    ), noted AS (
        UPDATE claims SET ended_at = now(), error = :trace,
               outcome = CASE WHEN settled.state = 'failed' THEN 'failed' ELSE :outcome END
        FROM settled WHERE job_id = :job AND claim = :claim
    ), opened AS (
        UPDATE lanes SET open = true FROM settled WHERE lanes.id = settled.lane_id AND settled.state = 'queued'
    )
    SELECT count(*) FROM settled
    """
)

_GIVE_BACK_ALL = text(
    """
    WITH given AS (
        UPDATE jobs SET state = 'queued', worker_id = NULL, drawn_alone = false, preview_key = NULL
        WHERE state = 'running' AND worker_id = :worker
        RETURNING id, claim, lane_id
    ), noted AS (
        UPDATE claims SET ended_at = now(), outcome = 'drained' FROM given
        WHERE claims.job_id = given.id AND claims.claim = given.claim
    ), opened AS (
        UPDATE lanes SET open = true FROM given WHERE lanes.id = given.lane_id
    )
    SELECT count(*) FROM given
    """
)

_LEAD = text(
    """
    INSERT INTO leader (post, holder, expires_at) VALUES ('dispatcher', :holder, now() + make_interval(secs => :ttl))
    ON CONFLICT (post) DO UPDATE SET holder = excluded.holder, expires_at = excluded.expires_at
    WHERE leader.holder = excluded.holder OR leader.expires_at < now()
    RETURNING holder
    """
)

_LEADS = "EXISTS (SELECT 1 FROM leader WHERE holder = :holder AND expires_at > now())"

# The window changes too fast for Postgres to know its size: a join may be planned as a scan of all jobs, at 70 ms for
# 50,000. So its jobs are looked up one by one, here and in the audit's statements.
_WINDOW = text(
    """
    WITH live AS (
        SELECT id, capacity FROM workers
        WHERE stopped_at IS NULL AND heartbeat_at > now() - make_interval(secs => :lease)
    )
    SELECT (SELECT jsonb_object_agg(priority, n)
            FROM (SELECT (SELECT priority FROM jobs WHERE jobs.id = job_id) AS priority, count(*) AS n
                  FROM messages GROUP BY 1) AS waiting) AS published,
           (SELECT count(*) FROM live) AS workers,
           greatest(0, (SELECT coalesce(sum(capacity), 0) FROM live)
                       - (SELECT count(*) FILTER (WHERE worker_id IN (SELECT id FROM live))
                          FROM jobs WHERE state = 'running'))::int AS free
    """
)

_URGENT_MESSAGES = text(
    """
    SELECT (SELECT count(*) FROM messages WHERE published_at < now() - make_interval(secs => :waiting)
            AND (SELECT priority FROM jobs WHERE jobs.id = job_id) < :rank) AS messages,
           (SELECT count(*) FROM workers
            WHERE stopped_at IS NULL AND heartbeat_at > now() - make_interval(secs => :lease)) AS workers
    """
)

_LANES = text(
    """
    SELECT lanes.id, lanes.tenant, coalesce(tenants.weight, 1) AS tenant_weight,
           lanes.batch_id, coalesce(batches.weight, 1) AS batch_weight, lanes.priority
    FROM lanes LEFT JOIN tenants ON tenants.name = lanes.tenant LEFT JOIN batches ON batches.id = lanes.batch_id
    WHERE lanes.open AND batches.paused IS NOT TRUE
    """
)

# A job that is being deleted is passed over: to wait for it would be to wait for its whole batch, and then to fail.
_NEXT_MESSAGES = text(
    f"""
    WITH next AS (
        SELECT found.* FROM unnest(CAST(:lanes AS bigint[]), CAST(:counts AS int[])) AS wanted (lane, most)
        CROSS JOIN LATERAL (
            SELECT j.id, j.claim + 1 AS claim, j.priority, j.lane_id, j.work FROM jobs j
            WHERE j.state = 'queued' AND j.lane_id = wanted.lane AND j.not_before <= now()
              AND NOT EXISTS (SELECT 1 FROM messages m WHERE m.job_id = j.id)
            ORDER BY j.not_before, j.seq LIMIT wanted.most FOR KEY SHARE OF j SKIP LOCKED
        ) AS found
        WHERE {_LEADS} LIMIT :limit
    ), noted AS (
        INSERT INTO messages (job_id, claim) SELECT id, claim FROM next ON CONFLICT (job_id) DO NOTHING RETURNING job_id
    )
    SELECT noted.job_id, claim, priority, lane_id, work FROM noted JOIN next ON next.id = noted.job_id
    """
)

_LOCK_LANES = text(f"SELECT id FROM lanes WHERE id = ANY(:ids) AND open AND {_LEADS} FOR NO KEY UPDATE SKIP LOCKED")

_CLOSE_LANES = text(
    """
    UPDATE lanes SET open = false
    WHERE id = ANY(:ids) AND NOT EXISTS (SELECT 1 FROM jobs WHERE state = 'queued' AND lane_id = lanes.id)
    """
)

_REOPEN_LANES = text(
    f"""
    WITH RECURSIVE holding AS (
        (SELECT lane_id FROM jobs WHERE state = 'queued' ORDER BY lane_id LIMIT 1)
        UNION ALL
        SELECT (SELECT j.lane_id FROM jobs j WHERE j.state = 'queued' AND j.lane_id > holding.lane_id
                ORDER BY j.lane_id LIMIT 1)
        FROM holding WHERE holding.lane_id IS NOT NULL
    )
    UPDATE lanes SET open = true FROM holding WHERE lanes.id = holding.lane_id AND NOT open AND {_LEADS}
    """
)

_LOCK_ENDED_BATCHES = text(
    f"""
    SELECT id FROM batches b WHERE finished_at IS NULL AND NOT {BATCH_OPEN} AND {_LEADS} LIMIT 1000
    FOR NO KEY UPDATE SKIP LOCKED
    """
)

_FINISH_BATCHES = text(
    f"""
    UPDATE batches b SET finished_at = coalesce((SELECT max(at) FROM tallies WHERE batch_id = b.id), now()),
                         paused = false
    WHERE id = ANY(:ids) AND finished_at IS NULL AND NOT {BATCH_OPEN}
    """
)

_FOLD_TALLIES = text(
    f"""
    WITH new AS (
        SELECT id FROM tallies WHERE NOT folded AND {_LEADS} ORDER BY id LIMIT 10000 FOR UPDATE SKIP LOCKED
    ), gone AS (
        DELETE FROM tallies WHERE id IN (SELECT id FROM new)
        RETURNING tenant, batch_id, priority, state, jobs, pixel_steps, at
    ), kept AS (
        INSERT INTO tallies (tenant, batch_id, priority, state, jobs, pixel_steps, at, folded)
        SELECT tenant, batch_id, priority, state, sum(jobs), sum(pixel_steps), max(at), true FROM gone
        GROUP BY tenant, batch_id, priority, state ORDER BY tenant, batch_id, priority, state
        ON CONFLICT (tenant, coalesce(batch_id, CAST('{UUID(int=0)}' AS uuid)), priority, state) WHERE folded
        DO UPDATE SET jobs = tallies.jobs + excluded.jobs, pixel_steps = tallies.pixel_steps + excluded.pixel_steps,
                      at = greatest(tallies.at, excluded.at)
    )
    SELECT count(*) FROM gone
    """
)

_DROP_EMPTY_TALLIES = text("DELETE FROM tallies WHERE folded AND jobs = 0 AND pixel_steps = 0")

_STALE_MESSAGES = text(
    f"""
    DELETE FROM messages WHERE job_id IN (
        SELECT job_id FROM messages AS m
        WHERE {_LEADS} AND (
            SELECT state <> 'queued' OR m.claim <> jobs.claim + 1
                OR EXISTS (SELECT 1 FROM batches WHERE batches.id = jobs.batch_id AND paused)
            FROM jobs WHERE jobs.id = m.job_id)
        FOR UPDATE SKIP LOCKED)
    """
)
"""What is locked is being claimed or cancelled just now. To wait for it could be to wait for each other."""

_REPUBLISHING = text(
    f"""
    UPDATE messages SET published_at = now() WHERE job_id IN (
        SELECT job_id FROM messages WHERE job_id = ANY(:ids) AND {_LEADS} FOR UPDATE SKIP LOCKED)
    """
)

_OVERDUE_MESSAGES = text(
    f"""
    SELECT job_id, claim, (SELECT priority FROM jobs WHERE jobs.id = job_id) AS priority FROM messages
    WHERE published_at < now() - make_interval(secs => :audit) AND {_LEADS}
    """
)

_RECLAIM = text(
    f"""
    WITH lost AS (
        SELECT id, claim, lane_id, drawn_alone AS alone, drawn_alone AND failures + 1 >= max_failures AS final FROM jobs
        WHERE state = 'running' AND {_LEADS}
          AND NOT EXISTS (SELECT 1 FROM workers WHERE workers.id = jobs.worker_id AND stopped_at IS NULL
                          AND heartbeat_at >= now() - make_interval(secs => :lease))
        FOR UPDATE SKIP LOCKED
    ), noted AS (
        UPDATE claims SET ended_at = now(), outcome = 'lease_lost',
               error = 'the worker died or fell silent'
                       || CASE WHEN lost.alone THEN ' while it drew this job alone' ELSE '' END
        FROM lost
        WHERE claims.job_id = lost.id AND claims.claim = lost.claim
    ), opened AS (
        UPDATE lanes SET open = true FROM lost WHERE lanes.id = lost.lane_id AND NOT final
    )
    UPDATE jobs SET
        state = CASE WHEN final THEN 'failed' ELSE 'queued' END, finished_at = CASE WHEN final THEN now() END,
        checkpoint_key = CASE WHEN final THEN NULL ELSE checkpoint_key END,
        checkpoint_step = CASE WHEN final THEN 0 ELSE checkpoint_step END,
        failures = failures + alone::int, suspect = true, drawn_alone = false, worker_id = NULL, preview_key = NULL,
        error_code = 'worker_lost', error_message = 'the worker process died or fell silent while it held this job'
    FROM lost WHERE jobs.id = lost.id
    RETURNING jobs.id, jobs.state
    """
)

_OBJECT_KEY = re.compile(
    r"(?:images/[^/]+|checkpoints|previews)/(?P<job>[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})/(?P<claim>[0-9]{1,9})[.-][^/]+"
)
"""As ``storage.object_key``, ``storage.checkpoint_key`` and ``storage.preview_key`` make them."""

_SWEEPABLE = text(
    """
    SELECT read.key
    FROM unnest(CAST(:keys AS text[]), CAST(:jobs AS uuid[]), CAST(:claims AS int[])) AS read (key, job_id, claim)
    JOIN jobs ON jobs.id = read.job_id
    WHERE read.key IS DISTINCT FROM jobs.object_key AND read.key IS DISTINCT FROM jobs.checkpoint_key
      AND read.key IS DISTINCT FROM jobs.preview_key
      AND (read.claim < jobs.claim OR read.claim = jobs.claim AND jobs.state <> 'running')
    """
)
