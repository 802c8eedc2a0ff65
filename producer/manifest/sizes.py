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

from pipeline.request import SIDE_MAX_PX, SIDE_MIN_PX, ImageRequest

FILE = Path(__file__).parent / "sizes.json"
WRITTEN = re.compile(r"\s*(\d{1,5})\s*[xX×]\s*(\d{1,5})\s*")


class Size(NamedTuple):
    """In pixels."""

    width: int
    height: int


DEFAULT = Size(*(ImageRequest.model_fields[side].default for side in Size._fields))


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


def drawn_larger(width: object, height: object) -> str | None:
    """How a size with a side that is too small to be drawn is had all the same, as 320x50; None: it is not.

    A side that is None has its default.
    """
    sides = (size if side is None else side for side, size in zip((width, height), DEFAULT, strict=True))
    try:
        size = Size(*(int(str(side)) for side in sides))
    except ValueError:
        return None
    if not 0 < min(size) < SIDE_MIN_PX:
        return None
    times = -(-SIDE_MIN_PX // min(size))
    if times * max(size) > SIDE_MAX_PX:
        return None
    return f"draw {times * size.width}x{times * size.height} and scale it down to {size.width}x{size.height}"
