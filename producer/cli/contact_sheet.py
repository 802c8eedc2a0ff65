"""Many images on one: thumbnails in rows, each with its name."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH_PX = 1600
CELL_PX = (300, 190)
MARGIN_PX = 14
LABEL_PX = 20
IMAGES_MAX = 200
"""More would be a wall, not a sheet."""
PAPER, INK = "#f4f4f2", "#333333"


def make_contact_sheet(images: Sequence[Path], to: Path) -> None:
    """Write a contact sheet of the image files, in their order, as a PNG.

    Raises: OSError, if a file is no image.
    """
    columns = (WIDTH_PX - MARGIN_PX) // (CELL_PX[0] + MARGIN_PX)
    rows = -(-len(images) // columns)
    height_px = MARGIN_PX + rows * (CELL_PX[1] + LABEL_PX + MARGIN_PX)
    sheet = Image.new("RGB", (WIDTH_PX, height_px), PAPER)
    for place, path in enumerate(images):
        row, column = divmod(place, columns)
        left = MARGIN_PX + column * (CELL_PX[0] + MARGIN_PX)
        top = MARGIN_PX + row * (CELL_PX[1] + LABEL_PX + MARGIN_PX)
        _place(sheet, path, left, top)
    sheet.save(to, "PNG")


def _place(sheet: Image.Image, path: Path, left_px: int, top_px: int) -> None:
    with Image.open(path) as image:
        thumbnail = image.convert("RGB")
        label = f"{path.stem}  {image.width}x{image.height}"
    thumbnail.thumbnail(CELL_PX, Image.Resampling.LANCZOS)
    sheet.paste(thumbnail, (left_px, top_px + CELL_PX[1] - thumbnail.height))
    draw = ImageDraw.Draw(sheet)
    draw.text((left_px, top_px + CELL_PX[1] + 4), label, fill=INK, font=ImageFont.load_default(size=13))
