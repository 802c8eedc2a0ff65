"""What is there: jobs, batches, tenants, the farm at a moment. Searches have a file of their own, ``jobs.search``."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, RowMapping, text

from producer.jobs.contract import Batch, Farm, Job, Priority, Rejection, Standing, State, Tenant, Worker
from producer.jobs.errors import NotFound
from producer.jobs.store.part import Part
from producer.jobs.table import jobs as jobs_table
from producer.jobs.tallies import BATCH_COUNTS, FARM_COUNTS


class Reading(Part):
    """The questions. Nothing is changed."""

    def job(self, job_id: UUID) -> Job:
        """Raises: NotFound."""
        with self._begin() as connection:
            return job_where(connection, job_id)

    def standings(self, job_ids: Sequence[UUID]) -> dict[UUID, Standing]:
        """Where these jobs are; one that does not exist is left out."""
        statement = text("SELECT id, state, preview_key FROM jobs WHERE id = ANY(:ids)")
        with self._single() as connection:
            rows = connection.execute(statement, {"ids": list(job_ids)})
            return {row.id: Standing(State(row.state), row.preview_key) for row in rows}

    def batch(self, batch_id: UUID) -> Batch:
        """Raises: NotFound."""
        with self._begin() as connection:
            return batch_where(connection, batch_id)

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
        """The batch's jobs in the order of submission, those behind position ``after``: as many as a page holds, and
        none only where there are no more. Raises: NotFound."""
        return self.batch_page(batch_id, after=after, limit=limit, state=state)[0]

    def batch_page(
        self, batch_id: UUID, *, after: int = -1, limit: int = 1000, state: State | None = None
    ) -> tuple[list[Job], bool]:
        """The same, and whether there are more. Raises: NotFound."""
        values = {"batch": batch_id, "after": after, "state": state}
        with self._begin() as connection:
            rows, more = page(connection, _BATCH_JOBS, JOB_HOLDS, "position", values, limit)
            if not rows and not connection.scalar(
                text("SELECT count(*) FROM batches WHERE id = :id"), {"id": batch_id}
            ):
                raise NotFound("batch", batch_id)
        return [job_of(row) for row in rows], more

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
            rows = connection.execute(text(f"SELECT {TENANT_COLUMNS} FROM tenants ORDER BY name")).mappings()
            return [Tenant(**row) for row in rows]

    def rejections(self, batch_id: UUID, *, after: int = 0, limit: int = 1000) -> list[Rejection]:
        """The lines of the batch's input that became no job, in their order, behind line ``after``: as many as a page
        holds, and none only where there are no more."""
        return self.rejection_page(batch_id, after=after, limit=limit)[0]

    def rejection_page(self, batch_id: UUID, *, after: int = 0, limit: int = 1000) -> tuple[list[Rejection], bool]:
        """The same, and whether there are more."""
        values = {"batch": batch_id, "after": after}
        with self._begin() as connection:
            rows, more = page(connection, _REJECTIONS, _REJECTION_HOLDS, "line", values, limit)
        return [Rejection(**{field: row[field] for field in REJECTION_FIELDS}) for row in rows], more


def _keep_own_drawing(connection: Connection, workers: Sequence[dict[str, Any]]) -> None:
    """Row security cannot look into what a worker draws, so others' jobs are taken out here."""
    own = {str(job_id) for job_id in connection.scalars(text("SELECT id FROM jobs WHERE state = 'running'"))}
    for worker in workers:
        worker["drawing"] = [entry for entry in worker["drawing"] if entry.get("job") in own]


PAGE_MAX_BYTES = 2_000_000
"""Of what people wrote into the rows of one page, as JSON. A page ends before its limit where they hold more, so none
is large in memory, however long its rows are; one row it always has."""


def page(
    connection: Connection, rows: str, holds: str, order: str, values: Mapping[str, Any], limit: int
) -> tuple[list[RowMapping], bool]:
    """The first ``limit`` of ``rows``, or fewer, see ``PAGE_MAX_BYTES``; and whether there are more.

    ``rows`` is a statement that ends with ``LIMIT :most``; ``holds``, in SQL, is how many bytes one row holds.
    """
    statement = text(
        f"""
        SELECT * FROM (
            SELECT found.*, row_number() OVER behind AS place, sum({holds}) OVER behind AS held,
                   count(*) OVER () AS reached
            FROM ({rows}) AS found WINDOW behind AS (ORDER BY {order} ROWS UNBOUNDED PRECEDING)
        ) AS found WHERE place = 1 OR (place < :most AND held <= :most_bytes) ORDER BY place
        """
    )
    asked = {**values, "most": limit + 1, "most_bytes": PAGE_MAX_BYTES}
    found = list(connection.execute(statement, asked).mappings())
    return found, bool(found) and found[0]["reached"] > len(found)


TENANT_COLUMNS = ", ".join(Tenant.model_fields)
JOB_COLUMNS = ", ".join(column.name for column in jobs_table.columns if column.name in Job.model_fields)
JOB_HOLDS = "octet_length(request::text) + coalesce(octet_length(source::text), 0)"
REJECTION_FIELDS = [field.name for field in fields(Rejection)]

_BATCH_JOBS = f"""
    SELECT {JOB_COLUMNS} FROM jobs
    WHERE batch_id = :batch AND position > :after AND (CAST(:state AS text) IS NULL OR state = :state)
    ORDER BY position LIMIT :most
"""

_REJECTIONS = f"""
    SELECT {", ".join(REJECTION_FIELDS)} FROM rejections
    WHERE batch_id = :batch AND line > :after ORDER BY line LIMIT :most
"""
_REJECTION_HOLDS = "octet_length(source::text) + octet_length(message)"


def job_of(row: Any) -> Job:
    return Job.model_validate({**row, "priority": Priority.of_rank(row["priority"])})


def job_where(connection: Connection, job_id: UUID) -> Job:
    """The job with this id. Raises: NotFound."""
    statement = text(f"SELECT {JOB_COLUMNS} FROM jobs WHERE id = :id")
    row = connection.execute(statement, {"id": job_id}).mappings().first()
    if row is None:
        raise NotFound("job", job_id)
    return job_of(row)


def batch_where(connection: Connection, batch_id: UUID) -> Batch:
    """The batch with this id. Raises: NotFound."""
    found = batches_where(connection, "WHERE b.id = :id", {"id": batch_id})
    if not found:
        raise NotFound("batch", batch_id)
    return found[0]


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
