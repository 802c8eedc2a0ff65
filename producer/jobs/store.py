"""Every SQL statement of the system; no other file has any.

Invariants that the statements keep, whoever calls them and whatever dies in between:

- a job's state moves only along ``contract.TRANSITIONS``, each move one conditional UPDATE;
- every write of a worker is fenced by job, claim and worker: it changes the row or raises ``LostClaim``;
- a row of ``messages`` exists only for a queued job and its next claim;
- no transaction is open while anything is drawn, encoded or uploaded; times are the database's clock.

Every method raises ``Unavailable`` when Postgres does not answer, and the caller may simply ask again. A claim may
then stand though its answer was lost: asked again it looks like a duplicate, and the worker's claim check
(``worker.lease``) gives the job back.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import UUID, uuid4

import psycopg
from sqlalchemy import Connection, Engine, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from producer.jobs.contract import (
    Batch,
    Claim,
    Farm,
    Fence,
    Job,
    Message,
    Outcome,
    Priority,
    Recorded,
    State,
    Submission,
    Worker,
)
from producer.jobs.errors import IllegalTransition, LostClaim, NotFound, Unavailable
from producer.jobs.table import jobs as jobs_table

CHANNEL = "ovis_jobs"
"""Notified by every commit that queues a job."""

CONNECT_ARGS: dict[str, Any] = {
    "connect_timeout": 5,
    "application_name": "ovis-batch",
    "keepalives_idle": 10,
    "keepalives_interval": 3,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,  # ms; keepalives say nothing while what was sent is not acknowledged
    # A frozen process must not hold a row for ever.
    "options": "-c timezone=UTC -c idle_in_transaction_session_timeout=10s -c statement_timeout=60s",
}


def connect(database_url: str, *, connections: int = 5, ping: bool = True) -> Engine:
    """A pool on the database. Connects on first use, with psycopg 3 whatever the address's scheme says.

    ``ping`` asks each connection whether it lives before it is used: a round trip that a caller who tries again
    anyway can do without.
    """
    url = make_url(database_url).set(drivername="postgresql+psycopg")
    return create_engine(
        url, pool_size=connections, max_overflow=0, pool_timeout=10, pool_pre_ping=ping, connect_args=CONNECT_ARGS
    )


AWAY = ("08", "25", "53", "57", "58")
"""Classes of SQLSTATE that pass by themselves: no connection, a standby or a broken transaction, no resources, an
operator's doing, the system's fault."""


@contextmanager
def reaching(dependency: str) -> Iterator[None]:
    """Turns the ways in which Postgres can be away into ``Unavailable``."""
    try:
        yield
    except PoolTimeout as error:
        raise Unavailable(dependency, _first_line(error)) from error
    except DBAPIError as error:
        if error.connection_invalidated or _away(error.orig):
            raise Unavailable(dependency, _first_line(error)) from error
        raise
    except psycopg.Error as error:
        if _away(error):
            raise Unavailable(dependency, _first_line(error)) from error
        raise


def _away(error: BaseException | None) -> bool:
    if isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
        return True
    return isinstance(error, psycopg.Error) and (error.sqlstate or "").startswith(AWAY)


def _first_line(error: Exception) -> str:
    original = getattr(error, "orig", None) or error
    return str(original).strip().splitlines()[0] if str(original).strip() else type(original).__name__


class Store:
    """The farm's Postgres, as producers, dispatcher and workers use it. Safe to share between threads."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._autocommitting = engine.execution_options(isolation_level="AUTOCOMMIT")

    @classmethod
    def at(cls, database_url: str, *, connections: int = 5, ping: bool = True) -> "Store":
        return cls(connect(database_url, connections=connections, ping=ping))

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def _begin(self) -> Iterator[Connection]:
        with reaching("Postgres"), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def _single(self) -> Iterator[Connection]:
        """For one statement, which is its own transaction: one round trip instead of three."""
        with reaching("Postgres"), self._autocommitting.connect() as connection:
            yield connection

    def ping(self) -> None:
        """Return if Postgres answers."""
        with self._single() as connection:
            connection.execute(text("SELECT 1"))

    # Submission: the commit is the promise.

    def submit(self, submission: Submission, *, max_failures: int) -> Job:
        """Insert one job, alone."""
        job_id = uuid4()
        with self._begin() as connection:
            _copy_jobs(connection, None, [submission], max_failures, [job_id])
            _notify(connection)
        return self.job(job_id)

    def submit_batch(self, name: str, submissions: Iterable[Submission], *, max_failures: int) -> Batch:
        """Insert a batch and its jobs in one transaction: all of them or none.

        ``submissions`` is read once, row by row, so it may be a generator over a large file; an exception that it
        raises undoes everything and passes on.
        """
        batch_id = uuid4()
        with self._begin() as connection:
            connection.execute(text("SET LOCAL statement_timeout = 0"))
            connection.execute(
                text("INSERT INTO batches (id, name) VALUES (:id, :name)"), {"id": batch_id, "name": name}
            )
            count = _copy_jobs(connection, batch_id, submissions, max_failures)
            connection.execute(text("UPDATE batches SET jobs = :jobs WHERE id = :id"), {"id": batch_id, "jobs": count})
            _notify(connection)
        return self.batch(batch_id)

    # Reading.

    def job(self, job_id: UUID) -> Job:
        """Raises: NotFound."""
        with self._begin() as connection:
            row = (
                connection.execute(text(f"SELECT {_JOB_COLUMNS} FROM jobs WHERE id = :id"), {"id": job_id})
                .mappings()
                .first()
            )
        if row is None:
            raise NotFound("job", job_id)
        return _job(row)

    def jobs(
        self, *, state: State | None = None, limit: int = 100, before: int | None = None
    ) -> tuple[list[Job], int | None]:
        """The newest jobs first, and where the next page starts (``before``), None at the end."""
        statement = text(
            f"""
            SELECT {_JOB_COLUMNS}, seq FROM jobs
            WHERE (CAST(:state AS text) IS NULL OR state = :state)
              AND (CAST(:before AS bigint) IS NULL OR seq < :before)
            ORDER BY seq DESC LIMIT :limit
            """
        )
        with self._begin() as connection:
            rows = connection.execute(statement, {"state": state, "before": before, "limit": limit}).mappings().all()
        return [_job(row) for row in rows], rows[-1]["seq"] if len(rows) == limit else None

    def batch(self, batch_id: UUID) -> Batch:
        """Raises: NotFound."""
        with self._begin() as connection:
            found = _batches(connection, "WHERE b.id = :id", {"id": batch_id})
        if not found:
            raise NotFound("batch", batch_id)
        return found[0]

    def batches(self, limit: int = 20) -> list[Batch]:
        """The newest batches first."""
        with self._begin() as connection:
            return _batches(connection, "ORDER BY b.created_at DESC LIMIT :limit", {"limit": limit})

    def batch_jobs(
        self, batch_id: UUID, *, after: int = -1, limit: int = 1000, state: State | None = None
    ) -> list[Job]:
        """The batch's jobs in the order of submission, those behind position ``after``. Raises: NotFound."""
        statement = text(
            f"""
            SELECT {_JOB_COLUMNS} FROM jobs
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
        return [_job(row) for row in rows]

    def last_failures(self, limit: int = 10) -> list[Job]:
        """The jobs that failed last, newest first."""
        return self._by_end("failed", limit)

    def last_images(self, limit: int = 12) -> list[Job]:
        """The jobs that succeeded last, newest first."""
        return self._by_end("succeeded", limit)

    def _by_end(self, state: str, limit: int) -> list[Job]:
        statement = text(
            f"SELECT {_JOB_COLUMNS} FROM jobs WHERE state = :state AND finished_at IS NOT NULL"
            " ORDER BY finished_at DESC LIMIT :limit"
        )
        with self._begin() as connection:
            rows = connection.execute(statement, {"state": state, "limit": limit}).mappings().all()
        return [_job(row) for row in rows]

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
        """The whole farm at one moment. Workers that ended in order are left out; silent ones stay for an hour."""
        with self._begin() as connection:
            row = connection.execute(_FARM).mappings().one()
            workers = connection.execute(_WORKERS, {"lease": lease_s}).mappings().all()
        counts = row["counts"] or {}
        return Farm(
            at=row["at"],
            counts={state: counts.get(state.value, 0) for state in State},
            oldest_queued_s=row["oldest_queued_s"],
            images_last_minute=row["images_last_minute"],
            published=row["published"],
            workers=[Worker(**worker) for worker in workers],
        )

    def backlog(self) -> list[dict[str, Any]]:
        """The view ``ops_backlog``: for each priority with open jobs how many wait, are delayed, and run."""
        with self._begin() as connection:
            return [dict(row) for row in connection.execute(text("SELECT * FROM ops_backlog")).mappings()]

    # A person's steps.

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
            connection.execute(text("SET LOCAL statement_timeout = 0"))
            connection.execute(_CANCEL, {"job": None, "batch": batch_id})
        return self.batch(batch_id)

    # A worker's steps, in the order of a job's way.

    def beat(self, worker_id: UUID, description: dict[str, Any], drawing: str) -> None:
        """The worker's heartbeat: host, pid, device, model, revision, version, capacity, and what it draws (JSON)."""
        with self._single() as connection:
            connection.execute(_BEAT, {"id": worker_id, "drawing": drawing, **description})

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

    def mark_alone(self, claim: Claim) -> None:
        """The suspect has the process to itself: a death from here on is its own. Raises: LostClaim."""
        with self._single() as connection:
            marked = connection.execute(_MARK_ALONE, _fence(claim))
        if marked.rowcount != 1:
            raise LostClaim(claim.job_id, claim.claim)

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
        """The worker drains, or never learnt of its claim: back to the queue, no failure charged. Raises: LostClaim."""
        self._settle(fence, Outcome.DRAINED, None, None, charge=0)

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

    def window(self, *, lease_s: float) -> tuple[int, int]:
        """(messages that nobody has claimed yet, live workers)."""
        with self._single() as connection:
            row = connection.execute(_WINDOW, {"lease": lease_s}).one()
        return row.published, row.workers

    def next_messages(self, holder: UUID, limit: int) -> list[Message]:
        """Put the next queued jobs into the window, most urgent first, and return their messages to publish."""
        with self._single() as connection:
            rows = connection.execute(_NEXT_MESSAGES, {"holder": holder, "limit": limit})
            return [Message(row.job_id, row.claim) for row in rows]

    def overdue_messages(self, holder: UUID, *, audit_s: float) -> list[Message]:
        """The messages that should be in Redis for longer than ``audit_s``; rows that should not are removed."""
        with self._begin() as connection:
            connection.execute(_STALE_MESSAGES, {"holder": holder})
            rows = connection.execute(_OVERDUE_MESSAGES, {"holder": holder, "audit": audit_s})
            return [Message(row.job_id, row.claim) for row in rows]

    def republishing(self, holder: UUID, messages: Sequence[Message]) -> None:
        """Note that these are published again now."""
        statement = text(f"UPDATE messages SET published_at = now() WHERE job_id = ANY(:ids) AND {_LEADS}")
        with self._single() as connection:
            connection.execute(statement, {"ids": [message.job_id for message in messages], "holder": holder})

    def reclaim(self, holder: UUID, *, lease_s: float) -> list[tuple[UUID, State]]:
        """Take back the jobs of workers that have been silent for a lease; returns each job and its new state.

        Every one becomes a suspect and is next drawn alone; only a death while alone is charged as a failure.
        """
        with self._begin() as connection:
            rows = connection.execute(_RECLAIM, {"holder": holder, "lease": lease_s}).all()
            if rows:
                _notify(connection)
        return [(row.id, State(row.state)) for row in rows]

    @contextmanager
    def listening(self) -> Iterator["Listener"]:
        """A connection of its own that wakes up when a job is queued."""
        url = self._engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
        with reaching("Postgres"), psycopg.connect(url, autocommit=True, **CONNECT_ARGS) as connection:
            connection.execute(f"LISTEN {CHANNEL}")
            yield Listener(connection)


class Listener:
    """Waits for a commit that queues a job."""

    def __init__(self, connection: "psycopg.Connection[Any]") -> None:
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


def _copy_jobs(
    connection: Connection,
    batch_id: UUID | None,
    submissions: Iterable[Submission],
    max_failures: int,
    ids: Sequence[UUID] | None = None,
) -> int:
    """Insert the submissions through COPY, the fastest way in; returns how many there were."""
    count = 0
    cursor = connection.connection.cursor()
    with cursor.copy("COPY jobs (id, batch_id, position, name, priority, request, max_failures) FROM STDIN") as copy:
        for count, submission in enumerate(submissions, start=1):
            copy.write_row(
                (
                    ids[count - 1] if ids else uuid4(),
                    batch_id,
                    count - 1,
                    submission.name,
                    submission.priority.rank,
                    submission.request().model_dump_json(),
                    max_failures,
                )
            )
    return count


_JOB_COLUMNS = ", ".join(column.name for column in jobs_table.columns if column.name in Job.model_fields)


def _job(row: Any) -> Job:
    return Job.model_validate({**row, "priority": Priority.of_rank(row["priority"])})


def _batches(connection: Connection, which: str, values: dict[str, Any]) -> list[Batch]:
    statement = text(
        f"""
        SELECT b.id, b.name, b.created_at, b.jobs,
               (SELECT coalesce(jsonb_object_agg(state, n), '{{}}')
                FROM (SELECT state, count(*) AS n FROM jobs WHERE batch_id = b.id GROUP BY state) AS s) AS counts
        FROM batches b {which}
        """
    )
    return [Batch.of(**row) for row in connection.execute(statement, values).mappings()]


_FARM = text(
    """
    SELECT now() AS at,
           (SELECT jsonb_object_agg(state, n)
            FROM (SELECT state, count(*) AS n FROM jobs GROUP BY state) AS s) AS counts,
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

_CANCEL = text(
    """
    WITH cancelled AS (
        UPDATE jobs SET state = 'cancelled', finished_at = now()
        WHERE (id = :job OR batch_id = :batch) AND state IN ('queued', 'running')
        RETURNING id, claim
    ), noted AS (
        UPDATE claims SET ended_at = now(), outcome = 'cancelled' FROM cancelled
        WHERE claims.job_id = cancelled.id AND claims.claim = cancelled.claim AND ended_at IS NULL
    )
    DELETE FROM messages USING cancelled WHERE messages.job_id = cancelled.id
    """
)

_BEAT = text(
    """
    INSERT INTO workers (id, host, pid, device, model, revision, version, capacity, drawing)
    VALUES (:id, :host, :pid, :device, :model, :revision, :version, :capacity, CAST(:drawing AS jsonb))
    ON CONFLICT (id) DO UPDATE SET heartbeat_at = now(), drawing = excluded.drawing
    """
)

_CLAIM = text(
    """
    WITH claimed AS (
        UPDATE jobs SET state = 'running', claim = :claim, worker_id = :worker, claimed_at = now(), drawn_alone = false,
                        waiting_s = extract(epoch FROM now() - greatest(created_at, not_before))
        WHERE id = :job AND state = 'queued' AND claim = :claim - 1 AND not_before <= now()
          AND NOT EXISTS (SELECT 1 FROM batches WHERE batches.id = jobs.batch_id AND paused)
        RETURNING batch_id, priority, suspect, waiting_s, request
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

_RECORD = text(
    """
    WITH recorded AS (
        UPDATE jobs SET state = 'succeeded', finished_at = now(), error_code = NULL, error_message = NULL,
               object_key = :object_key, sha256 = :sha256, size_bytes = :size_bytes, width_px = :width_px,
               height_px = :height_px, format = :format, drawing_s = :drawing_s, encoding_s = :encoding_s,
               uploading_s = :uploading_s, warnings = :warnings
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
            failures = failures + :charge, worker_id = NULL, drawn_alone = false,
            not_before = now() + make_interval(secs => :delay),
            error_code = coalesce(:code, error_code), error_message = coalesce(:message, error_message)
        WHERE id = :job AND state = 'running' AND claim = :claim AND worker_id = :worker
        RETURNING state
    ), noted AS (
        UPDATE claims SET ended_at = now(), error = :trace,
               outcome = CASE WHEN settled.state = 'failed' THEN 'failed' ELSE :outcome END
        FROM settled WHERE job_id = :job AND claim = :claim
    )
    SELECT count(*) FROM settled
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

_WINDOW = text(
    """
    SELECT (SELECT count(*) FROM messages) AS published,
           (SELECT count(*) FROM workers
            WHERE stopped_at IS NULL AND heartbeat_at > now() - make_interval(secs => :lease)) AS workers
    """
)

_NEXT_MESSAGES = text(
    f"""
    WITH next AS (
        SELECT j.id, j.claim + 1 AS claim FROM jobs j
        WHERE j.state = 'queued' AND j.not_before <= now() AND {_LEADS}
          AND NOT EXISTS (SELECT 1 FROM batches b WHERE b.id = j.batch_id AND b.paused)
          AND NOT EXISTS (SELECT 1 FROM messages m WHERE m.job_id = j.id)
        ORDER BY j.priority, j.seq LIMIT :limit
    )
    INSERT INTO messages (job_id, claim) SELECT id, claim FROM next
    ON CONFLICT (job_id) DO NOTHING RETURNING job_id, claim
    """
)

_STALE_MESSAGES = text(
    f"""
    DELETE FROM messages USING jobs
    WHERE jobs.id = messages.job_id AND (jobs.state <> 'queued' OR messages.claim <> jobs.claim + 1) AND {_LEADS}
    """
)

_OVERDUE_MESSAGES = text(
    f"SELECT job_id, claim FROM messages WHERE published_at < now() - make_interval(secs => :audit) AND {_LEADS}"
)

_RECLAIM = text(
    f"""
    WITH lost AS (
        SELECT jobs.id, jobs.claim FROM jobs LEFT JOIN workers ON workers.id = jobs.worker_id
        WHERE jobs.state = 'running' AND {_LEADS}
          AND (workers.id IS NULL OR workers.stopped_at IS NOT NULL
               OR workers.heartbeat_at < now() - make_interval(secs => :lease))
        FOR UPDATE OF jobs SKIP LOCKED
    ), noted AS (
        UPDATE claims SET ended_at = now(), outcome = 'lease_lost', error = 'the worker fell silent' FROM lost
        WHERE claims.job_id = lost.id AND claims.claim = lost.claim
    )
    UPDATE jobs SET
        state = CASE WHEN drawn_alone AND failures + 1 >= max_failures THEN 'failed' ELSE 'queued' END,
        finished_at = CASE WHEN drawn_alone AND failures + 1 >= max_failures THEN now() END,
        failures = failures + drawn_alone::int, suspect = true, drawn_alone = false, worker_id = NULL,
        error_code = 'worker_lost', error_message = 'the worker process died or fell silent while it held this job'
    FROM lost WHERE jobs.id = lost.id
    RETURNING jobs.id, jobs.state
    """
)
