"""Reads the words in a picture, as a person would judge them, by rapidocr.

It is a tool of development: whoever installs the farm to draw has no reader. Its models lie in its wheel, so it needs
no network. It may know no model of ours.

A word counts as read if its characters stand in what was read, folded in case, spaces and full-width signs; each
stretch that was read counts once. So neither the order of lines nor where the reader parts words matters.
"""

import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

ENLARGED = 2  # the reader is made for photographs: 16 px letters are small to it
DETECTED_AT_PX = 736  # the longer side; asked for by the longer, a wide banner's line stays whole


class MissingReader(RuntimeError):
    """rapidocr is not installed."""


class Reader:
    """One process's reader: 0.1 to 0.3 s a picture of the domain on one CPU core."""

    def __init__(self) -> None:
        try:
            from rapidocr import RapidOCR
        except ImportError as error:
            raise MissingReader("reading words needs rapidocr and onnxruntime: pip install -e '.[dev]'") from error
        self._engine: Any = RapidOCR(
            params={
                "Global.log_level": "critical",
                "Global.use_cls": False,  # nothing here stands upside down
                "Det.limit_type": "max",
                "Det.limit_side_len": DETECTED_AT_PX,
                "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            }
        )

    def read(self, pixels: NDArray[np.uint8]) -> str:
        """All text in ``pixels`` [height, width, 3], piece by piece, in no promised order."""
        height, width, _ = pixels.shape
        image = Image.fromarray(pixels).resize((width * ENLARGED, height * ENLARGED), Image.Resampling.BICUBIC)
        found = self._engine(np.ascontiguousarray(np.asarray(image)[..., ::-1]))
        return " ".join(found.txts or ())


def words_read(lines: Sequence[str], text: str) -> tuple[int, int]:
    """How many of the words in ``lines`` stand in ``text``, and how many there are."""
    words = [_folded(word) for line in lines for word in line.split()]
    rest, count = _folded(text), 0
    for word in sorted(words, key=len, reverse=True):
        if word in rest:
            rest = rest.replace(word, "\0", 1)
            count += 1
    return count, len(words)


def _folded(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())
