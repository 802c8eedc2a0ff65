"""Which objects of the bucket nothing points to any more: the sweep's questions."""

import re
from collections.abc import Sequence
from typing import Any

from sqlalchemy import text

from producer.jobs.store.part import Part


class Leftovers(Part):
    """No answer ever becomes wrong: what may go once may go for good."""

    def deletions(self, *, after_s: float) -> list[tuple[int, list[str]]]:
        """What is to be deleted from the bucket: the beginnings of keys, of rows that went ``after_s`` seconds ago or
        earlier, so that no worker still writes there."""
        statement = text(
            "SELECT id, prefixes FROM deletions WHERE deleted_at < now() - make_interval(secs => :after) ORDER BY id"
        )
        with self._single() as connection:
            return [(row.id, row.prefixes) for row in connection.execute(statement, {"after": after_s})]

    def deletable(self, keys: Sequence[str]) -> list[str]:
        """Of these object keys, those that are no other job's image too (``Job.copy_of``)."""
        statement = text("SELECT object_key FROM jobs WHERE copy_of IS NOT NULL AND object_key = ANY(:keys)")
        with self._single() as connection:
            kept = {row.object_key for row in connection.execute(statement, {"keys": list(keys)})}
        return [key for key in keys if key not in kept]

    def deleted(self, deletion: int) -> None:
        """All of it is gone from the bucket."""
        with self._single() as connection:
            connection.execute(text("DELETE FROM deletions WHERE id = :id"), {"id": deletion})

    def sweepable(self, keys: Sequence[str]) -> list[str]:
        """Of these object keys, those to which no row points, and no claim that may still write ever will.

        Keys of unknown jobs are never among them: another farm may share the bucket.
        """
        read = [(key, found["job"], int(found["claim"])) for key in keys if (found := _OBJECT_KEY.fullmatch(key))]
        columns: list[list[Any]] = [list(column) for column in zip(*read, strict=True)] or [[], [], []]
        with self._single() as connection:
            rows = connection.execute(_SWEEPABLE, dict(zip(("keys", "jobs", "claims"), columns, strict=True)))
            return [row.key for row in rows]


_OBJECT_KEY = re.compile(
    r"(?:images/[^/]+|checkpoints|previews)/(?P<job>[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})/(?P<claim>[0-9]{1,9})[.-][^/]+"
)
"""As ``storage.object_key``, ``storage.checkpoint_key`` and ``storage.preview_key`` make them."""

_SWEEPABLE = text(
    """
    SELECT read.key
    FROM unnest(CAST(:keys AS text[]), CAST(:jobs AS uuid[]), CAST(:claims AS int[])) AS read (key, job_id, claim)
    JOIN jobs ON jobs.id = read.job_id
    WHERE read.key IS DISTINCT FROM jobs.object_key AND read.key IS DISTINCT FROM jobs.checkpoint_key
      AND read.key IS DISTINCT FROM jobs.preview_key
      AND (read.claim < jobs.claim OR read.claim = jobs.claim AND jobs.state <> 'running')
    """
)
