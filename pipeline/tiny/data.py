"""Examples of the small model's domain without end: a prompt as people write it, and what it means.

Training draws from here; the evaluation takes what training is never given. It may know no model.

Invariants: ``draw_example`` gives the same example for the same state of ``random`` on every machine; every text is at
least the smallest of ``drawing.FONT_SIZES_PX`` high and stands out against each colour of its ground.
"""

from dataclasses import dataclass
from random import Random

from pipeline.tiny.banner import (
    COLOURS,
    Banner,
    Direction,
    Ground,
    GroundKind,
    Shape,
    ShapeKind,
    Typeface,
    default_colour,
    is_wide,
    readable_colours,
)
from pipeline.tiny.drawing import font_size_px
from pipeline.tiny.lines import draw_line
from pipeline.tiny.phrasing import phrase


@dataclass(frozen=True)
class Example:
    """A prompt and what it means. Where the prompt leaves a choice open, ``banner`` is one of the answers."""

    prompt: str
    banner: Banner


def draw_example(random: Random, width_px: int, height_px: int, *, of_held_out: bool = False) -> Example:
    """An example whose text fits into this size. Training takes the others; the evaluation those that are held out."""
    banner = _draw_banner(random, width_px, height_px, of_held_out)
    return Example(phrase(random, banner, wide=is_wide(width_px, height_px)), banner)


def _draw_banner(random: Random, width_px: int, height_px: int, of_held_out: bool) -> Banner:
    ground = _draw_ground(random)
    colour = default_colour(ground) if random.random() < 0.3 else random.choice(readable_colours(ground))
    shape = _draw_shape(random, ground) if random.random() < 0.3 else None
    lines_count = 2 if random.random() < 0.35 else 1
    typeface = random.choice((Typeface.SANS, Typeface.SANS, Typeface.SLAB, Typeface.NARROW))
    for attempt in range(1000):  # a small picture takes short lines: where none is found, less is asked of it
        if attempt == 20:
            lines_count = 1
        if attempt == 40:
            shape = None
        lines = tuple(draw_line(random, of_held_out) for _ in range(lines_count))
        banner = Banner(ground, lines, colour, typeface, shape)
        if font_size_px(banner, width_px, height_px):
            return banner
    raise ValueError(f"no text fits into {width_px}×{height_px} px")


def _draw_ground(random: Random) -> Ground:
    """One that at least one colour can be read on."""
    while True:
        kind = random.choice((GroundKind.PLAIN, GroundKind.PLAIN, *GroundKind))
        colours = tuple(random.sample(list(COLOURS), 1 if kind is GroundKind.PLAIN else 2))
        ground = Ground(kind, colours, random.choice(list(Direction)))
        if readable_colours(ground):
            return ground


def _draw_shape(random: Random, ground: Ground) -> Shape:
    standing_out = [name for name in COLOURS if name not in ground.colours]
    return Shape(random.choice(list(ShapeKind)), random.choice(standing_out), random.random() < 0.5)
