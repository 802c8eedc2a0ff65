"""What a tenant may have: jobs that wait, jobs handed in a day, images drawn at the same time.

The first two are asked in the submitting transaction, so that a submission is within them as a whole or not made at
all, however many come at once: whoever submits for a tenant with limits takes its row's lock before the commit, and
looks again. The third is the dispatcher's: it publishes no more for a tenant than this leaves.

What a person sends back to the queue (a retry) waits beyond the limit and is no submission.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

from sqlalchemy import Connection, text

from producer.jobs.errors import Overloaded, TooManyJobs
from producer.jobs.postgres import Database, as_owner

QUEUE_RETRY_S = 30
"""When to ask again where too many wait: how fast they go is not known here."""

Handed = TypeVar("Handed")


class Allowance:
    """What a tenant may still hand in, in one submitting transaction. Counts nothing for a tenant without limits."""

    def __init__(self, connection: Connection, tenant: str, *, open_end: bool = False) -> None:
        """``open_end``: how many will wait is known last alone, since some may be drawn already.

        Raises: Overloaded: the tenant may hand in nothing now.
        """
        self._connection = connection
        self._values = {"tenant": tenant}
        self._limited = connection.execute(_LIMITED, self._values).scalar() is not None
        self._left = self._look(least=1) if self._limited and not open_end else None

    def within(self, entries: Iterable[Handed]) -> Iterator[Handed]:
        """The same, until they are more than was left: so no endless input is read in vain; with ``open_end`` all.

        Asks Postgres nothing, since rows are being copied to it meanwhile. Raises: Overloaded; TooManyJobs: they are
        more than ever may be at once.
        """
        entries = iter(entries)
        for count, entry in enumerate(entries, start=1):
            if self._left is not None:
                try:
                    _check(self._left, least=count)
                except Overloaded:
                    _check_ever(self._left, count, entries)
                    raise
            yield entry

    def settle(self, jobs: int) -> None:
        """To be called last, when so many were inserted. Raises: Overloaded: with those that came meanwhile it is
        too much."""
        if self._limited:
            with as_owner(self._connection):
                self._connection.execute(_LOCK, self._values)
                self._connection.execute(_COUNT, self._values | {"jobs": jobs})
            self._look(least=0)

    def _look(self, least: int) -> Any:
        left = self._connection.execute(_LEFT, self._values).one()
        _check(left, least)
        return left


def _check(left: Any, least: int) -> None:
    """Raises: Overloaded: fewer than ``least`` are left."""
    if left.queued_left is not None and left.queued_left < least:
        raise Overloaded(f"at most {left.max_queued:,} jobs of this tenant may wait", QUEUE_RETRY_S)
    if left.day_left is not None and left.day_left < least:
        raise Overloaded(f"this tenant may submit at most {left.max_a_day:,} jobs in 24 hours", left.day_retry_s)


def _check_ever(left: Any, count: int, more: Iterator[object]) -> None:
    """Raises: TooManyJobs: with ``more`` these are too many however long one waits."""
    for most, what in ((left.max_queued, "may wait"), (left.max_a_day, "may be submitted in 24 hours")):
        if most is not None:
            count += sum(1 for _ in islice(more, max(0, most + 1 - count)))
            if count > most:
                raise TooManyJobs(most, f"no more of this tenant {what}: hand in fewer, or have its limit raised")


def room_to_draw(database: Database) -> dict[str, int]:
    """How many more messages may be published for each tenant that may have so many images drawn at the same time.

    Below nought for one whose limit was lowered meanwhile. Raises: Unavailable.
    """
    with database.single() as connection:
        return {row.name: row.room for row in connection.execute(_ROOM_TO_DRAW)}


_LIMITED = text("SELECT 1 FROM tenants WHERE name = :tenant AND (max_queued IS NOT NULL OR max_a_day IS NOT NULL)")

_LOCK = text("SELECT FROM tenants WHERE name = :tenant FOR NO KEY UPDATE")

_COUNT = text(
    """
    WITH past AS (
        DELETE FROM submitted WHERE tenant = :tenant AND hour <= now() - interval '1 day'
    )
    INSERT INTO submitted (tenant, hour, jobs)
    SELECT name, date_trunc('hour', now()), :jobs FROM tenants WHERE name = :tenant AND max_a_day IS NOT NULL
    ON CONFLICT (tenant, hour) DO UPDATE SET jobs = submitted.jobs + excluded.jobs
    """
)

_LEFT = text(
    """
    SELECT max_queued, CASE WHEN max_queued IS NOT NULL THEN max_queued - (
               SELECT coalesce(sum(jobs), 0) FROM tallies
               WHERE tenant = :tenant AND batch_id IS NULL AND state = 'queued')
               END AS queued_left,
           max_a_day, CAST(max_a_day - day.jobs AS bigint) AS day_left,
           greatest(1, ceil(extract(epoch FROM day.first + interval '1 day' - now())))::int AS day_retry_s
    FROM tenants, LATERAL (
        SELECT coalesce(sum(jobs), 0) AS jobs, coalesce(min(hour), now()) AS first FROM submitted
        WHERE submitted.tenant = :tenant AND hour > now() - interval '1 day') AS day
    WHERE name = :tenant
    """
)
"""A day is its last 24 hours by the clock, the present one with them."""

# Each job is looked up by itself, as in the dispatcher's other statements about the window. Where no tenant has such a
# limit nothing is read but that.
_ROOM_TO_DRAW = text(
    """
    WITH busy AS (
        SELECT tenant FROM jobs
        WHERE state = 'running' AND EXISTS (SELECT FROM tenants WHERE max_running IS NOT NULL)
        UNION ALL
        SELECT (SELECT tenant FROM jobs WHERE jobs.id = job_id) FROM messages
        WHERE EXISTS (SELECT FROM tenants WHERE max_running IS NOT NULL)
    )
    SELECT name, max_running - count(busy.tenant) AS room FROM tenants LEFT JOIN busy ON busy.tenant = name
    WHERE max_running IS NOT NULL GROUP BY name, max_running
    """
)
