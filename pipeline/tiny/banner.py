"""What a prompt of the small model's domain means, in the domain's own terms.

A Banner is a ground, one or two lines of text, perhaps a shape. ``phrasing.py`` puts it into words, ``drawing.py``
into pixels. It may know no model and no randomness.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

SIDE_MIN_PX, SIDE_MAX_PX = 64, 256
COLOURS = {
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "grey": (128, 128, 128),
    "red": (214, 30, 40),
    "orange": (255, 140, 0),
    "yellow": (255, 220, 40),
    "green": (24, 138, 60),
    "blue": (30, 90, 225),
    "light blue": (140, 205, 250),
    "navy": (14, 28, 92),
    "purple": (120, 40, 165),
    "pink": (255, 135, 185),
    "brown": (112, 66, 32),
    "teal": (0, 130, 132),
}
CONTRAST_MIN = 3.0  # WCAG 2's ratio for large text


class GroundKind(StrEnum):
    PLAIN = "plain"
    TWO_COLOUR = "two-colour"
    GRADIENT = "gradient"
    STRIPED = "striped"


class Direction(StrEnum):
    """In which the colours follow each other."""

    ACROSS = "from left to right"
    DOWN = "from top to bottom"


class Typeface(StrEnum):
    SANS = "sans"
    SLAB = "slab"
    NARROW = "narrow"


class ShapeKind(StrEnum):
    CIRCLE = "circle"
    SQUARE = "square"
    STAR = "star"
    BADGE = "badge"  # round, with a toothed edge, as a seal


@dataclass(frozen=True)
class Ground:
    """``colours`` are names: one of a plain ground, else the first and the second in ``direction``."""

    kind: GroundKind
    colours: tuple[str, ...]
    direction: Direction = Direction.ACROSS


@dataclass(frozen=True)
class Shape:
    """``first``: left of the text on a wide picture, above it on any other; else right of it or below."""

    kind: ShapeKind
    colour: str
    first: bool


@dataclass(frozen=True)
class Banner:
    """What a prompt asks for."""

    ground: Ground
    lines: tuple[str, ...]  # one or two
    colour: str
    typeface: Typeface
    shape: Shape | None = None


def is_wide(width_px: int, height_px: int) -> bool:
    """Whether a shape stands beside the text, not above or below it."""
    return width_px >= 2 * height_px


def default_colour(ground: Ground) -> str:
    """Of the text, where nobody names one: white if it can be read, else black."""
    return "white" if "white" in readable_colours(ground) else "black"


def readable_colours(ground: Ground) -> list[str]:
    """Names of the colours that are lighter than all of the ground's colours, or darker, by CONTRAST_MIN."""
    return [name for name in COLOURS if _stands_out(name, ground.colours)]


def _stands_out(name: str, others: Sequence[str]) -> bool:
    own, rest = _luminance(name) + 0.05, [_luminance(other) + 0.05 for other in others]
    return own >= CONTRAST_MIN * max(rest) or own * CONTRAST_MIN <= min(rest)


def _luminance(name: str) -> float:
    """Relative luminance by WCAG 2, 0 to 1."""
    linear = [(c / 255 / 12.92) if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in COLOURS[name]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
