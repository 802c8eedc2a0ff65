"""The lines of a batch's input, counted by how they ended: one that asks for several images has several jobs."""

from collections.abc import Sequence
from typing import NamedTuple
from uuid import UUID

from sqlalchemy import text

from producer.jobs.contract import Batch, State
from producer.jobs.postgres import Database


class LineCounts(NamedTuple):
    """Lines of one batch that became jobs. One has ended with the last of its jobs, and badly if one of them did."""

    lines: int = 0
    completed: int = 0
    failed: int = 0


class Lines:
    """The lines of the batches whose rows the database shows."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def counts(self, batches: Sequence[Batch]) -> dict[UUID, LineCounts]:
        """Of each of these. Only where lines asked for several images must jobs be looked at."""
        found = {batch.id: _of_single_images(batch) for batch in batches}
        several = [batch.id for batch in batches if batch.lines < batch.jobs]
        if several:
            with self._database.single() as connection:
                for row in connection.execute(_COUNTS, {"batches": several}):
                    found[row.batch_id] = LineCounts(row.lines, row.completed, row.failed)
        return found


def _of_single_images(batch: Batch) -> LineCounts:
    good = batch.counts[State.SUCCEEDED]
    return LineCounts(batch.jobs, good, batch.finished - good)


_COUNTS = text(
    """
    SELECT batch_id, count(*) AS lines, count(*) FILTER (WHERE ended AND good) AS completed,
           count(*) FILTER (WHERE ended AND NOT good) AS failed
    FROM (
        SELECT batch_id, bool_and(state NOT IN ('queued', 'running')) AS ended, bool_and(state = 'succeeded') AS good
        FROM jobs WHERE batch_id = ANY(:batches) GROUP BY batch_id, coalesce(line, position + 1)
    ) AS lines
    GROUP BY batch_id
    """
)
