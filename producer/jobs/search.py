"""Jobs and batches found by what is known of them, a page at a time.

To be in under 50 ms among ten million jobs; what was measured, and what is known to be slower, stands in README.

A page follows an index from its beginning to its end: one index for each state, whose heads are merged, so that no
filter makes a query walk past rows of another state, tenant, batch or error. The next page begins behind the last row
of this one, which its cursor names; so rows that come and go meanwhile move nobody else.

A text in the prompt is looked up among ``prompt_words``, which a tenant's role may not read: Postgres would not use an
index for it under row-level security, since its operator is not leakproof. Such a search runs as the owner, and the
tenant stands in the statement itself. So does one of a batch, or the planner would take the tenant's index for it.
"""

import base64
import binascii
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Generic, NamedTuple, TypeVar
from uuid import UUID

from sqlalchemy import text

from producer.jobs.contract import Batch, Job, State
from producer.jobs.errors import BadCursor
from producer.jobs.postgres import Database, as_owner
from producer.jobs.prompt_words import lexeme, owner_word, words_of
from producer.jobs.store import JOB_COLUMNS, batches_where, job_of

Found = TypeVar("Found")

NUMBER_MAX = 2**63 - 1
NEAREST = 100
"""Rows of ``prompt_words``, of up to 100 jobs each, that are searched without an index."""


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
    def behind(self) -> str:
        """How what follows compares with what came before."""
        return "<" if self.startswith("-") else ">"

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
    """Some of what was found, and where the next page begins; None: this was the last."""

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
        own = self._database.tenant
        values = {**vars(which), "own": own, "limit": limit + 1}
        values["states"] = [which.state] if which.state else sort.states
        conditions = [condition for name, condition in _JOB_CONDITIONS.items() if values.get(name) is not None]
        if which.batch_id is not None:  # by the batch's own index, not by the tenant's
            conditions = [condition.replace("jobs.tenant =", "jobs.tenant || '' =") for condition in conditions]
        if which.prompt is None:
            kind, key = sort.value, sort.column
            statement = _in_order(conditions, sort, behind=cursor is not None)
        else:
            kind, key = f"words{sort.value}", "held_id"
            words = words_of(which.prompt)
            values |= {"words": _query(words, own or which.tenant), "patterns": [_beginning(word) for word in words]}
            statement = _with_words(which, conditions, sort, behind=cursor is not None)
        if cursor is not None:
            values["at"], values["seq"] = _read_cursor(cursor, kind, int if which.prompt else _moment, int)
        freely = which.prompt is not None or which.batch_id is not None
        with self._database.begin() as connection, as_owner(connection) if freely else nullcontext():
            rows = connection.execute(text(statement), values).mappings().all()
        following = Cursor(kind, rows[limit - 1][key], rows[limit - 1]["seq"]).text if len(rows) > limit else None
        return Page([job_of(row) for row in rows[:limit]], following)

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
        return Page(found[:limit], Cursor("batches", last.created_at, last.id).text if last else None)


_JOB_CONDITIONS = {
    "own": "jobs.tenant = :own",
    "batch_id": "jobs.batch_id = :batch_id",
    "tenant": "jobs.tenant = :tenant",
    "error_code": "jobs.error_code = :error_code",
    "submitted_after": "jobs.created_at >= :submitted_after",
    "submitted_before": "jobs.created_at < :submitted_before",
}

_HELD_CONDITIONS = {
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


def _in_order(conditions: Sequence[str], sort: Sort, *, behind: bool) -> str:
    """The head of each state's index, merged."""
    order = f"ORDER BY {sort.column} {sort.direction}, seq {sort.direction} LIMIT :limit"
    asked = ["jobs.state = wanted.state", f"jobs.{sort.column} IS NOT NULL", *conditions]
    if behind:
        asked.append(f"(jobs.{sort.column}, jobs.seq) {sort.behind} (:at, :seq)")
    return f"""
        SELECT found.* FROM unnest(CAST(:states AS text[])) AS wanted (state)
        CROSS JOIN LATERAL (SELECT {JOB_COLUMNS}, seq FROM jobs WHERE {_all(asked)} {order}) AS found {order}
    """


def _with_words(which: JobFilter, conditions: Sequence[str], sort: Sort, *, behind: bool) -> str:
    """The jobs with the words among those neighbours that hold them; as many as are asked for.

    First the nearest neighbours are asked, which fill a page if the words are common, then all by the index. Each time
    whom to ask is settled before, since the planner takes any words for common. OFFSET 0 keeps the planner from looking
    for a hundred neighbours in any other way than by their place.
    """
    beside = [condition for name, condition in _HELD_CONDITIONS.items() if getattr(which, name) is not None]
    asked = ["state = ANY(:states)", "lower(request ->> 'prompt') ~ ALL(CAST(:patterns AS text[]))", *conditions]
    if behind:
        beside.append(f"id {sort.behind}= :at")
        asked.append(f"(held.id, seq) {sort.behind} (:at, :seq)")
    order = f"ORDER BY id {sort.direction}"
    place = "position BETWEEN held.first_position AND held.last_position"
    jobs = f"""
        SELECT jobs.*, held.id AS held_id FROM {{held}} AS held
        CROSS JOIN LATERAL (
            SELECT {JOB_COLUMNS}, seq FROM (
                SELECT * FROM jobs WHERE batch_id = held.batch_id AND {place}
                UNION ALL
                SELECT * FROM jobs WHERE id = held.job_id
                OFFSET 0
            ) AS jobs
            WHERE {_all(asked)}
        ) AS jobs
    """
    return f"""
        WITH nearest AS MATERIALIZED (
            SELECT id, batch_id, job_id, first_position, last_position, words FROM prompt_words
            WHERE {_all(beside)} {order} LIMIT {NEAREST}
        ), near AS MATERIALIZED (
            SELECT * FROM nearest WHERE words @@ CAST(:words AS tsquery) {order}
        ), found_near AS MATERIALIZED (
            {jobs.format(held="near")} ORDER BY held.id {sort.direction}, seq {sort.direction} LIMIT :limit
        ), further AS MATERIALIZED (
            SELECT id, batch_id, job_id, first_position, last_position FROM prompt_words
            WHERE words @@ CAST(:words AS tsquery) AND {_all(beside)}
              AND id {sort.behind} (SELECT id FROM nearest ORDER BY id {_OPPOSITE[sort.direction]} LIMIT 1)
              AND (SELECT count(*) FROM found_near) < :limit
            {order}
        )
        SELECT * FROM found_near
        UNION ALL
        (SELECT * FROM ({jobs.format(held="further")}) AS jobs
         ORDER BY held_id {sort.direction}, seq {sort.direction} LIMIT :limit)
        LIMIT :limit
    """


_OPPOSITE = {"ASC": "DESC", "DESC": "ASC"}


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
    """The last row of a page: which order it stands in, and its two keys there."""

    kind: str
    first: object
    second: object

    @property
    def text(self) -> str:
        first = self.first.isoformat() if isinstance(self.first, datetime) else self.first
        return base64.urlsafe_b64encode(f"{self.kind} {first} {self.second}".encode()).decode().rstrip("=")


def _read_cursor(cursor: str, kind: str, first: Any, second: Any) -> tuple[Any, Any]:
    """Its two keys. Raises: BadCursor."""
    try:
        padded = cursor.encode("ascii") + b"=" * (-len(cursor) % 4)
        found = base64.b64decode(padded, b"-_", validate=True).decode("ascii").split(" ")
        if len(found) != 3 or found[0] != kind:
            raise BadCursor
        keys = first(found[1]), second(found[2])
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
