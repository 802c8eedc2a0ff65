"""What a dispatcher does while it leads: it fills the window, takes back what is lost, ends batches, folds tallies."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import psycopg
from sqlalchemy import text

from producer.jobs.contract import Lane, Message, Next, Outgoing, Priority, State, Window
from producer.jobs.postgres import reaching
from producer.jobs.store.part import CHANNEL, Part, notify
from producer.jobs.tallies import BATCH_OPEN


class Leading(Part):
    """What changes a row is the leader's alone: if ``holder`` only believes to lead, nothing is changed."""

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
                notify(connection)
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
