"""Sizes by name, from ``sizes.json``: IAB's display ads and what social networks show.

Every size there can be drawn, so both sides have 64 to 2048 pixels: of the formats with a smaller side (320x50, 468x60)
there is the one with twice the pixels, which screens of high density show anyway.
"""

import difflib
import functools
import json
import re
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).parent / "sizes.json"
WRITTEN = re.compile(r"\s*(\d{1,5})\s*[xX×]\s*(\d{1,5})\s*")


class Size(NamedTuple):
    """In pixels."""

    width: int
    height: int


@functools.cache
def size_sets() -> dict[str, dict[str, Size]]:
    """The names of each set, as ``iab``, with their sizes."""
    sets = json.loads(FILE.read_text(encoding="utf-8"))
    return {name: {size: Size(*sides) for size, sides in sizes.items()} for name, sizes in sets.items()}


@functools.cache
def _named() -> dict[str, Size]:
    return {name: size for sizes in size_sets().values() for name, size in sizes.items()}


def size_of(text: object) -> Size:
    """What ``728x90`` or ``leaderboard`` stands for. Raises: ValueError."""
    if written := WRITTEN.fullmatch(str(text)):
        return Size(int(written[1]), int(written[2]))
    try:
        return _named()[str(text).strip().lower()]
    except KeyError:
        near = difflib.get_close_matches(str(text).lower(), _named(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else "write WIDTHxHEIGHT, or a name as 'leaderboard'"
        raise ValueError(f"is no size that is known here: {hint}") from None
