"""What became of jobs and batches, read on from a place so that nothing is missed and nothing is told twice.

Events are rows that triggers write (``migrations/versions/0005_events.py``) in the transaction that changes a job or a
batch. Transactions end in another order than they begin, so a number that only grows is no safe place to read on from:
what a slower transaction wrote appears behind it later. A cursor is therefore a place in the order of (transaction,
id), with the transactions before it that had not ended when it was made; what those write is told when they end, and
told once. So an upload of minutes delays nobody's events, as it would if readers waited for every older transaction.

Nobody is notified, since Postgres lets commits that notify wait for each other: one reader a process asks, and asks
for all its streams at once.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import text

from producer.jobs.contract import EventKind
from producer.jobs.postgres import Database

PAGE = 500
"""Events that one read gives a stream at most."""
RUNNING_MAX = 1000
"""Transactions that a cursor names at most: many times the connections that a Postgres has."""
KEPT_DAYS = 7
_LAST = 2**63 - 1
_CURSOR = re.compile(r"(\d{1,19})-(\d{1,19})((?:~\d{1,19}-\d{1,19})*)", re.ASCII)


@dataclass(frozen=True)
class Target:
    """Whose events are read: of a batch and all its jobs, or of one job."""

    batch_id: UUID | None = None
    job_id: UUID | None = None


@dataclass(frozen=True)
class Cursor:
    """What has been told: all up to ``(transaction, id)``, but of each transaction in ``running`` only what is up to
    the id beside it."""

    transaction: int = 0
    id: int = 0
    running: Mapping[int, int] = field(default_factory=dict)

    def __str__(self) -> str:
        places = [(self.transaction, self.id), *sorted(self.running.items())]
        return "~".join(f"{transaction}-{id}" for transaction, id in places)

    @classmethod
    def parse(cls, written: str) -> "Cursor":
        """Raises: ValueError: it is none."""
        found = _CURSOR.fullmatch(written)
        if found is None:
            raise ValueError("is no id of an event")
        numbers = [place.split("-") for place in written.split("~")]
        places = [(int(transaction), int(id)) for transaction, id in numbers]
        (transaction, id), *running = places
        behind = [before for before, _ in running if before >= transaction]
        if behind or len(running) > RUNNING_MAX or max(max(place) for place in places) > _LAST:
            raise ValueError("is no id of an event")
        return cls(transaction, id, dict(running))

    def __hash__(self) -> int:
        return hash(str(self))


@dataclass(frozen=True)
class Snapshot:
    """Which transactions had ended at one moment: all below ``next`` that are not ``running``."""

    next: int
    running: frozenset[int]

    @classmethod
    def parse(cls, written: str) -> "Snapshot":
        """Postgres's own way to write one: ``xmin:xmax:running,running``."""
        _, following, running = written.split(":")
        return cls(int(following), frozenset(map(int, running.split(","))) if running else frozenset())


@dataclass(frozen=True)
class Event:
    """What became of a job or a batch. ``cursor``: with it told, read on from there; None: it is not stored."""

    kind: EventKind
    at: datetime | None
    batch_id: UUID | None
    job_id: UUID | None
    data: Mapping[str, Any]
    cursor: Cursor | None = None


@dataclass(frozen=True)
class News:
    """What one read gave a stream, in order, and whether there is more at once."""

    events: Sequence[Event]
    cursor: Cursor
    more: bool


@dataclass(frozen=True)
class Progress:
    """How far an image is that is being drawn."""

    job_id: UUID
    batch_id: UUID | None
    step: int
    steps: int
    preview_key: str | None
    at: datetime


class Events:
    """The farm's events. Every method raises ``Unavailable`` when Postgres does not answer."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def ahead(self, cursor: Cursor) -> bool:
        """Whether no transaction of this database has come so far: the cursor is another database's."""
        with self._database.single() as connection:
            following: int = connection.execute(_NEXT_TRANSACTION).scalar_one()
        return cursor.transaction >= following

    def exists(self, target: Target) -> bool:
        """Whether the job or batch is there for this database's tenant."""
        with self._database.single() as connection:
            return bool(connection.scalar(_EXISTS, vars(target)))

    def read(self, asked: Sequence[tuple[Target, Cursor]]) -> list[News]:
        """What happened behind each cursor, to each target: one statement for all of them."""
        if not asked:
            return []
        ranges = [(number, *part) for number, (target, cursor) in enumerate(asked) for part in _ranges(target, cursor)]
        names = ("numbers", "batches", "jobs", "firsts", "afters", "lasts")
        values = dict(zip(names, map(list, zip(*ranges, strict=True)), strict=True))
        found: dict[int, list[Any]] = {number: [] for number in range(len(asked))}
        snapshot = None
        with self._database.single() as connection:
            for row in connection.execute(_READ, values | {"most": PAGE}):
                snapshot = row.snapshot
                if row.kind is not None:
                    found[row.number].append(row)
        assert snapshot is not None  # each range gives a row, though it be empty
        ended = Snapshot.parse(snapshot)
        return [news_of(cursor, found[number], ended) for number, (_, cursor) in enumerate(asked)]

    def progress(self, targets: Iterable[Target], *, lease_s: float) -> list[Progress]:
        """How far the images of these jobs and batches are, as the last heartbeats of live workers told."""
        wanted = list(targets)
        values = {
            "batches": [target.batch_id for target in wanted if target.batch_id],
            "jobs": [target.job_id for target in wanted if target.job_id],
            "lease": lease_s,
        }
        with self._database.single() as connection:
            return [Progress(**row) for row in connection.execute(_PROGRESS, values).mappings()]

    def prune(self, most: int = 10_000) -> int:
        """Delete up to ``most`` events that are older than ``KEPT_DAYS``; returns how many."""
        with self._database.single() as connection:
            return connection.execute(_PRUNE, {"days": KEPT_DAYS, "most": most}).rowcount


def _ranges(target: Target, cursor: Cursor) -> list[tuple[UUID | None, UUID | None, int, int, int]]:
    """The parts of the order that the cursor has not seen: first transaction, after which id of it, last one."""
    parts = [(before, seen, before) for before, seen in sorted(cursor.running.items())]
    parts.append((cursor.transaction, cursor.id, _LAST))
    return [(target.batch_id, target.job_id, *part) for part in parts]


def news_of(cursor: Cursor, rows: Sequence[Any], snapshot: Snapshot) -> News:
    """The rows that were found behind ``cursor``, each range's first ``PAGE``, as events with the cursor behind each.

    The rows of transactions that the cursor names come first, then those beyond it: both in the order of
    (transaction, id).
    """
    late = [row for row in rows if row.transaction in cursor.running]
    events = []
    for row in late:
        cursor = Cursor(cursor.transaction, cursor.id, {**cursor.running, row.transaction: row.id})
        events.append(_event(row, cursor))
    cut = {transaction for transaction in cursor.running if _is_cut(late, transaction)}
    still = {before: seen for before, seen in cursor.running.items() if before in snapshot.running or before in cut}
    cursor = Cursor(cursor.transaction, cursor.id, still)
    beyond = [row for row in rows if row.transaction >= cursor.transaction]
    for row in beyond:
        passed = {x: 0 for x in snapshot.running if cursor.transaction < x < row.transaction}
        cursor = Cursor(row.transaction, row.id, {**passed, **cursor.running})
        events.append(_event(row, cursor))
    return News(events, cursor, more=bool(cut) or len(beyond) == PAGE)


def _is_cut(rows: Sequence[Any], transaction: int) -> bool:
    return len([row for row in rows if row.transaction == transaction]) == PAGE


def _event(row: Any, cursor: Cursor) -> Event:
    return Event(EventKind(row.kind), row.at, row.batch_id, row.job_id, row.data, cursor)


_NEXT_TRANSACTION = text("SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint")

_EXISTS = text(
    "SELECT EXISTS (SELECT FROM jobs WHERE id = :job_id) OR EXISTS (SELECT FROM batches WHERE id = :batch_id)"
)

_COLUMNS = "e.transaction, e.id, e.batch_id, e.job_id, e.kind, e.data, e.at"
_UNSEEN = "(e.transaction, e.id) > (asked.first, asked.after) AND e.transaction <= asked.last"
_FIRST = "ORDER BY e.transaction, e.id LIMIT :most"

_READ = text(
    f"""
    SELECT asked.number, found.*, pg_current_snapshot()::text AS snapshot
    FROM unnest(CAST(:numbers AS int[]), CAST(:batches AS uuid[]), CAST(:jobs AS uuid[]), CAST(:firsts AS bigint[]),
                CAST(:afters AS bigint[]), CAST(:lasts AS bigint[]))
        AS asked (number, batch_id, job_id, first, after, last)
    LEFT JOIN LATERAL (
        (SELECT {_COLUMNS} FROM events e WHERE e.batch_id = asked.batch_id AND {_UNSEEN} {_FIRST})
        UNION ALL
        (SELECT {_COLUMNS} FROM events e WHERE e.job_id = asked.job_id AND {_UNSEEN} {_FIRST})
    ) AS found ON true
    ORDER BY asked.number, found.transaction, found.id
    """
)

# The jobs are looked up one by one: a join could be planned as a scan of all jobs of a batch.
_PROGRESS = text(
    """
    SELECT job.id AS job_id, job.batch_id, drawn.step, drawn.steps, job.preview_key, heartbeat_at AS at
    FROM workers CROSS JOIN LATERAL jsonb_to_recordset(drawing) AS drawn (job uuid, step int, steps int)
    CROSS JOIN LATERAL (
        SELECT id, batch_id, preview_key FROM jobs
        WHERE id = drawn.job AND state = 'running' AND worker_id = workers.id LIMIT 1
    ) AS job
    WHERE stopped_at IS NULL AND heartbeat_at > now() - make_interval(secs => :lease)
      AND (job.id = ANY(CAST(:jobs AS uuid[])) OR job.batch_id = ANY(CAST(:batches AS uuid[])))
    """
)

_PRUNE = text(
    """
    DELETE FROM events WHERE (transaction, id) IN (
        SELECT transaction, id FROM events WHERE at < now() - make_interval(days => :days) LIMIT :most)
    """
)
