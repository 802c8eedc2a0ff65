"""API keys: made once, shown once, and known afterwards by their digest alone.

A key is ``ovis_``, 32 letters and digits at random (190 bits), and six more that are the CRC-32 of all before them. So
a scanner of leaked secrets knows one when it sees it, and a mistyped one is refused without asking Postgres. The
digest is a plain SHA-256: what is random already needs no slow one.

Keys are the farm's, not a tenant's: the role of tenants reaches none of these rows.
"""

import hashlib
import secrets
import string
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import text

from producer.jobs.contract import Scope
from producer.jobs.errors import MadeBefore, NotFound
from producer.jobs.postgres import Database

PREFIX = "ovis_"
ALPHABET = string.digits + string.ascii_letters
RANDOM_CHARACTERS = 32
CHECKSUM_CHARACTERS = 6
SHOWN_CHARACTERS = len(PREFIX) + 6
"""What stays readable of a key: 26 random characters remain unknown."""


class Key(BaseModel):
    """A key as its row says it is: never the key itself."""

    model_config = ConfigDict(frozen=True)

    id: UUID
    tenant: str
    name: str
    scopes: list[Scope]
    shown: str = Field(description="The key's first characters.")
    created_at: datetime
    used_at: datetime | None = Field(description="When it was last used, to the minute.")
    revoked_at: datetime | None


@dataclass(frozen=True)
class Bearer:
    """What a key that was found stands for."""

    tenant: str
    scopes: frozenset[Scope]
    max_requests_s: float | None  # the tenant's limit


class Keys:
    """The keys of the farm. Every method raises ``Unavailable`` when Postgres does not answer."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, tenant: str, name: str, scopes: Iterable[Scope], *, key_id: UUID | None = None) -> tuple[Key, str]:
        """Make a key; it is given back this once, and kept nowhere.

        Raises: MadeBefore: there is one with this ``key_id``.
        """
        key = new_key()
        values = {
            "id": key_id or uuid4(),
            "tenant": tenant,
            "name": name,
            "scopes": sorted({scope.value for scope in scopes}),
            "shown": key[:SHOWN_CHARACTERS],
            "digest": digest(key),
        }
        with self._database.single() as connection:
            row: Any = connection.execute(_CREATE, values).mappings().one_or_none()
        if row is None:
            raise MadeBefore("key", key_id)
        return Key(**row), key

    def find(self, key: str) -> Bearer | None:
        """What this key stands for; None if it is none, or revoked. Notes that it was used."""
        if not well_formed(key):
            return None
        with self._database.single() as connection:
            row = connection.execute(_FIND, {"digest": digest(key)}).one_or_none()
            if row is None:
                return None
            if row.unnoted:
                connection.execute(_NOTE_USE, {"id": row.id})
        return Bearer(row.tenant, frozenset(map(Scope, row.scopes)), row.max_requests_s)

    def list(self) -> list[Key]:
        """All of them, in the order in which they were made."""
        with self._database.single() as connection:
            rows = connection.execute(text(f"SELECT {_COLUMNS} FROM api_keys ORDER BY created_at, id")).mappings()
            return [Key(**row) for row in rows]

    def revoke(self, key_id: UUID) -> Key:
        """From the commit on it opens nothing. Revoking twice is revoking once. Raises: NotFound."""
        with self._database.single() as connection:
            row: Any = connection.execute(_REVOKE, {"id": key_id}).mappings().one_or_none()
        if row is None:
            raise NotFound("key", key_id)
        return Key(**row)

    def administered(self) -> bool:
        """Whether anybody holds a key with which keys can be made."""
        statement = text("SELECT EXISTS (SELECT FROM api_keys WHERE 'admin' = ANY(scopes) AND revoked_at IS NULL)")
        with self._database.single() as connection:
            return bool(connection.scalar(statement))


def new_key() -> str:
    """A key that nobody has."""
    unchecked = PREFIX + "".join(secrets.choice(ALPHABET) for _ in range(RANDOM_CHARACTERS))
    return unchecked + _checksum(unchecked)


def well_formed(key: str) -> bool:
    """Whether it can be a key at all: made of the right characters, and with the right checksum."""
    unchecked, checksum = key[:-CHECKSUM_CHARACTERS], key[-CHECKSUM_CHARACTERS:]
    return (
        key.isascii()
        and key.startswith(PREFIX)
        and len(unchecked) == len(PREFIX) + RANDOM_CHARACTERS
        and checksum == _checksum(unchecked)
    )


def digest(key: str) -> bytes:
    """What the table keeps."""
    return hashlib.sha256(key.encode()).digest()


def _checksum(unchecked: str) -> str:
    number = zlib.crc32(unchecked.encode())
    digits = []
    for _ in range(CHECKSUM_CHARACTERS):
        number, digit = divmod(number, len(ALPHABET))
        digits.append(ALPHABET[digit])
    return "".join(reversed(digits))


_COLUMNS = "id, tenant, name, scopes, shown, created_at, used_at, revoked_at"

_CREATE = text(
    f"""
    INSERT INTO api_keys (id, tenant, name, scopes, shown, digest)
    VALUES (:id, :tenant, :name, :scopes, :shown, :digest)
    ON CONFLICT (id) DO NOTHING RETURNING {_COLUMNS}
    """
)

_FIND = text(
    """
    SELECT k.id, k.tenant, k.scopes, t.max_requests_s,
           k.used_at IS DISTINCT FROM date_trunc('minute', now()) AS unnoted
    FROM api_keys k LEFT JOIN tenants t ON t.name = k.tenant
    WHERE k.digest = :digest AND k.revoked_at IS NULL
    """
)

_NOTE_USE = text("UPDATE api_keys SET used_at = date_trunc('minute', now()) WHERE id = :id")

_REVOKE = text(f"UPDATE api_keys SET revoked_at = coalesce(revoked_at, now()) WHERE id = :id RETURNING {_COLUMNS}")
