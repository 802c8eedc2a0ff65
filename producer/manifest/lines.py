"""Text of a file of unknown origin, line by line: UTF-8 with or without a byte order mark, UTF-16 by its mark.

Any other encoding is refused with words that say how to save the file. No line is held that is longer than a limit,
so a file without line ends costs no memory.
"""

import codecs
import io
from collections.abc import Iterator
from typing import IO

from producer.manifest.problem import ManifestError

HOW_TO_SAVE = "save it as 'CSV UTF-8' (in Excel: Save As, file type 'CSV UTF-8')"
PIECE_BYTES = 1 << 20
FOREIGN = (
    (b"PK\x03\x04", "is a spreadsheet or another zip: send it as .xlsx, or save it as CSV"),
    (b"\xd0\xcf\x11\xe0", "is an old .xls, or a spreadsheet with a password: save it as .xlsx without one"),
    (codecs.BOM_UTF32_LE, f"is UTF-32: {HOW_TO_SAVE}"),
    (codecs.BOM_UTF32_BE, f"is UTF-32: {HOW_TO_SAVE}"),
)


def lines(file: IO[bytes], longest: int) -> Iterator[str]:
    """The lines with their ends, as they stand. Of one longer than ``longest`` characters the first so many come,
    without an end; nothing comes after it.

    Raises:
        ManifestError: it is no text that is read here.
    """
    text = io.TextIOWrapper(io.BufferedReader(_Unclosed(file)), encoding=_encoding(file), newline="")
    try:
        while line := text.readline(longest):
            yield line
            if len(line) == longest and not line.endswith("\n"):
                return
    except UnicodeDecodeError as error:
        raise _undecodable(file, text.encoding, error) from None


class _Unclosed(io.RawIOBase):
    """A file that stays open when the text around it is gone."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "memoryview") -> int:  # type: ignore[override]
        piece = self._file.read(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)


def _encoding(file: IO[bytes]) -> str:
    """By the first bytes; leaves the file at its beginning. Raises: ManifestError."""
    file.seek(0)
    first = file.read(4)
    file.seek(0)
    for mark, told in FOREIGN:
        if first.startswith(mark):
            raise ManifestError.of_file(told)
    if first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if b"\x00" in first:
        raise ManifestError.of_file(f"is no text, or UTF-16 without a byte order mark: {HOW_TO_SAVE}")
    return "utf-8-sig"


def _undecodable(file: IO[bytes], encoding: str, error: UnicodeDecodeError) -> ManifestError:
    """Text is decoded in pieces, so the line is counted anew."""
    if encoding == "utf-16":
        return ManifestError.of_file(f"is no UTF-16 text ({error.reason}): {HOW_TO_SAVE}")
    return ManifestError.of_file(f"is not UTF-8 text ({error.reason}): {HOW_TO_SAVE}", line=_first_bad_line(file))


def _first_bad_line(file: IO[bytes]) -> int:
    file.seek(0)
    decoder = codecs.getincrementaldecoder("utf-8")()
    ends = 0
    while piece := file.read(PIECE_BYTES):
        held = len(decoder.getstate()[0])
        try:
            decoder.decode(piece)
        except UnicodeDecodeError as error:
            return ends + piece[: max(0, error.start - held)].count(b"\n") + 1
        ends += piece.count(b"\n")
    return ends + 1
