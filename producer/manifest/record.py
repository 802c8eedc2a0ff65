"""A row of a manifest as it was read, before anybody asks what it means."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from producer.manifest.problem import Problem


class Record(NamedTuple):
    """A row: its line, from 1, and its columns. One that could not be read holds what is wrong, and what was read.

    ``left_out``: how many of the last columns the row does not reach; they are there, and empty.
    """

    line: int
    values: Mapping[str, Any]
    problems: tuple[Problem, ...] = ()
    left_out: int = 0

    @classmethod
    def broken(cls, line: int, message: str, *, column: str | None = None, text: str = "") -> "Record":
        return cls(line, {"text": text[:1000]} if text else {}, (Problem(line, column, message),))


def unstorable(value: Any) -> str | None:
    """Why a value cannot be kept beside its job, if it cannot: Postgres takes neither NUL nor half a character."""
    if isinstance(value, str):
        if "\x00" in value:
            return "holds a NUL character: remove it"
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            return "holds a lone surrogate, which is no character: save the file as UTF-8"
    elif isinstance(value, dict):
        return next(filter(None, (unstorable(part) for pair in value.items() for part in pair)), None)
    elif isinstance(value, list):
        return next(filter(None, map(unstorable, value)), None)
    return None


def storable(value: Any) -> Any:
    """The value with what cannot be kept replaced: for a row that is refused anyway."""
    if isinstance(value, str):
        return value.replace("\x00", "\ufffd").encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {storable(key): storable(part) for key, part in value.items()}
    return [storable(part) for part in value] if isinstance(value, list) else value
