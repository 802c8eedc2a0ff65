"""The answers to what was asked with an idempotency key, so that asking again is answered as at first.

Submissions do without: their keys stand in ``submissions``, written in the very transaction that submits, and are only
removed from here. A row of ``answers`` is written before the work and completed after it. Whoever is at work renews it;
one that has not been renewed for ``LOST_S`` was left by a process that died, and what it did or not did is done again
by who asks next.

Invariant: a row is completed or removed only by the ``holder`` that it names.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID, uuid4

from psycopg.types.json import Json
from sqlalchemy import text

from producer.jobs.errors import KeyAtWork
from producer.jobs.postgres import Database

RENEW_S = 15.0
LOST_S = 60.0
KEPT_DAYS = 7
PRUNED_AT_ONCE = 10_000


@dataclass(frozen=True)
class Answer:
    """An answer as it was given at first. Without ``body`` it is known that it was given, and not what it said; without
    ``fingerprint`` (then there is no body either), not even to what."""

    status: int
    fingerprint: str | None
    headers: Sequence[tuple[str, str]]
    body: bytes | None


@dataclass(frozen=True)
class Held:
    """A key that somebody works on."""

    tenant: str
    key: str
    holder: UUID


class Answers:
    """The table ``answers``. Every method raises ``Unavailable`` when Postgres does not answer."""

    def __init__(self, database: Database) -> None:
        self._single = database.single

    def begin(self, tenant: str, key: str) -> Held | Answer:
        """The key, from now on held by the caller; or the answer, if it was given before. Raises: KeyAtWork."""
        held = Held(tenant, key, uuid4())
        if self._take(held):
            return held
        with self._single() as connection:
            row = connection.execute(_GIVEN, {"tenant": tenant, "key": key}).one_or_none()
        if row is None or row.status is None:  # at work; or given up in this very moment
            raise KeyAtWork(key)
        return Answer(row.status, row.fingerprint, [(name, value) for name, value in row.headers], row.body)

    def _take(self, held: Held) -> bool:
        with self._single() as connection:
            return bool(connection.execute(_TAKE, vars(held) | {"lost_s": LOST_S}).rowcount)

    def renew(self, held: Held) -> None:
        """Say that the holder is still at work."""
        with self._single() as connection:
            connection.execute(_RENEW, vars(held))

    def keep(self, held: Held, answer: Answer) -> None:
        """Complete the row, for all who ask again."""
        with self._single() as connection:
            connection.execute(_KEEP, vars(held) | vars(answer) | {"headers": Json(list(answer.headers))})

    def give_up(self, held: Held) -> None:
        """Remove the row: nothing was done, and whoever asks again is new."""
        with self._single() as connection:
            connection.execute(_GIVE_UP, vars(held))

    def prune(self) -> int:
        """Remove answers of more than ``KEPT_DAYS`` ago, and the keys of such submissions: what these made stays.

        Says how many; some are left if there are very many. A key that is asked with after that is a new one.
        """
        values = {"days": KEPT_DAYS, "most": PRUNED_AT_ONCE}
        with self._single() as connection:
            return sum(connection.execute(statement, values).rowcount for statement in (_PRUNE, _PRUNE_SUBMISSIONS))


_TAKE = text(
    """
    INSERT INTO answers (tenant, key, holder) VALUES (:tenant, :key, :holder)
    ON CONFLICT (tenant, key) DO UPDATE SET holder = excluded.holder, seen_at = now()
    WHERE answers.status IS NULL AND answers.seen_at < now() - make_interval(secs => :lost_s)
    """
)
_GIVEN = text("SELECT status, fingerprint, headers, body FROM answers WHERE tenant = :tenant AND key = :key")
_HOLDING = "tenant = :tenant AND key = :key AND holder = :holder AND status IS NULL"
_RENEW = text(f"UPDATE answers SET seen_at = now() WHERE {_HOLDING}")
_KEEP = text(
    f"""
    UPDATE answers
    SET seen_at = now(), status = :status, fingerprint = :fingerprint, headers = :headers, body = :body
    WHERE {_HOLDING}
    """
)
_GIVE_UP = text(f"DELETE FROM answers WHERE {_HOLDING}")
_PRUNE = text(
    """
    DELETE FROM answers WHERE (tenant, key) IN (
        SELECT tenant, key FROM answers WHERE seen_at < now() - make_interval(days => :days) LIMIT :most
    )
    """
)
_PRUNE_SUBMISSIONS = text(
    """
    DELETE FROM submissions WHERE (tenant, key) IN (
        SELECT tenant, key FROM submissions WHERE created_at < now() - make_interval(days => :days) LIMIT :most
    )
    """
)
