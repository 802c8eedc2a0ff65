"""What a banner looks like: the true picture that a prompt means, in any size of the domain.

Everything is placed by rule: the text is centred in its box, in the largest size that fits, and a shape has a box of
its own. So a prompt leaves open only what it does not say, and the model need not guess.

Invariant: the same banner and size give the same pixels wherever the same FreeType draws.
"""

from functools import cache
from math import cos, pi, sin
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pipeline.tiny.banner import COLOURS, Banner, Direction, Ground, GroundKind, ShapeKind, Typeface, is_wide

FONTS = {
    Typeface.SANS: "Roboto-Bold.ttf",
    Typeface.SLAB: "RobotoSlab-Bold.otf",
    Typeface.NARROW: "RobotoCondensed-Bold.ttf",
}
FONT_SIZES_PX = (16, 20, 24, 28, 32, 40, 48, 56)
TEXT_SHARE = 0.9  # of its box, in width and in height
LINE_PITCH = 1.2  # from line to line, in font sizes
CAPITAL = 0.71  # height of a capital in font sizes: the same in all three
STRIPES = 8  # along the shorter side
SHAPE_SHARE = 0.62  # of its box
SUPERSAMPLED = 4

Mask = NDArray[np.uint8]  # [height, width], 255 where something covers all of a pixel
Pixels = NDArray[np.uint8]  # [height, width, 3]


class Box(NamedTuple):
    """In pixels, from the picture's upper left corner."""

    left: int
    top: int
    width: int
    height: int


def render(banner: Banner, width_px: int, height_px: int) -> Pixels:
    """The picture. Raises ValueError if the text does not fit."""
    size_px = font_size_px(banner, width_px, height_px)
    if not size_px:
        raise ValueError(f"{banner.lines} does not fit into {width_px}×{height_px} px")
    pixels = _ground(banner.ground, width_px, height_px)
    text_box, shape_box = _boxes(banner, width_px, height_px)
    if banner.shape:
        _paint(pixels, _shape_mask(banner.shape.kind, _diameter_px(shape_box)), banner.shape.colour, shape_box)
    height = _text_height_px(len(banner.lines), size_px)
    for number, line in enumerate(banner.lines):
        baseline = text_box.top + round((text_box.height - height) / 2 + (CAPITAL + LINE_PITCH * number) * size_px)
        _write(pixels, line, banner, size_px, centre=text_box.left + text_box.width / 2, baseline=baseline)
    return pixels


def font_size_px(banner: Banner, width_px: int, height_px: int) -> int | None:
    """The largest size in which the text fits, if there is one."""
    box, _ = _boxes(banner, width_px, height_px)
    for size_px in reversed(FONT_SIZES_PX):
        if _text_height_px(len(banner.lines), size_px) <= box.height * TEXT_SHARE * 0.75 and all(
            _font(banner.typeface, size_px).getlength(line) <= box.width * TEXT_SHARE for line in banner.lines
        ):
            return size_px
    return None


def _text_height_px(lines: int, size_px: int) -> float:
    """From the first line's capitals down to the last line's baseline."""
    return (CAPITAL + LINE_PITCH * (lines - 1)) * size_px


def _boxes(banner: Banner, width_px: int, height_px: int) -> tuple[Box, Box]:
    """Where the text and the shape stand. Without a shape its box is empty."""
    if banner.shape is None:
        return Box(0, 0, width_px, height_px), Box(0, 0, 0, 0)
    if is_wide(width_px, height_px):
        own = height_px
        left = 0 if banner.shape.first else width_px - own
        return Box(own - left if banner.shape.first else 0, 0, width_px - own, height_px), Box(left, 0, own, height_px)
    own = round(height_px * 0.44)
    top = 0 if banner.shape.first else height_px - own
    return Box(0, own if banner.shape.first else 0, width_px, height_px - own), Box(0, top, width_px, own)


def _diameter_px(box: Box) -> int:
    return round(min(box.width, box.height) * SHAPE_SHARE)


def _ground(ground: Ground, width_px: int, height_px: int) -> Pixels:
    pixels = np.empty((height_px, width_px, 3), np.uint8)
    first = np.array(COLOURS[ground.colours[0]], np.float32)
    second = np.array(COLOURS[ground.colours[-1]], np.float32)
    length = width_px if ground.direction is Direction.ACROSS else height_px
    share = _second_share(ground.kind, length, min(width_px, height_px) / STRIPES)[:, None]
    along = (first + (second - first) * share + 0.5).astype(np.uint8)
    pixels[:] = along[None, :] if ground.direction is Direction.ACROSS else along[:, None]
    return pixels


def _second_share(kind: GroundKind, length_px: int, stripe_px: float) -> NDArray[np.float32]:
    """[length]: how much of the second colour there is, 0 to 1."""
    place = np.arange(length_px, dtype=np.float32)
    if kind is GroundKind.GRADIENT:
        return place / np.float32(length_px - 1)
    if kind is GroundKind.TWO_COLOUR:
        return (place >= length_px / 2).astype(np.float32)
    if kind is GroundKind.STRIPED:
        return (place // stripe_px % 2).astype(np.float32)
    return np.zeros(length_px, np.float32)


def _write(pixels: Pixels, line: str, banner: Banner, size_px: int, *, centre: float, baseline: int) -> None:
    font = _font(banner.typeface, size_px)
    left, top, _, _ = font.getbbox(line, anchor="ls")
    inked = font.getmask(line, mode="L")
    mask = np.array(inked, np.uint8).reshape(inked.size[::-1])
    start = round(centre - font.getlength(line) / 2 + left)
    _blend(pixels, mask, banner.colour, start, round(baseline + top))


def _paint(pixels: Pixels, mask: Mask, colour: str, box: Box) -> None:
    side = mask.shape[0]
    _blend(pixels, mask, colour, box.left + (box.width - side) // 2, box.top + (box.height - side) // 2)


def _blend(pixels: Pixels, mask: Mask, colour: str, left: int, top: int) -> None:
    height, width = mask.shape
    under = pixels[top : top + height, left : left + width]
    cover = mask[: under.shape[0], : under.shape[1], None].astype(np.float32) / 255
    under[:] = (under + (np.array(COLOURS[colour], np.float32) - under) * cover + 0.5).astype(np.uint8)


@cache
def _font(typeface: Typeface, size_px: int) -> ImageFont.FreeTypeFont:
    path = Path(__file__).parent / "fonts" / FONTS[typeface]
    return ImageFont.truetype(str(path), size_px, layout_engine=ImageFont.Layout.BASIC)


@cache
def _shape_mask(kind: ShapeKind, side_px: int) -> Mask:
    large = side_px * SUPERSAMPLED
    image = Image.new("L", (large, large))
    draw = ImageDraw.Draw(image)
    if kind is ShapeKind.CIRCLE:
        draw.ellipse((0, 0, large - 1, large - 1), fill=255)
    elif kind is ShapeKind.SQUARE:
        draw.rectangle((0, 0, large - 1, large - 1), fill=255)
    else:
        draw.polygon(_star(large, *((5, 0.4) if kind is ShapeKind.STAR else (12, 0.8))), fill=255)
    return np.asarray(image.resize((side_px, side_px), Image.Resampling.BOX))


def _star(side: int, points: int, inner: float) -> list[tuple[float, float]]:
    """Corners of a star whose inner ones lie at the share ``inner`` of its radius."""
    radii = [side / 2 * (inner if number % 2 else 1) for number in range(2 * points)]
    angles = [pi * number / points - pi / 2 for number in range(2 * points)]
    return [(side / 2 + r * cos(a), side / 2 + r * sin(a)) for r, a in zip(radii, angles, strict=True)]
