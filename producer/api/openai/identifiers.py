"""OpenAI's ids: ``file-`` and ``batch_`` before the hex of a UUID. What a batch makes of its rows when it is read is a
file too: its id holds the batch's, and says which part of it.

A batch is found by the native API's id as well. Whatever is not there is said to be missing by the id that was given.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import NamedTuple
from uuid import UUID

from producer.jobs.errors import NotFound

HEX = "[0-9a-f]{32}"
UUID_TEXT = "[0-9a-f]{8}-?(?:[0-9a-f]{4}-?){3}[0-9a-f]{12}"
"""With dashes or without."""


class Part(StrEnum):
    """A file that is written from a batch's rows."""

    INPUT = "input"
    OUTPUT = "output"
    ERRORS = "errors"


class FileId(NamedTuple):
    """An uploaded file, or a part of a batch."""

    id: UUID
    part: Part | None = None

    def __str__(self) -> str:
        return f"file-{self.id.hex}-{self.part}" if self.part else f"file-{self.id.hex}"

    @classmethod
    def read(cls, text: str) -> "FileId":
        """Raises: NotFound: no file has such an id."""
        found = re.fullmatch(f"file-({HEX})(?:-({'|'.join(Part)}))?", text)
        if found is None:
            raise NotFound("file", text)
        return cls(UUID(found[1]), Part(found[2]) if found[2] else None)


def batch_name(batch_id: UUID) -> str:
    """What OpenAI's clients call the batch."""
    return f"batch_{batch_id.hex}"


def batch_id(name: str) -> UUID:
    """From what OpenAI's clients call the batch, or the native API. Raises: NotFound: no batch has such an id."""
    found = re.fullmatch(f"(?:batch_)?({UUID_TEXT})", name)
    if found is None:
        raise NotFound("batch", name)
    return UUID(found[1])


@contextmanager
def called(kind: str, given: object) -> Iterator[None]:
    """What is not found within is told by this id. Raises: NotFound."""
    try:
        yield
    except NotFound:
        raise NotFound(kind, given) from None
