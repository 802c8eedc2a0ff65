"""Rows of the first sheet of an XLSX file. The first row that holds anything names the columns.

A cell counts as what a person sees in it: of a formula the result, or its text if no program has worked it out yet.
What the file says of its own size is not believed: before openpyxl builds anything out of it, the parts that are read
are unpacked once and counted, so that a small file cannot become a large memory. What the file calls them is its own
choice, so openpyxl opens what is limited here and nothing else.
"""

import re
import zipfile
from collections.abc import Collection, Iterator
from datetime import date, datetime, time, timedelta
from math import isfinite
from typing import IO, Any
from xml.parsers import expat

from openpyxl.packaging.manifest import Manifest
from openpyxl.reader.excel import ExcelReader
from openpyxl.worksheet._reader import FORMULA_TAG, WorkSheetParser
from openpyxl.xml.constants import ARC_CONTENT_TYPES, SHARED_STRINGS
from openpyxl.xml.functions import fromstring

from producer.manifest.csv_rows import COLUMNS_MAX, CheckHeader, check_columns
from producer.manifest.problem import ManifestError, Problem
from producer.manifest.record import Record

UNPACKED_MAX_BYTES = 512_000_000
STRINGS_MAX_BYTES = 64_000_000
"""Of the table of texts, which openpyxl holds in memory."""
TEXTS_MAX = 1_000_000
"""In that table: each takes openpyxl some 30 µs."""
PART_MAX_BYTES = 4_000_000
"""Of each other part that is read: styles, names of sheets."""
UNREAD_MAX_BYTES = 64_000_000
"""Of each that is not: pictures, what printers want."""
ALL_MAX_BYTES = 640_000_000
DIRECTORY_MAX_BYTES = 1_000_000
"""Of the list of all parts, where each takes 46 bytes and its name, and a kilobyte of memory."""
CELL_MAX_CHARACTERS = 131_072
TOO_LONG = f"a cell has more than {CELL_MAX_CHARACTERS:,} characters"
ROWS_MAX = 1_048_576
ELEMENTS_BESIDE_ROWS_MAX = 100_000
PIECE_BYTES = 1 << 16
NO_SPREADSHEET = "is no .xlsx spreadsheet that can be read"


def xlsx_rows(file: IO[bytes], check_header: CheckHeader) -> Iterator[Record]:
    """Raises: ManifestError: no more of the file can be read, or its header is wrong."""
    rows = _cells(file)
    header_line, first = next(rows, (1, {}))
    header = [str(_plain(first.get(place, "")) or "").strip() for place in range(1, max(first, default=0) + 1)]
    check_columns(header, check_header, header_line)
    for line, cells in rows:
        if line > header_line:
            yield _record(line, header, cells)


def _record(line: int, header: list[str], cells: dict[int, Any]) -> Record:
    values = {column: _plain(cells.get(place)) for place, column in enumerate(header, start=1)}
    for column, value in values.items():
        if isinstance(value, str) and len(value) > CELL_MAX_CHARACTERS:
            raise ManifestError.of_file(TOO_LONG, line=line, column=column)
    beyond = max(cells) - len(header)
    if beyond > 0:
        problem = Problem(line, None, f"holds a cell {beyond} to the right of the last column that the header names")
        return Record(line, values, (problem,))
    return Record(line, values)


def _cells(file: IO[bytes]) -> Iterator[tuple[int, dict[int, Any]]]:
    """Each row that holds anything: its number and its cells by their column, from 1. Raises: ManifestError."""
    try:
        file.seek(0)
        with _opened(file) as archive:
            yield from _parsed(file, archive)
    except ManifestError:
        raise
    except Exception as error:  # openpyxl has no error of its own for what is no spreadsheet: KeyError, TypeError, …
        raise ManifestError.of_file(f"{NO_SPREADSHEET} ({type(error).__name__})") from error


def _parsed(file: IO[bytes], archive: "_Archive") -> Iterator[tuple[int, dict[int, Any]]]:
    archive.check()
    reader = ExcelReader(file, read_only=True, data_only=True, keep_links=False)
    reader.archive = archive
    reader.read()
    book = reader.wb
    try:
        sheet: Any = book.worksheets[0]
        archive.count_rows(sheet._worksheet_path)
        with sheet._get_source() as source:
            # Its own iteration fills every gap that a row's number or a cell's column leaves.
            parser = _Parser(
                source,
                sheet._shared_strings,
                data_only=True,
                epoch=book.epoch,
                date_formats=book._date_formats,  # type: ignore[attr-defined]
                timedelta_formats=book._timedelta_formats,  # type: ignore[attr-defined]
            )
            for number, row in parser.parse():
                if cells := {cell["column"]: cell["value"] for cell in row if cell["value"] not in (None, "")}:
                    yield number, cells
    finally:
        book.close()


class _Parser(WorkSheetParser):
    """Reads the result of a formula, or its text where there is no result."""

    def parse_cell(self, element: Any) -> Any:
        cell = super().parse_cell(element)
        if cell["value"] is None and (text := element.findtext(FORMULA_TAG)):
            cell["value"] = f"={text}"
        return cell


def _plain(value: Any) -> Any:
    """As it would stand in JSON."""
    if isinstance(value, float):
        if not isfinite(value):
            return str(value)
        return int(value) if value.is_integer() and abs(value) < 2**53 else value
    if isinstance(value, datetime):
        return value.date().isoformat() if value.time() == time() else value.isoformat(" ")
    if isinstance(value, date | time | timedelta):
        return str(value)
    return value


def _opened(file: IO[bytes]) -> "_Archive":
    """Raises: ManifestError."""
    try:
        _check_directory(file)
        return _Archive(file)
    except zipfile.BadZipFile:
        raise ManifestError.of_file(f"{NO_SPREADSHEET}: save it as .xlsx, without a password") from None


def _check_directory(file: IO[bytes]) -> None:
    """Zipfile reads the list of all parts whole, as long as the file's end says that it is. Raises: ManifestError."""
    end: Any = zipfile._EndRecData(file)  # type: ignore[attr-defined]
    size_bytes = end[zipfile._ECD_SIZE] if end else 0  # type: ignore[attr-defined]
    if size_bytes > DIRECTORY_MAX_BYTES:
        raise _too_much(
            f"it has too many parts: their list has {size_bytes:,} bytes, {DIRECTORY_MAX_BYTES:,} are read at most"
        )


class _Archive(zipfile.ZipFile):
    """Unpacks no part that is too large. Zipfile itself unpacks no more of one than the part says that it holds."""

    _read: Collection[str] = ()
    _counted: Collection[str] = ()

    def open(self, name: Any, *arguments: Any, **options: Any) -> Any:
        """Raises: ManifestError: it is not among the parts whose sizes were checked."""
        if name in self.NameToInfo and name not in self._read:
            raise ManifestError.of_file(f"{NO_SPREADSHEET}: its part {name!r:.200} has no usual name")
        return super().open(name, *arguments, **options)

    def check(self) -> None:
        """Raises: ManifestError: a part is too large, or all together."""
        parts = {part.filename: part.file_size for part in self.infolist()}
        if sum(parts.values()) > ALL_MAX_BYTES:
            raise _too_much(f"all of it unpacks to {sum(parts.values()):,} bytes, {ALL_MAX_BYTES:,} are read at most")
        if parts.get(ARC_CONTENT_TYPES, 0) > PART_MAX_BYTES:
            raise _too_much(f"{ARC_CONTENT_TYPES} unpacks to more than {PART_MAX_BYTES:,} bytes")
        self._read = {ARC_CONTENT_TYPES}
        types: Any = Manifest.from_tree(fromstring(self.read(ARC_CONTENT_TYPES)))  # type: ignore[arg-type]
        sheets = [name for name in parts if re.search(r"worksheets/[^/]+\.xml$", name)]
        told = {part.PartName.removeprefix("/") for part in types.Override if part.ContentType == SHARED_STRINGS}
        strings = [name for name in parts if name in told or name.lower().endswith("sharedstrings.xml")]
        self._read = {*(name for name in parts if name.endswith((".xml", ".rels"))), *strings}
        limits = dict.fromkeys(parts.keys() - self._read, UNREAD_MAX_BYTES)
        limits |= dict.fromkeys(sheets, UNPACKED_MAX_BYTES) | dict.fromkeys(strings, STRINGS_MAX_BYTES)
        for name, size_bytes in parts.items():
            if size_bytes > (limit := limits.get(name, PART_MAX_BYTES)):
                raise _too_much(f"{name:.200} unpacks to {size_bytes:,} bytes, {limit:,} are read at most")
        for name in strings:
            _Counter("si").count(self.open(name))
        for name in sheets:
            _Counter("row").count(self.open(name))
        self._counted = sheets

    def count_rows(self, sheet: str) -> None:
        """Of a sheet that has no usual name. Raises: ManifestError."""
        if sheet not in self._counted:
            _Counter("row").count(self.open(sheet))


def _too_much(told: str) -> ManifestError:
    return ManifestError.of_file(f"is beyond what is read of a spreadsheet: {told}; CSV takes more")


class _Counter:
    """Goes once through a part, and refuses what would become large in memory: ``item`` is what is built at a time."""

    def __init__(self, item: str) -> None:
        self._item = item
        self._items = self._inside = self._beside = self._characters = 0
        self._line, self._cell = 0, ""
        self._within = False
        self._parser = expat.ParserCreate()
        self._parser.StartElementHandler = self._begin
        self._parser.EndElementHandler = self._end
        self._parser.CharacterDataHandler = self._text
        self._parser.EntityDeclHandler = self._entity

    def count(self, part: IO[bytes]) -> None:
        """Raises: ManifestError, expat.ExpatError."""
        with part:
            while piece := part.read(PIECE_BYTES):
                self._parser.Parse(piece, False)
            self._parser.Parse(b"", True)

    def _begin(self, name: str, attributes: dict[str, str]) -> None:
        local = name.rpartition(":")[2]
        if local == self._item:
            self._within, self._inside, self._characters = True, 0, 0
            self._items += 1
            if self._items > TEXTS_MAX and self._item == "si":
                raise _too_much(f"it holds more than {TEXTS_MAX:,} texts")
            number = attributes.get("r", "")
            self._line = int(number) if number.isdecimal() else self._items
            if self._line > ROWS_MAX and self._item == "row":
                raise _too_much(f"a row has the number {self._line:,}, {ROWS_MAX:,} are read at most")
        elif not self._within:
            self._beside += 1
            if self._beside > ELEMENTS_BESIDE_ROWS_MAX:
                raise _too_much("it holds too much that is no row")
        else:
            self._inside += 1
            if local == "c":
                self._cell, self._characters = attributes.get("r", ""), 0
            if self._inside > 10 * COLUMNS_MAX or attributes.get("r", "")[2:3].isalpha():
                raise ManifestError.of_file(f"has more than {COLUMNS_MAX} columns", line=self._line)

    def _end(self, name: str) -> None:
        if name.rpartition(":")[2] == self._item:
            self._within = False

    def _text(self, text: str) -> None:
        self._characters += len(text)
        if self._item == "row" and self._within and self._characters > CELL_MAX_CHARACTERS:
            column = self._cell.rstrip("0123456789") or None
            raise ManifestError.of_file(TOO_LONG, line=self._line, column=column)

    def _entity(self, *_: Any) -> None:
        raise ManifestError.of_file(f"{NO_SPREADSHEET}: it declares entities")
