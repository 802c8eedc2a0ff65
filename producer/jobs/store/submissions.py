"""What is handed in: the commit is the promise. How rows are written stands in ``inserting``.

What is answered is read before the commit: nothing can go wrong after it, and look as if nothing had been submitted.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from uuid import uuid4

from psycopg.types.json import Json
from sqlalchemy import text

from producer.jobs.contract import DEFAULT_TENANT, Batch, Entry, Job, Rejection, Submission, SubmissionKey
from producer.jobs.limits import Allowance
from producer.jobs.store.inserting import (
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
from producer.jobs.store.part import notify
from producer.jobs.store.reading import Reading, batch_where, job_where


class Submissions(Reading):
    """The ways in."""

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
        """Insert one job, alone. A ``key`` that came before gives the job of then.

        Raises: KeyReused, Deleted, Overloaded.

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
                notify(connection)
            return job_where(connection, job_id if earlier is None else earlier.job_id)

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
        previews: int = 0,
        file_id: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Batch:
        """Insert a batch and its jobs in one transaction: all of them or none.

        ``entries`` is read once, row by row, so it may be a generator over a large file; an exception that it raises
        undoes everything and passes on. Rejections are held in memory until the jobs are in. A ``key`` that came
        before gives the batch of then, and reads nothing.

        Raises: KeyReused, Deleted, Overloaded, TooManyJobs, TooManyRejections.

        ``previews``: of each job, as for ``submit``.
        ``deduplicate``: what the tenant has drawn already is not drawn again; such jobs have succeeded at once, with
        the image of the other (``Job.copy_of``).
        """
        batch_id = uuid4()
        with self._begin() as connection:
            earlier = came_before(connection, tenant, key, batch_id=batch_id)
            if earlier is None:
                allowance = Allowance(connection, tenant, open_end=deduplicate)
                connection.execute(text("SET LOCAL statement_timeout = 0"))
                batch = {"id": batch_id, "tenant": tenant, "name": name, "weight": weight, "file": file_id}
                connection.execute(INSERT_BATCH, batch | {"metadata": Json(dict(metadata or {}))})
                lanes = batch_lanes(connection, tenant, batch_id)
                rejections: list[Rejection] = []
                good = allowance.within(without_rejections(entries, rejections))
                count, lines = copy_jobs(connection, Destination(tenant, batch_id, lanes, max_failures, previews), good)
                insert_rejections(connection, tenant, batch_id, rejections)
                counts = {"jobs": count, "lines": lines, "rejected": len(rejections)}
                connection.execute(COMPLETE_BATCH, {"id": batch_id, **counts})
                if deduplicate:
                    connection.execute(SHARE_DRAWN, {"batch": batch_id, "tenant": tenant})
                allowance.settle(count)
                notify(connection)
            return batch_where(connection, batch_id if earlier is None else earlier.batch_id)

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
        batch of then. Raises: KeyReused, Deleted."""
        batch_id = uuid4()
        batch = {"id": batch_id, "tenant": tenant, "name": name, "weight": 1.0, "file": file_id}
        values = batch | {"metadata": Json(dict(metadata or {})), "refused": Json([dict(fault) for fault in refused])}
        with self._begin() as connection:
            earlier = came_before(connection, tenant, key, batch_id=batch_id)
            if earlier is None:
                connection.execute(REFUSE_BATCH, values)
            return batch_where(connection, batch_id if earlier is None else earlier.batch_id)
