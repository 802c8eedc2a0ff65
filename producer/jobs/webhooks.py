"""Webhooks in SQL: addresses that are told of a tenant's events, and what was told to each.

A delivery is written by a trigger, in the transaction of its event (``migrations/versions/0005_events.py``), so that
none is lost however this side dies; ``deliverer`` takes what is due, and writes how it went.
"""

import base64
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import text

from producer.jobs.contract import Delivery, EventKind, Webhook
from producer.jobs.errors import MadeBefore, NotFound, TooManyWebhooks, WebhookDisabled
from producer.jobs.postgres import Database

SECRET_BYTES = 32
WEBHOOKS_MAX = 10
"""Of one tenant, so that no tenant's receivers take up all that a farm delivers at once."""
KEPT_DAYS = 7


@dataclass(frozen=True)
class Due:
    """A delivery that was taken to be tried now."""

    id: UUID
    webhook_id: UUID
    url: str
    secret: str
    kind: str
    data: Mapping[str, Any]
    created_at: datetime
    attempts: int  # this one included
    now: datetime  # the database's

    def __repr__(self) -> str:
        return f"Due(id={self.id}, webhook_id={self.webhook_id}, attempts={self.attempts})"


@dataclass(frozen=True)
class Attempt:
    """How an attempt went. ``again_s``: until the next; None: there is none. ``number``: as in ``Due.attempts``."""

    id: UUID
    status: int | None
    error: str | None
    again_s: float | None
    number: int

    @property
    def taken(self) -> bool:
        """Whether the receiver has it."""
        return self.error is None


class Webhooks:
    """The webhooks that this database's tenant sees. Every method raises ``Unavailable`` without Postgres."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(
        self, tenant: str, url: str, kinds: Sequence[EventKind], *, webhook_id: UUID | None = None
    ) -> tuple[Webhook, str]:
        """A webhook, and its secret, which nobody is told again.

        Raises: TooManyWebhooks; MadeBefore: there is one with this ``webhook_id``.
        """
        secret = "whsec_" + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()
        values = {"id": webhook_id or uuid4(), "tenant": tenant, "url": url, "kinds": sorted(set(kinds))}
        with self._database.begin() as connection:
            connection.execute(_LOCK, {"tenant": tenant})  # so that those who come at once are counted together
            row: Any = connection.execute(_CREATE, values | {"secret": secret}).mappings().one_or_none()
            if row is None:
                raise MadeBefore("webhook", webhook_id)
            if connection.execute(_COUNT, {"tenant": tenant}).scalar_one() > WEBHOOKS_MAX:
                raise TooManyWebhooks(WEBHOOKS_MAX)
        return Webhook(**row), secret

    def all(self) -> list[Webhook]:
        """The oldest first."""
        with self._database.single() as connection:
            rows = connection.execute(text(f"SELECT {_COLUMNS} FROM webhooks ORDER BY created_at, id")).mappings()
            return [Webhook(**row) for row in rows]

    def webhook(self, webhook_id: UUID) -> Webhook:
        """Raises: NotFound."""
        return self._one(text(f"SELECT {_COLUMNS} FROM webhooks WHERE id = :id"), webhook_id)

    def enable(self, webhook_id: UUID) -> Webhook:
        """Tell it of what happens from now on. Raises: NotFound."""
        return self._one(
            text(f"UPDATE webhooks SET disabled_at = NULL WHERE id = :id RETURNING {_COLUMNS}"), webhook_id
        )

    def delete(self, webhook_id: UUID) -> None:
        """With all its deliveries. Raises: NotFound."""
        self._one(text(f"DELETE FROM webhooks WHERE id = :id RETURNING {_COLUMNS}"), webhook_id)

    def _one(self, statement: Any, webhook_id: UUID) -> Webhook:
        with self._database.single() as connection:
            row: Any = connection.execute(statement, {"id": webhook_id}).mappings().one_or_none()
        if row is None:
            raise NotFound("webhook", webhook_id)
        return Webhook(**row)

    def deliveries(self, webhook_id: UUID, *, after: UUID | None = None, limit: int = 100) -> list[Delivery]:
        """The newest first, those behind ``after``. Raises: NotFound."""
        self.webhook(webhook_id)
        with self._database.single() as connection:
            rows = connection.execute(_DELIVERIES, {"webhook": webhook_id, "after": after, "limit": limit}).mappings()
            return [Delivery(**row) for row in rows]

    def resend(self, webhook_id: UUID, delivery_id: UUID) -> Delivery:
        """Try it at once, and as often as one that is new. Raises: NotFound, WebhookDisabled."""
        if self.webhook(webhook_id).disabled_at is not None:
            raise WebhookDisabled(webhook_id)
        with self._database.single() as connection:
            row: Any = connection.execute(_RESEND, {"webhook": webhook_id, "id": delivery_id}).mappings().one_or_none()
        if row is None:
            raise NotFound("delivery", delivery_id)
        return Delivery(**row)

    # The deliverer's steps.

    def take(self, *, most: int, most_each: int, busy: Mapping[UUID, int], lease_s: float) -> list[Due]:
        """Up to ``most`` deliveries that are due, the attempt counted already.

        ``busy``: how many each webhook has been given that are not noted yet; with those none has more than
        ``most_each``. What is taken and never noted is due again after ``lease_s``.
        """
        values = {"busy": list(busy), "counts": list(busy.values()), "most": most, "each": most_each, "lease": lease_s}
        with self._database.single() as connection:
            return [Due(**row) for row in connection.execute(_TAKE, values).mappings()]

    def note(self, attempts: Sequence[Attempt]) -> None:
        """How attempts went. What is to be sent anew meanwhile is left alone: that counts, and not the old one."""
        if not attempts:
            return
        columns = {
            "ids": [attempt.id for attempt in attempts],
            "statuses": [attempt.status for attempt in attempts],
            "errors": [attempt.error for attempt in attempts],
            "again": [attempt.again_s for attempt in attempts],
            "numbers": [attempt.number for attempt in attempts],
        }
        with self._database.single() as connection:
            connection.execute(_NOTE, columns)

    def disable(self, webhook_id: UUID) -> None:
        """Its receiver is gone for good: tell it nothing more, until a person says otherwise."""
        with self._database.begin() as connection:
            connection.execute(_DISABLE, {"id": webhook_id})
            connection.execute(_DROP, {"id": webhook_id})

    def prune(self, most: int = 10_000) -> int:
        """Delete up to ``most`` deliveries that are at an end for ``KEPT_DAYS``; returns how many."""
        with self._database.single() as connection:
            return connection.execute(_PRUNE, {"days": KEPT_DAYS, "most": most}).rowcount


_COLUMNS = "id, tenant, url, kinds, created_at, disabled_at"

_LOCK = text("SELECT pg_advisory_xact_lock(hashtextextended('webhooks of ' || :tenant, 0))")

_CREATE = text(
    f"""
    INSERT INTO webhooks (id, tenant, url, secret, kinds) VALUES (:id, :tenant, :url, :secret, :kinds)
    ON CONFLICT (id) DO NOTHING RETURNING {_COLUMNS}
    """
)

_COUNT = text("SELECT count(*) FROM webhooks WHERE tenant = :tenant")

_DELIVERY_COLUMNS = "id, webhook_id, kind, data, created_at, attempts, next_at, delivered_at, last_status, last_error"

_DELIVERIES = text(
    f"""
    SELECT {_DELIVERY_COLUMNS} FROM deliveries
    WHERE webhook_id = :webhook AND (CAST(:after AS uuid) IS NULL OR (created_at, id) < (
        SELECT created_at, id FROM deliveries WHERE id = :after AND webhook_id = :webhook))
    ORDER BY created_at DESC, id DESC LIMIT :limit
    """
)

_RESEND = text(
    f"""
    UPDATE deliveries SET next_at = now(), attempts = 0, delivered_at = NULL
    WHERE id = :id AND webhook_id = :webhook RETURNING {_DELIVERY_COLUMNS}
    """
)

_TAKE = text(
    """
    WITH busy AS (
        SELECT * FROM unnest(CAST(:busy AS uuid[]), CAST(:counts AS int[])) AS busy (webhook_id, n)
    ), due AS (
        SELECT found.id, webhooks.url, webhooks.secret
        FROM webhooks LEFT JOIN busy ON busy.webhook_id = webhooks.id
        CROSS JOIN LATERAL (
            SELECT id FROM deliveries WHERE webhook_id = webhooks.id AND next_at <= now()
            ORDER BY next_at LIMIT greatest(0, :each - coalesce(busy.n, 0))
        ) AS found
        WHERE webhooks.disabled_at IS NULL
        ORDER BY coalesce(busy.n, 0), random() LIMIT :most
    )
    UPDATE deliveries AS d SET attempts = attempts + 1, next_at = now() + make_interval(secs => :lease)
    FROM due WHERE d.id = due.id AND d.next_at <= now()
    RETURNING d.id, d.webhook_id, due.url, due.secret, d.kind, d.data, d.created_at, d.attempts, now() AS now
    """
)

_NOTE = text(
    """
    UPDATE deliveries SET last_status = went.status, last_error = went.error,
        delivered_at = CASE WHEN went.error IS NULL THEN now() END,
        next_at = CASE WHEN webhooks.disabled_at IS NULL THEN now() + make_interval(secs => went.again_s) END
    FROM unnest(CAST(:ids AS uuid[]), CAST(:statuses AS int[]), CAST(:errors AS text[]),
                CAST(:again AS double precision[]), CAST(:numbers AS int[]))
             AS went (id, status, error, again_s, number),
         webhooks
    WHERE deliveries.id = went.id AND deliveries.attempts = went.number AND webhooks.id = deliveries.webhook_id
    """
)

_DISABLE = text("UPDATE webhooks SET disabled_at = now() WHERE id = :id AND disabled_at IS NULL")

_DROP = text(
    """
    UPDATE deliveries SET next_at = NULL, last_error = 'its webhook was disabled'
    WHERE webhook_id = :id AND next_at IS NOT NULL
    """
)

_PRUNE = text(
    """
    DELETE FROM deliveries WHERE id IN (
        SELECT id FROM deliveries
        WHERE created_at < now() - make_interval(days => :days) AND next_at IS NULL LIMIT :most)
    """
)
