"""The lines of a batch's input, counted by how they ended: one that asks for several images has several jobs.

Only OpenAI's door knows such lines. To a batch that came in another way each job is a line of its own, whatever number
of them a row of its manifest has become.
"""

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
        """Of each of these. Raises: Unavailable.

        Most is known without looking at a job. Where lines asked for several images, and some jobs have ended and some
        have no image, those without one are looked at: fewer with each that is drawn, and when all have ended only
        those that failed.
        """
        found: dict[UUID, LineCounts] = {}
        mixed: dict[UUID, int] = {}
        for batch in batches:
            told = _told_by_tallies(batch)
            if told is None:
                mixed[batch.id] = batch.lines
            found[batch.id] = told or LineCounts(batch.lines, batch.lines)
        if mixed:
            with self._database.single() as connection:
                for row in connection.execute(_WITHOUT_ALL_IMAGES, {"batches": list(mixed)}):
                    lines = mixed[row.batch_id]
                    found[row.batch_id] = LineCounts(lines, lines - row.open - row.failed, row.failed)
        return found


def _told_by_tallies(batch: Batch) -> LineCounts | None:
    """None if jobs must be looked at."""
    good = batch.counts[State.SUCCEEDED]
    if not batch.file_id or batch.lines == batch.jobs:
        return LineCounts(batch.jobs, good, batch.finished - good)
    if not batch.finished:
        return LineCounts(batch.lines)
    return LineCounts(batch.lines, batch.lines) if good == batch.jobs else None


_WITHOUT_ALL_IMAGES = text(
    """
    SELECT batch_id, count(*) FILTER (WHERE open) AS open, count(*) FILTER (WHERE NOT open) AS failed
    FROM (
        SELECT batch_id, bool_or(state IN ('queued', 'running')) AS open
        FROM jobs WHERE batch_id = ANY(:batches) AND state IN ('queued', 'running', 'failed', 'cancelled')
        GROUP BY batch_id, line
    ) AS lines
    GROUP BY batch_id
    """
)
