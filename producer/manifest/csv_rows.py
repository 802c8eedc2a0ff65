"""Rows of a CSV file, in constant memory. The first row names the columns.

Of comma, semicolon and tab that one separates the cells by which the first row holds most columns that mean anything
here; the comma where others find no more. Rows below say nothing of it: prompts are full of commas. A first line
``sep=;``, which is written for Excel, says it itself and is no row.

Excel leaves out empty cells at the end of some rows and not of others, so a row that is shorter than the header is read
as if they were there.
"""

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from typing import IO

from producer.manifest.lines import lines
from producer.manifest.problem import ManifestError, Problem
from producer.manifest.record import Record

LINE_MAX_CHARACTERS = 4_000_000
ROW_MAX_LINES = 10_000
"""Over which the quoted cells of one row may go."""
COLUMNS_MAX = 700
SEPARATOR_LINE = re.compile(r"sep=(.)\1*\s*", re.IGNORECASE)
SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab"}

CheckHeader = Callable[[Sequence[str], int], Sequence[Problem]]
"""What is wrong with the names of the columns, which stand in that line."""
Knows = Callable[[str], bool]
"""Whether the name of a column means anything here."""


def csv_rows(file: IO[bytes], separator: str, check_header: CheckHeader) -> Iterator[Record]:
    """Raises: ManifestError: no more of the file can be read, or its header is wrong."""
    header: list[str] = []
    records = _numbered(file, separator, header)
    header_line, first = next(records, (1, []))
    if [cell.lower() for cell in _filled(first)] == ["sep="]:
        header_line, first = next(records, (2, []))
    header += _filled([cell.strip() for cell in first])
    check_columns(header, check_header, header_line)
    for line, cells in records:
        if any(cell.strip() for cell in cells):
            yield _record(line, header, cells, separator)


def separator_of(file: IO[bytes], knows: Knows) -> str:
    """By the first row, see above. Raises: ManifestError: it is no text, or names another separator."""
    if named := SEPARATOR_LINE.fullmatch(next(lines(file, LINE_MAX_CHARACTERS), "")):
        if named[1] not in SEPARATORS:
            told = f"names {named[1]!r} as what separates the cells: {', '.join(SEPARATORS.values())} are read"
            raise ManifestError.of_file(told, line=1)
        return named[1]
    return max(SEPARATORS, key=lambda separator: _known_columns(file, separator, knows))


def _known_columns(file: IO[bytes], separator: str, knows: Knows) -> int:
    """How many a header of cells between ``separator`` names."""
    try:
        _, first = next(_numbered(file, separator, ()), (1, []))
    except ManifestError:  # told when the rows are read, if no other separator does better
        return -1
    return sum(knows(cell.strip()) for cell in first[:COLUMNS_MAX])


def check_columns(header: Sequence[str], check_header: CheckHeader, line: int) -> None:
    """Raises: ManifestError."""
    if not any(header):
        raise ManifestError.of_file("is empty: the first line must name the columns")
    if len(header) > COLUMNS_MAX:
        raise ManifestError.of_file(f"has {len(header)} columns: {COLUMNS_MAX} are read at most", line=line)
    unnamed = next((place for place, column in enumerate(header, start=1) if not column), None)
    if unnamed:
        raise ManifestError.of_file(f"column {unnamed} has no name", line=line)
    if problems := check_header(header, line):
        raise ManifestError(problems[:20], len(problems))


def _filled(cells: list[str]) -> list[str]:
    """Without the empty cells at the end, which spreadsheets write where a column was used once."""
    while cells and not cells[-1].strip():
        cells.pop()
    return cells


def _record(line: int, header: Sequence[str], cells: list[str], separator: str) -> Record:
    left_out = max(0, len(header) - len(cells))
    values = dict(zip(header, cells + [""] * left_out, strict=False))
    if len(cells) > len(header) and len(_filled(cells)) > len(header):
        name = SEPARATORS[separator]
        told = f"has {len(cells)} cells and the header names {len(header)}: put a cell that holds a {name} in quotes"
        return Record(line, values, (Problem(line, None, told),))
    return Record(line, values, left_out=left_out)


def _numbered(file: IO[bytes], separator: str, header: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Each row with the line on which it begins; quoted cells may go over many."""
    kept: list[str] = []  # the lines of the row that is being read, to say what is wrong with it
    read = _keeping(lines(file, LINE_MAX_CHARACTERS), kept, separator, header)
    reader = csv.reader(read, delimiter=separator, strict=True)
    while True:
        begins = reader.line_num + 1
        kept.clear()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise _told(error, begins, "".join(kept), separator, header) from None
        if len(kept[-1]) == LINE_MAX_CHARACTERS:
            raise ManifestError.of_file(f"is longer than {LINE_MAX_CHARACTERS:,} characters", line=begins)
        yield begins, cells


def _keeping(read: Iterator[str], kept: list[str], separator: str, header: Sequence[str]) -> Iterator[str]:
    """Raises: ManifestError: a row, of which the lines before are ``kept``, is too long."""
    characters = 0
    for number, line in enumerate(read, start=1):
        characters = len(line) + (characters if kept else 0)
        kept.append(line)
        if characters > LINE_MAX_CHARACTERS or len(kept) > ROW_MAX_LINES:
            most = f"{ROW_MAX_LINES:,} lines or {LINE_MAX_CHARACTERS:,} characters"
            told = f"is no CSV: this row has more than {most}: is a quote in it not closed?"
            column = _column("".join(kept), separator, header)
            raise ManifestError.of_file(told, line=number - len(kept) + 1, column=column)
        yield line


def _told(error: csv.Error, line: int, text: str, separator: str, header: Sequence[str]) -> ManifestError:
    """In words for whoever wrote the file, where Python's own are for whoever reads it."""
    words, limit = str(error), csv.field_size_limit()
    if words == "unexpected end of data":
        told = "is no CSV: a quote is opened in this row and closed nowhere below"
        return ManifestError.of_file(told, line=line, column=_column(text, separator, header))
    if words.startswith("field larger than field limit"):
        told = f"is no CSV: a cell has more than {limit:,} characters: is a quote in this row not closed?"
        return ManifestError.of_file(told, line=line, column=_column(text, separator, header, limit))
    return ManifestError.of_file(f"is no CSV: {words}", line=line)


def _column(text: str, separator: str, header: Sequence[str], longest: int | None = None) -> str:
    """The name, or else the place, of the cell that is longer than ``longest``; without that, of the last one."""
    place, begins, quoted = 0, 0, False
    for position, character in enumerate(text):
        if longest is not None and position - begins > longest + 1:
            break
        if character == '"':
            quoted = not quoted
        elif character == separator and not quoted:
            place, begins = place + 1, position + 1
    return header[place] if place < len(header) else str(place + 1)
