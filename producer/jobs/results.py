"""What became of each line of a batch's input, in the input's order. Knows no HTTP and no file format.

Read page by page, in as many short transactions: whoever reads a large batch that is being drawn sees each job as it
was when its page was read. Invariant: a line that became several jobs gives as many results, one that was refused
gives one, and their order never changes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from heapq import merge
from typing import Any
from uuid import UUID

from sqlalchemy import text

from producer.jobs.contract import Job, Rejection
from producer.jobs.errors import TooManyColumns
from producer.jobs.file_names import FileNames
from producer.jobs.store import Store

PAGE = 250
"""Rows that are in memory at once, or fewer that are long: see ``reading.PAGE_MAX_BYTES``."""
COLUMNS_MAX = 20_000
"""Of one table."""


@dataclass(frozen=True)
class Result:
    """One line's job, with the name of its file; or why the line became none."""

    line: int
    source: dict[str, Any]
    job: Job | None = None
    file_name: str = ""
    rejection: Rejection | None = None


class Results:
    """Reads batches back."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def columns(self, batch_id: UUID, *, called: str | None = None) -> list[str]:
        """What the lines of the input held, in the order in which it is first met. Empty for jobs without an input.

        ``called``: a regular expression that the columns are to match from end to end. Raises: TooManyColumns.
        """
        with self._store.database.begin() as connection:
            # A million lines of 50 columns take some 30 s on two cores, and longer beside other work.
            connection.execute(text("SET LOCAL statement_timeout = 0"))
            values = {"batch": batch_id, "called": called and f"^({called})$", "limit": COLUMNS_MAX + 1}
            found = list(connection.execute(_COLUMNS, values).scalars())
        if len(found) > COLUMNS_MAX:
            raise TooManyColumns(COLUMNS_MAX)
        return found

    def of(self, batch_id: UUID) -> Iterator[Result]:
        """All of them, one by one. Raises: NotFound, Unavailable, while they are read."""
        yield from merge(self._drawn(batch_id), self._rejected(batch_id), key=lambda result: result.line)

    def named_jobs(self, batch_id: UUID) -> Iterator[tuple[Job, str]]:
        """All jobs in their order, each with the name of its file. Raises: NotFound, Unavailable."""
        names = FileNames()
        after = -1
        while page := self._store.batch_jobs(batch_id, after=after, limit=PAGE):
            for job in page:
                yield job, names.name(job.file_name, job.position)
            after = page[-1].position

    def _drawn(self, batch_id: UUID) -> Iterator[Result]:
        for job, file_name in self.named_jobs(batch_id):
            line = job.position + 1 if job.line is None else job.line
            yield Result(line, job.source or {}, job=job, file_name=file_name)

    def _rejected(self, batch_id: UUID) -> Iterator[Result]:
        after = 0
        while page := self._store.rejections(batch_id, after=after, limit=PAGE):
            for rejection in page:
                yield Result(rejection.line, rejection.source, rejection=rejection)
            after = page[-1].line


_COLUMNS = text(
    """
    SELECT key FROM (
        SELECT line, source FROM jobs WHERE batch_id = :batch AND source IS NOT NULL
        UNION ALL
        SELECT line, source FROM rejections WHERE batch_id = :batch
    ) AS lines CROSS JOIN LATERAL json_object_keys(source) WITH ORDINALITY AS found (key, place)
    WHERE CAST(:called AS text) IS NULL OR key ~ :called
    GROUP BY key ORDER BY min(ARRAY[line, place]) LIMIT :limit
    """
)
