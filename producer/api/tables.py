"""A batch's results as a table: CSV, JSON lines or a workbook, a row for each row of the input.

What people handed in comes back as it was, in their own columns and order, with what became of it behind. A spreadsheet
runs a cell that looks like a formula, so no text leaves here as one: in CSV it gets a quotation mark in front, as OWASP
advises against CSV injection, unless it is a plain number; a workbook says of each cell that it is text. Where another
separator is expected, the quotes begin within a cell and protect nothing, so what stands behind a semicolon, a tab or a
line break counts as a cell too.
"""

import csv
import io
import json
import re
import tempfile
from collections.abc import Generator, Iterable, Sequence
from enum import StrEnum
from typing import IO, Any

from openpyxl import Workbook
from openpyxl.cell import WriteOnlyCell

from producer.api.answers import image_path
from producer.api.errors import Fault, Invalid
from producer.jobs.contract import Job, State
from producer.jobs.results import Result

COLUMNS = (
    *("prompt", "state", "error", "seed", "size", "url", "file", "sha256", "bytes"),
    *("submitted_at", "finished_at", "waiting_s", "drawing_s", "encoding_s", "uploading_s", "warnings", "line", "job"),
)
"""Behind the input's own; ``prompt`` only where the input has no such column. One that the input has too is called
``result_…`` here."""
IN_THE_WAY = rf"(result_)*({'|'.join(COLUMNS)})"
"""The input's columns that change what one of these is called: a regular expression."""
REJECTED = "rejected"
"""In place of a job's state: the line became no job."""

FORMULA_BEGINS = tuple("=+-@\t\r\n＝＋－＠")
NUMBER = re.compile(r"[+-]?(\d+([.,]\d*)?|[.,]\d+)([eE][+-]?\d+)?", re.ASCII)

INNER_CELL = re.compile(r"""(?<=[;\t\r\n])(?="*[=+\-@＝＋－＠])[^;\t\r\n]+""")

SHEET_MAX_ROWS = 2**20
SHEET_MAX_COLUMNS = 2**14
CELL_MAX_CHARACTERS = 32_767
EXACT_MAX = 10**15
"""A spreadsheet keeps 15 digits of a number; one with more is written as text."""
NOT_IN_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
READ_AS_MORE_THAN_TEXT = ("=", "#")
"""Beginnings of what openpyxl takes for a formula or an error, unless it is told."""
PIECE_CHARACTERS = 131_072
PIECE_BYTES = 65_536


class TableFormat(StrEnum):
    """How a table is written."""

    CSV = "csv"
    JSONL = "jsonl"
    XLSX = "xlsx"

    @property
    def media_type(self) -> str:
        return {
            TableFormat.CSV: "text/csv; charset=utf-8",
            TableFormat.JSONL: "application/x-ndjson",
            TableFormat.XLSX: "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet",
        }[self]


class Table:
    """The columns of one batch's table, and its rows.

    ``input_columns`` are the input's own, ``base_url`` is where this API was asked. For ``fields`` those do that are
    ``IN_THE_WAY``, so that lines may have any number of columns.
    """

    def __init__(self, input_columns: Sequence[str], base_url: str) -> None:
        self._input = input_columns
        self._base_url = base_url.rstrip("/")
        self._titles = {column: _free(column, input_columns) for column in COLUMNS}
        if "prompt" in input_columns:
            del self._titles["prompt"]

    @property
    def header(self) -> list[str]:
        return [*self._input, *self._titles.values()]

    def cells(self, result: Result) -> list[Any]:
        """In the header's order; None where there is nothing."""
        outcome = self._outcome(result)
        return [*map(result.source.get, self._input), *(outcome.get(column) for column in self._titles)]

    def fields(self, result: Result) -> dict[str, Any]:
        """The row as an object: of the input's own columns those that the line had."""
        outcome = self._outcome(result)
        return result.source | {title: outcome.get(column) for column, title in self._titles.items()}

    def _outcome(self, result: Result) -> dict[str, Any]:
        if result.job is not None:
            return {"line": result.line} | self._of_job(result.job, result.file_name)
        assert result.rejection is not None
        field, message = result.rejection.field, result.rejection.message
        return {"line": result.line, "state": REJECTED, "error": f"{field}: {message}" if field else message}

    def _of_job(self, job: Job, file_name: str) -> dict[str, Any]:
        there = job.state is State.SUCCEEDED
        return {
            "prompt": job.request.prompt,
            "state": job.state.value,
            "error": job.error_message or job.error_code,
            "seed": job.request.seed,
            "size": f"{job.width_px or job.request.width}x{job.height_px or job.request.height}",
            "url": self._base_url + image_path(job.id) if there else None,
            "file": file_name if there else None,
            "sha256": job.sha256,
            "bytes": job.size_bytes,
            "submitted_at": job.created_at.isoformat(timespec="milliseconds"),
            "finished_at": job.finished_at.isoformat(timespec="milliseconds") if job.finished_at else None,
            "waiting_s": _rounded(job.waiting_s),
            "drawing_s": _rounded(job.drawing_s),
            "encoding_s": _rounded(job.encoding_s),
            "uploading_s": _rounded(job.uploading_s),
            "warnings": "; ".join(job.warnings) or None,
            "job": str(job.id),
        }


def csv_pieces(table: Table, results: Iterable[Result]) -> Generator[bytes, None, None]:
    """The table as CSV that a spreadsheet takes for UTF-8, a row or more a piece.

    Every cell is in quotes, so that none falls apart where semicolons separate.
    """
    written = io.StringIO()
    writer = csv.writer(written, quoting=csv.QUOTE_ALL)
    written.write("\N{ZERO WIDTH NO-BREAK SPACE}")
    writer.writerow(map(inert, table.header))
    for result in results:
        writer.writerow([inert(_text(cell)) for cell in table.cells(result)])
        if written.tell() >= PIECE_CHARACTERS:
            yield _taken(written)
    yield _taken(written)


def jsonl_pieces(table: Table, results: Iterable[Result]) -> Generator[bytes, None, None]:
    """The table as one JSON object a line, a line or more a piece."""
    written = io.StringIO()
    for result in results:
        written.write(json.dumps(table.fields(result), ensure_ascii=False) + "\n")
        if written.tell() >= PIECE_CHARACTERS:
            yield _taken(written)
    yield _taken(written)


def xlsx_pieces(table: Table, results: Iterable[Result]) -> Generator[bytes, None, None]:
    """The table as a workbook, made in temporary files before its first piece comes. Raises: Invalid, before that."""
    if (columns := len(table.header)) > SHEET_MAX_COLUMNS:
        told = f"a workbook has {SHEET_MAX_COLUMNS:,} columns at most, and this table {columns:,}: take csv or jsonl"
        raise Invalid([Fault(field="format", message=told)])
    with tempfile.TemporaryFile() as file:
        _write_workbook(table, results, file)
        file.seek(0)
        while piece := file.read(PIECE_BYTES):
            yield piece


def inert(text: str) -> str:
    """The text as a cell of CSV that no spreadsheet runs."""
    inner = INNER_CELL.sub(_inert_inside, text)
    return f"'{inner}" if text.startswith(FORMULA_BEGINS) and not NUMBER.fullmatch(text) else inner


def _inert_inside(cell: re.Match[str]) -> str:
    return cell[0] if NUMBER.fullmatch(cell[0]) else f"'{cell[0]}"


def _write_workbook(table: Table, results: Iterable[Result], file: IO[bytes]) -> None:
    book = Workbook(write_only=True)
    sheet = _begun_sheet(book, table)
    for number, result in enumerate(results):
        if number and number % (SHEET_MAX_ROWS - 1) == 0:
            sheet = _begun_sheet(book, table)
        sheet.append([_written(sheet, cell) for cell in table.cells(result)])
    book.save(file)


def _begun_sheet(book: Workbook, table: Table) -> Any:
    sheet = book.create_sheet("results" if not book.worksheets else None)
    sheet.append([_written(sheet, title) for title in table.header])
    return sheet


def _written(sheet: Any, cell: Any) -> Any:
    """The cell as openpyxl writes it: a number, or text and nothing but text."""
    if cell is None or isinstance(cell, bool) or (isinstance(cell, int | float) and abs(cell) < EXACT_MAX):
        return cell
    text = NOT_IN_XML.sub("\N{REPLACEMENT CHARACTER}", _text(cell))
    if len(text) > CELL_MAX_CHARACTERS:
        text = text[: CELL_MAX_CHARACTERS - 1] + "…"
    if not text.startswith(READ_AS_MORE_THAN_TEXT):
        return text
    written = WriteOnlyCell(sheet, text)
    written.data_type = "s"
    return written


def _text(cell: Any) -> str:
    """What a line of JSON held, as one cell shows it."""
    if cell is None:
        return ""
    return cell if isinstance(cell, str) else json.dumps(cell, ensure_ascii=False)


def _taken(written: io.StringIO) -> bytes:
    """What was written, which is gone from there."""
    text = written.getvalue()
    written.seek(0)
    written.truncate()
    return text.encode()


def _free(column: str, taken: Sequence[str]) -> str:
    while column in taken:
        column = f"result_{column}"
    return column


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)
