"""``--vary``: each row becomes one image for every combination of the values that are varied.

``size=leaderboard,1024x1024``, ``size=iab`` (a whole set), ``seed=1..4``, ``style="red, dotted",plain``.
"""

import csv
import re
from collections.abc import Iterator, Sequence
from itertools import product
from math import prod
from typing import Any

from producer.manifest.problem import ManifestError, Problem
from producer.manifest.sizes import size_sets

VARIATIONS_MAX = 1_000
"""Images of one row."""
RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")
OPTION = "vary"


def variations(options: Sequence[str]) -> list[dict[str, Any]]:
    """Every combination, the last option changing fastest; one of nothing where nothing is varied.

    Raises:
        ManifestError
    """
    varied: dict[str, list[Any]] = {}
    for option in options:
        field, given, values = option.partition("=")
        field = field.strip()
        if not (field and given and values.strip()):
            raise _wrong(f"{option!r}: write field=value,value or field=1..4")
        if field in varied:
            raise _wrong(f"{field!r} is varied twice")
        varied[field] = _values(field, values)
    count = prod(map(len, varied.values()))
    if count > VARIATIONS_MAX:
        raise _wrong(f"makes {count:,} images of each row: {VARIATIONS_MAX:,} at most")
    return [dict(zip(varied, values, strict=True)) for values in product(*varied.values())]


def _values(field: str, text: str) -> list[Any]:
    try:
        (parts,) = csv.reader([text], strict=True, skipinitialspace=True)
    except (csv.Error, ValueError):
        raise _wrong(f"{field}: {text!r} is no list: put a value that holds a comma in quotes") from None
    values: dict[Any, None] = {}
    for value in (value for part in parts for value in _expanded(field, part.strip())):
        if value == "":
            raise _wrong(f"{field}: a value is empty")
        if value in values:
            raise _wrong(f"{field}: {value} is there twice")
        if len(values) == VARIATIONS_MAX:
            raise _wrong(f"{field}: has more than {VARIATIONS_MAX:,} values, which makes as many images of each row")
        values[value] = None
    return list(values)


def _expanded(field: str, part: str) -> Iterator[Any]:
    if field == "size" and part.lower() in size_sets():
        yield from size_sets()[part.lower()]
    elif spelled := RANGE.fullmatch(part):
        first, last = int(spelled[1]), int(spelled[2])
        if not 0 <= last - first < VARIATIONS_MAX:
            raise _wrong(f"{field}: {part} must rise, and hold {VARIATIONS_MAX:,} values at most")
        yield from range(first, last + 1)
    else:
        yield part


def _wrong(told: str) -> ManifestError:
    return ManifestError([Problem(0, OPTION, told)])
