"""A row of a manifest as it was read, before anybody asks what it means.

Each of its jobs carries the row along, whole, and so does a rejection; ``ROW_MAX_BYTES`` bounds what that may be.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from producer.manifest.problem import Problem

ROW_MAX_BYTES = 65_536
"""Of the cells of a row and the names of their columns, in UTF-8. The longest prompt and negative prompt fit, 8,000
characters of four bytes each, and so does the fullest cell of Excel, 32,767 Latin letters."""
CHARACTER_MAX_BYTES = 4
BEGINNING_CHARACTERS = 1_000
NAMED_CHARACTERS = 100


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
        return cls(line, {"text": text[:BEGINNING_CHARACTERS]} if text else {}, (Problem(line, column, message),))


def too_large(record: Record) -> tuple[Problem, ...]:
    """That the row holds more than may come along, if it does; told of its largest cell."""
    if _fits(record.values):
        return ()
    sizes_bytes = {column: _size_bytes(column, value) for column, value in record.values.items()}
    column = max(sizes_bytes, key=sizes_bytes.__getitem__)
    told = (
        f"holds {sizes_bytes[column]:,} bytes, and the row {sum(sizes_bytes.values()):,}: a row has "
        f"{ROW_MAX_BYTES:,} at most, with what only comes along: shorten it, or leave the column out"
    )
    return (Problem(record.line, column[:NAMED_CHARACTERS], told),)


def kept(values: Mapping[str, Any]) -> dict[str, Any]:
    """All of a row, or where that is too large the beginnings of its first cells: for what no size refuses."""
    if _fits(values):
        return dict(values)
    beginnings: dict[str, Any] = {}
    left_bytes = ROW_MAX_BYTES
    for cell in values.items():
        column, value = map(_beginning, cell)
        left_bytes -= _size_bytes(column, value)
        if left_bytes < 0:
            break
        beginnings[column] = value
    return beginnings


def _fits(values: Mapping[str, Any]) -> bool:
    characters = 0
    for column, value in values.items():
        characters += len(column) + len(_text(value))
    if characters * CHARACTER_MAX_BYTES <= ROW_MAX_BYTES:  # nearly all rows, in a fifth of the time
        return True
    return sum(_size_bytes(*cell) for cell in values.items()) <= ROW_MAX_BYTES


def _beginning(value: Any) -> Any:
    text = _text(value)
    return value if len(text) <= BEGINNING_CHARACTERS else f"{text[:BEGINNING_CHARACTERS]}…"


def _size_bytes(column: str, value: Any) -> int:
    return sum(
        len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass")) for text in (column, _text(value))
    )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


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
