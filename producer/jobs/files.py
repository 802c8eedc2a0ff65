"""Uploaded files: the rows that say where they are. A row comes after its object and goes before it.

Before the object comes, it is noted as one that is to be deleted; the transaction that writes the row takes the note
back. So an object whose row never comes, because the process died in between, goes with a later sweep.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from pydantic import BaseModel, ConfigDict
from sqlalchemy import text

from producer.jobs.errors import NotFound, Unavailable
from producer.jobs.postgres import Database
from producer.jobs.storage import FILES


class File(BaseModel):
    """An uploaded file as its row says it is."""

    model_config = ConfigDict(frozen=True)

    id: UUID
    tenant: str
    name: str
    purpose: str
    size_bytes: int
    object_key: str
    created_at: datetime


def file_key(tenant: str, file_id: UUID) -> str:
    """``files/<tenant>/<id>``."""
    return f"{FILES}{tenant}/{file_id}"


class Files:
    """The files of those whose rows the database shows."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def expect(self, file_id: UUID, *, tenant: str) -> int:
        """To be called before the object is put: it goes again unless it becomes a file. Returns the note of it."""
        values = {"tenant": tenant, "object_key": file_key(tenant, file_id)}
        with self._database.single() as connection:
            return int(connection.execute(_EXPECT, values).scalar_one())

    def add(
        self, file_id: UUID, *, note: int, within_s: float, tenant: str, name: str, purpose: str, size_bytes: int
    ) -> File:
        """The object is there: from now on it is a file, if it was noted less than ``within_s`` seconds ago. That is to
        be well below the time after which a sweep acts on the note (``Durations.sweep_s``).

        Raises:
            Unavailable: it took longer to put it; it goes again, and the upload may be tried again.
        """
        values = {
            "id": file_id,
            "tenant": tenant,
            "name": name,
            "purpose": purpose,
            "size_bytes": size_bytes,
            "object_key": file_key(tenant, file_id),
        }
        with self._database.begin() as connection:
            if connection.execute(_TAKE_BACK, {"note": note, "within": within_s}).rowcount:
                return File(**connection.execute(_ADD, values).mappings().one())
            connection.execute(_EXPECT, values)  # the sweep may have come before the object
        raise Unavailable("S3", f"it took more than {within_s:g} s to take the file")

    def file(self, file_id: UUID) -> File:
        """Raises: NotFound."""
        with self._database.single() as connection:
            row = connection.execute(_FILE, {"id": file_id}).mappings().first()
        if row is None:
            raise NotFound("file", file_id)
        return File(**row)

    def page(
        self, *, limit: int, after: UUID | None = None, purpose: str | None = None, oldest_first: bool = False
    ) -> Sequence[File]:
        """Files in the order of their upload, the newest first or last, behind ``after``. Raises: NotFound: of it."""
        last = self.file(after) if after else None
        values: dict[str, Any] = {"limit": limit, "purpose": purpose}
        values |= {"at": last.created_at if last else None, "after": after}
        with self._database.single() as connection:
            rows = connection.execute(_OLDEST if oldest_first else _NEWEST, values).mappings()
            return [File(**row) for row in rows]

    def delete(self, file_id: UUID) -> None:
        """The row goes, and the object with the next sweep. Raises: NotFound."""
        with self._database.begin() as connection:
            if connection.execute(_DELETE, {"id": file_id}).first() is None:
                raise NotFound("file", file_id)


_COLUMNS = ", ".join(File.model_fields)

_EXPECT = text("INSERT INTO deletions (tenant, prefixes) VALUES (:tenant, ARRAY[:object_key]) RETURNING id")

_TAKE_BACK = text("DELETE FROM deletions WHERE id = :note AND deleted_at > now() - make_interval(secs => :within)")

_ADD = text(
    f"""
    INSERT INTO files (id, tenant, name, purpose, size_bytes, object_key)
    VALUES (:id, :tenant, :name, :purpose, :size_bytes, :object_key) RETURNING {_COLUMNS}
    """
)

_FILE = text(f"SELECT {_COLUMNS} FROM files WHERE id = :id")


def _page(behind: str, order: str) -> str:
    return f"""
        SELECT {_COLUMNS} FROM files
        WHERE (CAST(:purpose AS text) IS NULL OR purpose = :purpose)
          AND (CAST(:after AS uuid) IS NULL OR (created_at, id) {behind} (CAST(:at AS timestamptz), :after))
        ORDER BY created_at {order}, id {order} LIMIT :limit
        """


_NEWEST = text(_page("<", "DESC"))
_OLDEST = text(_page(">", "ASC"))

_DELETE = text(
    """
    WITH deleted AS (DELETE FROM files WHERE id = :id RETURNING tenant, object_key)
    INSERT INTO deletions (tenant, prefixes) SELECT tenant, ARRAY[object_key] FROM deleted RETURNING id
    """
)
