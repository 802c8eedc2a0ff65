"""Jobs and batches found by what is known of them, a page at a time.

In under 50 ms among ten million jobs; README has what was measured, and what is known to be slower.

A page follows an index from its beginning to its end: one index for each state, whose heads are merged, so that no
filter makes a query walk past rows of another state, tenant, batch or error. The next page begins behind the last row
of this one, which its cursor names; so rows that come and go meanwhile move nobody else.

A text in the prompt is looked up among ``prompt_words``, which a tenant's role may not read: Postgres would not use an
index for it under row-level security, since its operator is not leakproof. Such a search runs as the owner, and the
tenant stands in the statement itself. So does one of a batch, whose tenant is looked up once, or the planner would take
the tenant's index for it.
"""

import base64
import binascii
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Generic, NamedTuple, TypeVar
from uuid import UUID

from sqlalchemy import Connection, Row, RowMapping, text

from producer.jobs.contract import Batch, Job, State
from producer.jobs.errors import BadCursor
from producer.jobs.postgres import Database, as_owner
from producer.jobs.prompt_words import lexeme, owner_word, words_of
from producer.jobs.store.reading import JOB_COLUMNS, JOB_HOLDS, batches_where, job_of, page

Found = TypeVar("Found")
Keys = tuple[object, ...]
"""Of a row, in the order of its page."""

NUMBER_MAX = 2**63 - 1
NEIGHBOURS = 300
"""Rows of ``prompt_words``, of up to 100 jobs each, among which one page of a text is looked for."""
HOLDING = 75
"""Of these, so many at most whose jobs are looked at one by one."""
RARE = 20
"""Words that fewer than one in so many neighbours hold are looked up by their index."""


class Sort(StrEnum):
    """The order of a page; a minus: the last one first."""

    NEWEST = "-created_at"
    OLDEST = "created_at"
    LAST_FINISHED = "-finished_at"
    FIRST_FINISHED = "finished_at"

    @property
    def column(self) -> str:
        return self.removeprefix("-")

    @property
    def direction(self) -> str:
        return "DESC" if self.startswith("-") else "ASC"

    @property
    def order(self) -> str:
        return f"{self.column} {self.direction}, seq {self.direction}"

    @property
    def behind(self) -> str:
        """How what follows compares with what came before."""
        return "<" if self.startswith("-") else ">"

    @property
    def beyond(self) -> int:
        """Behind the numbers of all jobs."""
        return 0 if self.startswith("-") else NUMBER_MAX

    @property
    def states(self) -> list[State]:
        """Of jobs that have such a time at all."""
        return [state for state in State if state.terminal or self.column == "created_at"]


@dataclass(frozen=True)
class JobFilter:
    """What the jobs must be; None: anything. ``prompt`` holds at least one letter or digit."""

    state: State | None = None
    batch_id: UUID | None = None
    tenant: str | None = None
    error_code: str | None = None
    submitted_after: datetime | None = None  # that moment is included
    submitted_before: datetime | None = None
    prompt: str | None = None  # each of its words begins a word of the job's prompt


@dataclass(frozen=True)
class BatchFilter:
    """What the batches must be; None: anything."""

    finished: bool | None = None
    tenant: str | None = None
    name: str | None = None  # stands somewhere in the batch's


@dataclass(frozen=True)
class Page(Generic[Found]):
    """Some of what was found, and where the next page begins; None: this was the last.

    A page may hold fewer than were asked for and yet not be the last, where its jobs hold long texts. Of a text it may
    hold none: so no page takes longer because millions of jobs have the words, and none of them the state or error
    asked for.
    """

    found: list[Found]
    next: str | None


class Search:
    """Finds what the database shows."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def jobs(
        self,
        which: JobFilter = JobFilter(),
        *,
        sort: Sort = Sort.NEWEST,
        cursor: str | None = None,
        limit: int = 100,
    ) -> Page[Job]:
        """A text is found in the order of submission alone. Raises: BadCursor: it is no cursor of this order."""
        values = {**vars(which), "own": self._database.tenant}
        values["states"] = [which.state] if which.state else sort.states
        conditions = [condition for name, condition in _JOB_CONDITIONS.items() if values[name] is not None]
        if which.batch_id is None:
            conditions += [condition for name, condition in _TENANT_CONDITIONS.items() if values[name] is not None]
        else:
            conditions.append(_of_batch(values))
        if which.prompt is not None:
            return self._with_words(which, conditions, sort, values, cursor, limit)
        kind = sort.value
        if cursor is not None:
            values["at"], values["seq"] = _read_cursor(cursor, kind, _moment, int)
        statement = _in_order(conditions, sort, behind=cursor is not None)
        with self._database.begin() as connection, as_owner(connection) if which.batch_id else nullcontext():
            rows, more = page(connection, statement, JOB_HOLDS, sort.order, values, limit)
        return _page(rows, Cursor(kind, (rows[-1][sort.column], rows[-1]["seq"])) if more else None)

    def _with_words(
        self,
        which: JobFilter,
        conditions: Sequence[str],
        sort: Sort,
        values: dict[str, Any],
        cursor: str | None,
        limit: int,
    ) -> Page[Job]:
        kind = f"words{sort.value}"
        words = words_of(which.prompt or "")
        whose = self._database.tenant or which.tenant
        values |= {"whose": whose, "words": _query(words, whose)}
        values |= {"patterns": [_beginning(word) for word in words]}
        beside = [condition for name, condition in _HELD_CONDITIONS.items() if values[name] is not None]
        if cursor is not None:
            values["at"], values["id"], values["seq"] = _read_cursor(cursor, kind, _moment, int, int)
            conditions = [*conditions, f"(held.created_at, held.id, seq) {sort.behind} (:at, :id, :seq)"]
            beside = [*beside, f"(created_at, id) {sort.behind}= (:at, :id)"]
        with self._database.begin() as connection, as_owner(connection):
            rows, end = _Look(connection, sort, conditions, beside, values).found(limit)
        return _page(rows, Cursor(kind, end) if end else None)

    def batches(
        self,
        which: BatchFilter = BatchFilter(),
        *,
        cursor: str | None = None,
        limit: int = 20,
    ) -> Page[Batch]:
        """The newest first. Raises: BadCursor."""
        values = {**vars(which), "limit": limit + 1}
        if cursor is not None:
            values["at"], values["id"] = _read_cursor(cursor, "batches", _moment, UUID)
        conditions = [condition for name, condition in _BATCH_CONDITIONS.items() if values.get(name) is not None]
        if which.finished is not None:
            conditions.append(f"b.finished_at IS {'NOT ' if which.finished else ''}NULL")
        where = f"WHERE {_all(conditions)} ORDER BY b.created_at DESC, b.id DESC LIMIT :limit"
        with self._database.begin() as connection:
            found = batches_where(connection, where, values)
        last = found[limit - 1] if len(found) > limit else None
        return Page(found[:limit], Cursor("batches", (last.created_at, last.id)).text if last else None)


_JOB_CONDITIONS = {
    "error_code": "jobs.error_code = :error_code",
    "submitted_after": "jobs.created_at >= :submitted_after",
    "submitted_before": "jobs.created_at < :submitted_before",
}

_TENANT_CONDITIONS = {
    "own": "jobs.tenant = :own",
    "tenant": "jobs.tenant = :tenant",
}

_HELD_CONDITIONS = {
    "whose": "tenant = :whose",
    "batch_id": "batch_id = :batch_id",
    "submitted_after": "created_at >= :submitted_after",
    "submitted_before": "created_at < :submitted_before",
}
"""Those of neighbours as of each job among them."""

_BATCH_CONDITIONS = {
    "tenant": "b.tenant = :tenant",
    "name": "strpos(lower(b.name), lower(:name)) > 0",
    "at": "(b.created_at, b.id) < (:at, :id)",
}


def _of_batch(values: Mapping[str, Any]) -> str:
    """The batch's jobs, which are all of its tenant."""
    whose = [f"tenant = :{name}" for name in _TENANT_CONDITIONS if values[name] is not None]
    return f"jobs.batch_id = (SELECT id FROM batches WHERE {_all(['id = :batch_id', *whose])})"


def _in_order(conditions: Sequence[str], sort: Sort, *, behind: bool) -> str:
    """The head of each state's index, merged."""
    order = f"ORDER BY {sort.order} LIMIT :most"
    asked = ["jobs.state = wanted.state", f"jobs.{sort.column} IS NOT NULL", *conditions]
    if behind:
        asked.append(f"(jobs.{sort.column}, jobs.seq) {sort.behind} (:at, :seq)")
    return f"""
        SELECT found.* FROM unnest(CAST(:states AS text[])) AS wanted (state)
        CROSS JOIN LATERAL (SELECT {JOB_COLUMNS}, seq FROM jobs WHERE {_all(asked)} {order}) AS found {order}
    """


@dataclass(frozen=True)
class _Look:
    """For words: first among the nearest neighbours, which fill a page if the words are common; if they are rare there,
    among those further on that the index names.

    ``conditions`` are of the jobs, ``beside`` of the neighbours. Whether to ask the index is settled here, since the
    planner takes any words for common.
    """

    connection: Connection
    sort: Sort
    conditions: Sequence[str]
    beside: Sequence[str]
    values: dict[str, Any]

    def found(self, limit: int) -> tuple[list[RowMapping], Keys | None]:
        """The jobs, ``limit`` at most, and, if there may be more, behind what."""
        walked = self._neighbours(_WALK, most=NEIGHBOURS)
        holding = [neighbour for neighbour in walked if neighbour.holds]
        jobs, behind = self._jobs_among(holding[:HOLDING], limit)
        if behind:
            return jobs, behind
        if len(holding) > HOLDING:
            return jobs, self._end_of(holding[HOLDING - 1])
        if len(walked) < NEIGHBOURS:
            return jobs, None
        if len(jobs) == limit or len(holding) * RARE > len(walked):
            return jobs, self._end_of(walked[-1])
        further = self._neighbours(_BY_INDEX, most=HOLDING, end_at=walked[-1].created_at, end_id=walked[-1].id)
        found, behind = self._jobs_among(further, limit - len(jobs))
        if not behind and len(further) == HOLDING:
            behind = self._end_of(further[-1])
        return jobs + found, behind

    def _end_of(self, neighbour: Row[Any]) -> Keys:
        """Behind all of its jobs."""
        return neighbour.created_at, neighbour.id, self.sort.beyond

    def _neighbours(self, statement: str, **values: object) -> Sequence[Row[Any]]:
        asked = statement.format(beside=_all(self.beside), direction=self.sort.direction, behind=self.sort.behind)
        return self.connection.execute(text(asked), self.values | values).all()

    def _jobs_among(self, neighbours: Sequence[Row[Any]], limit: int) -> tuple[list[RowMapping], Keys | None]:
        """The jobs, ``limit`` at most, and the last of them if there are more."""
        if not neighbours:
            return [], None
        order = _HELD_ORDER.format(direction=self.sort.direction)
        statement = _JOBS_AMONG.format(asked=_all(self.conditions), direction=self.sort.direction, order=order)
        values = self.values | {"ids": [neighbour.id for neighbour in neighbours]}
        jobs, more = page(self.connection, statement, JOB_HOLDS, order, values, limit)
        return jobs, (jobs[-1]["held_at"], jobs[-1]["held_id"], jobs[-1]["seq"]) if more else None


_WALK = """
    SELECT id, created_at, words @@ CAST(:words AS tsquery) AS holds FROM prompt_words
    WHERE {beside} ORDER BY created_at {direction}, id {direction} LIMIT :most
"""

_BY_INDEX = """
    WITH held AS MATERIALIZED (
        SELECT id, created_at FROM prompt_words
        WHERE words @@ CAST(:words AS tsquery) AND (created_at, id) {behind} (:end_at, :end_id) AND {beside}
    )
    SELECT id, created_at FROM held ORDER BY created_at {direction}, id {direction} LIMIT :most
"""

# OFFSET 0 keeps the planner from looking for the jobs in any other way than neighbour by neighbour, by their place.
_JOBS_AMONG = f"""
    SELECT jobs.*, held.id AS held_id, held.created_at AS held_at
    FROM (SELECT * FROM prompt_words WHERE id = ANY(:ids)
          ORDER BY created_at {{direction}}, id {{direction}} OFFSET 0) AS held
    CROSS JOIN LATERAL (
        SELECT {JOB_COLUMNS}, seq FROM (
            SELECT * FROM jobs WHERE batch_id = held.batch_id
                                 AND position BETWEEN held.first_position AND held.last_position
            UNION ALL
            SELECT * FROM jobs WHERE id = held.job_id
            OFFSET 0
        ) AS jobs
        WHERE state = ANY(:states) AND lower(request ->> 'prompt') ~ ALL(CAST(:patterns AS text[])) AND {{asked}}
    ) AS jobs
    ORDER BY {{order}} LIMIT :most
"""
_HELD_ORDER = "held_at {direction}, held_id {direction}, seq {direction}"


def _page(rows: Sequence[Any], following: "Cursor | None") -> Page[Job]:
    return Page([job_of(row) for row in rows], following.text if following else None)


def _all(conditions: Sequence[str]) -> str:
    return " AND ".join(conditions) or "true"


def _query(words: Sequence[str], tenant: str | None) -> str:
    """A tsquery: neighbours of this tenant among whose words each of these begins one."""
    asked = [f"{lexeme(word)}:*" for word in words]
    return " & ".join(asked if tenant is None else [lexeme(owner_word(tenant)), *asked])


def _beginning(word: str) -> str:
    """A regular expression for what is in lower case as far as the database's locale knows it: ASCII alone in C."""
    letters = "".join(letter if letter.isascii() else f"[{letter}{letter.upper()}]" for letter in word)
    return f"(^|[^a-z0-9]){letters}" if word[0].isascii() else letters


class Cursor(NamedTuple):
    """Behind which row the next page begins: the order that it stands in, and its keys there."""

    kind: str
    keys: Keys

    @property
    def text(self) -> str:
        keys = [key.isoformat() if isinstance(key, datetime) else str(key) for key in self.keys]
        return base64.urlsafe_b64encode(" ".join([self.kind, *keys]).encode()).decode().rstrip("=")


def _read_cursor(cursor: str, kind: str, *reads: Callable[[str], Any]) -> list[Any]:
    """Its keys, each read in its way. Raises: BadCursor."""
    try:
        padded = cursor.encode("ascii") + b"=" * (-len(cursor) % 4)
        found_kind, *found = base64.b64decode(padded, b"-_", validate=True).decode("ascii").split(" ")
        if found_kind != kind:
            raise BadCursor
        keys = [read(key) for read, key in zip(reads, found, strict=True)]
    except (ValueError, OverflowError, binascii.Error) as error:
        raise BadCursor from error
    if any(isinstance(key, int) and not 0 <= key <= NUMBER_MAX for key in keys):
        raise BadCursor
    return keys


def _moment(written: str) -> datetime:
    """Raises: ValueError."""
    moment = datetime.fromisoformat(written)
    if moment.tzinfo is None:
        raise ValueError("without a time zone")
    return moment
