"""Rows of a JSONL file: one object a line, in constant memory. Empty lines are passed over."""

import json
from collections.abc import Iterator
from math import isfinite
from typing import IO, Any

from producer.manifest.csv_rows import COLUMNS_MAX
from producer.manifest.lines import lines
from producer.manifest.problem import ManifestError
from producer.manifest.record import Record

LINE_MAX_CHARACTERS = 1_000_000
NESTING_MAX = 100
"""Lists and objects in one another. What Python can just read, it cannot read where the stack is deeper."""

BEYOND_MEASURE = "holds a number or a nesting beyond all measure"


def json_rows(file: IO[bytes]) -> Iterator[Record]:
    """Raises: ManifestError: no more of the file can be read."""
    for line, text in enumerate(lines(file, LINE_MAX_CHARACTERS), start=1):
        if len(text) == LINE_MAX_CHARACTERS:
            raise ManifestError.of_file(f"is longer than {LINE_MAX_CHARACTERS:,} characters", line=line)
        if text.strip():
            yield _record(line, text)


def _record(line: int, text: str) -> Record:
    try:
        values = json.loads(text, parse_constant=_no_number, parse_float=_number)
    except json.JSONDecodeError as error:
        return Record.broken(line, f"is no JSON: {error.msg} at character {error.pos + 1}", text=text)
    except (ValueError, RecursionError):  # Python's own limits, against numbers and nesting that take all its time
        return Record.broken(line, BEYOND_MEASURE, text=text)
    if _is_nested(values, NESTING_MAX):
        return Record.broken(line, BEYOND_MEASURE, text=text)
    if not isinstance(values, dict):
        return Record.broken(line, "is no JSON object", text=text)
    if len(values) > COLUMNS_MAX:
        return Record.broken(line, f"has {len(values):,} fields: {COLUMNS_MAX} are read at most", text=text)
    return Record(line, values)


def _is_nested(value: Any, levels: int) -> bool:
    """Whether it has more than so many levels."""
    if not isinstance(value, dict | list):
        return False
    return levels == 0 or any(
        _is_nested(part, levels - 1) for part in (value.values() if isinstance(value, dict) else value)
    )


def _number(text: str) -> float:
    number = float(text)
    return number if isfinite(number) else _no_number(text)


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number in JSON")
