"""Reads a manifest, a CSV or JSONL file with one image a row, into submissions.

Bad rows are told by line and column, all of them at once, before anything is submitted. Rows are read one by one and
never all held, so a manifest may have any length.
"""

import csv
import io
import json
import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from producer.jobs.contract import Submission
from producer.jobs.errors import FarmError

FIELDS = tuple(Submission.model_fields)
PROBLEMS_MAX = 20
"""Problems that are told; more are only counted."""


class ManifestKind(StrEnum):
    """How a manifest is written."""

    CSV = "csv"
    JSONL = "jsonl"

    @classmethod
    def of(cls, path: Path) -> "ManifestKind":
        """By the file's suffix. Raises: ManifestError."""
        kinds = {".csv": cls.CSV, ".jsonl": cls.JSONL, ".ndjson": cls.JSONL}
        try:
            return kinds[path.suffix.lower()]
        except KeyError:
            raise ManifestError(
                [Problem(0, None, f"{path.name} is neither .csv nor .jsonl: rename it, or give --kind")]
            ) from None


@dataclass(frozen=True)
class Problem:
    """What is wrong with one place of a manifest. ``line`` counts from 1, the header included; 0 is the whole file."""

    line: int
    column: str | None
    message: str

    def __str__(self) -> str:
        place = [f"line {self.line}"] if self.line else []
        place += [f"column {self.column!r}"] if self.column else []
        return ": ".join([", ".join(place), self.message]) if place else self.message


class ManifestError(FarmError):
    """The manifest cannot be submitted as it is. ``problems`` says where and why; ``count`` how many there are."""

    def __init__(self, problems: list[Problem], count: int | None = None) -> None:
        self.problems = problems
        self.count = count or len(problems)
        super().__init__("\n".join(_lines(self.problems, self.count)))


@dataclass(frozen=True)
class LeftOut:
    """What was not submitted of a manifest: so many rows. ``count`` is of their problems, of which some are here."""

    rows: int
    problems: list[Problem]
    count: int

    def __str__(self) -> str:
        return "\n".join(
            [*_lines(self.problems, self.count), f"left out: {self.rows} {'row' if self.rows == 1 else 'rows'}"]
        )


def _lines(problems: list[Problem], count: int) -> list[str]:
    more = [f"… and {count - len(problems)} more"] if count > len(problems) else []
    return [*map(str, problems), *more]


@dataclass(frozen=True)
class Row:
    """One row of a manifest: a submission, or what is wrong with it."""

    line: int
    submission: Submission | None
    problems: tuple[Problem, ...] = ()


def read(
    file: io.TextIOBase,
    kind: ManifestKind,
    *,
    name_template: str | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Iterator[Row]:
    """The rows of a manifest, one by one, good and bad.

    Args:
        file: opened as UTF-8 (``utf-8-sig`` allows for a spreadsheet's byte order mark) with ``newline=""``.
        name_template: names each output from the row's columns, as in ``{sku}_{width}x{height}``; columns that it
            uses may be in the file beside those of a submission.
        defaults: values for fields that a row leaves empty.

    Raises:
        ManifestError: the file as a whole cannot be read: no rows, no text, a bad header.
    """
    name = _Namer(name_template) if name_template else None
    allowed = {*FIELDS, *(name.columns if name else ())}
    records = _csv_records(file, allowed) if kind is ManifestKind.CSV else _json_records(file)
    empty = True
    try:
        for line, record in records:
            empty = False
            yield record if isinstance(record, Row) else _row(line, record, allowed, name, defaults or {})
    except UnicodeDecodeError as error:
        raise ManifestError([Problem(0, None, f"is not UTF-8 text ({error.reason}): save it as CSV UTF-8")]) from None
    if empty:
        raise ManifestError([Problem(0, None, "holds no rows: there is nothing to submit")])


def accept(rows: Iterable[Row], *, keep: Callable[[Submission], None], partial: bool = False) -> LeftOut:
    """Hand every good row to ``keep``. Names must differ within the manifest.

    Returns what was left out, which is nothing unless ``partial``.

    Raises:
        ManifestError: there are bad rows and not ``partial``, or no good one at all, or ``rows`` cannot be read to
            their end; then with the problems found before.
    """
    problems: list[Problem] = []
    lines_by_name: dict[str, int] = {}
    count = good = bad = 0
    try:
        for row in rows:
            found = row.problems or _clash(row, lines_by_name)
            if found:
                bad += 1
                count += len(found)
                problems += found[: PROBLEMS_MAX - len(problems)]
            elif row.submission is not None:
                good += 1
                keep(row.submission)
    except ManifestError as broken:
        raise ManifestError(problems + broken.problems, count + broken.count) from None
    if count and not (partial and good):
        raise ManifestError(problems, count)
    return LeftOut(bad, problems, count)


def _clash(row: Row, lines_by_name: dict[str, int]) -> tuple[Problem, ...]:
    name = row.submission.name if row.submission else None
    if name is None:
        return ()
    first = lines_by_name.setdefault(name.casefold(), row.line)
    if first == row.line:
        return ()
    return (Problem(row.line, "name", f"{name!r} is the name of line {first} already: names must differ"),)


def _csv_records(file: io.TextIOBase, allowed: set[str]) -> Iterator[tuple[int, dict[str, Any] | Row]]:
    records = _numbered(file)
    _, first = next(records, (1, []))
    header = [cell.strip() for cell in first]
    _check_header(header, allowed)
    for line, cells in records:
        if any(cell.strip() for cell in cells):
            yield line, _csv_record(line, header, cells)


def _numbered(file: io.TextIOBase) -> Iterator[tuple[int, list[str]]]:
    """Each record with the line on which it begins; quoted cells may go over many."""
    reader = csv.reader(file, strict=True)
    while True:
        begins = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ManifestError([Problem(begins, None, f"is no CSV: {_in_clear_words(error)}")]) from None
        yield begins, cells


def _in_clear_words(error: csv.Error) -> str:
    """What Python's own words for the two ways of an open quote mean to whoever wrote the file."""
    words = str(error)
    if words == "unexpected end of data":
        return "a quote is opened in this row and closed nowhere below"
    if words.startswith("field larger than field limit"):
        return f"a cell has more than {csv.field_size_limit()} characters: is a quote in this row not closed?"
    return words


def _csv_record(line: int, header: list[str], cells: list[str]) -> dict[str, Any] | Row:
    if len(cells) > len(header):
        problem = f"has {len(cells)} cells and the header {len(header)}: put a cell that holds a comma in quotes"
        return Row(line, None, (Problem(line, None, problem),))
    return {column: cell for column, cell in zip(header, cells, strict=False) if cell != ""}


def _check_header(header: list[str], allowed: set[str]) -> None:
    if not header:
        raise ManifestError([Problem(0, None, "is empty: the first line must name the columns")])
    for separator, name in ((";", "semicolons"), ("\t", "tabs")):
        if len(header) == 1 and allowed & set(header[0].split(separator)) and separator in header[0]:
            raise ManifestError([Problem(1, None, f"its columns are separated by {name}: save it with commas")])
    problems = [Problem(1, column, "is there twice") for column in sorted({c for c in header if header.count(c) > 1})]
    for column in header:
        if column not in allowed:
            known = f"write {column.lower()!r}" if column.lower() in allowed else f"there are {', '.join(FIELDS)}"
            problems.append(Problem(1, column, f"is no column of a request, nor used by --name: {known}"))
    for column in sorted(allowed - set(FIELDS) - set(header)):
        problems.append(Problem(1, column, "is used by --name and is no column of the file"))
    if "prompt" not in map(str.lower, header):
        problems.append(Problem(1, "prompt", "is missing"))
    if problems:
        raise ManifestError(problems)


def _json_records(file: io.TextIOBase) -> Iterator[tuple[int, dict[str, Any] | Row]]:
    for line, text in enumerate(file, start=1):
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            yield line, Row(line, None, (Problem(line, None, f"is no JSON: {error}"),))
            continue
        except (ValueError, RecursionError):  # Python's own limits, against numbers and nesting that take all its time
            yield line, Row(line, None, (Problem(line, None, "holds a number or a nesting beyond all measure"),))
            continue
        if isinstance(record, dict):
            yield line, record
        else:
            yield line, Row(line, None, (Problem(line, None, "is no JSON object"),))


def _row(
    line: int, record: dict[str, Any], allowed: set[str], name: "_Namer | None", defaults: Mapping[str, Any]
) -> Row:
    unknown = [Problem(line, str(column), "is no field of a request") for column in record if column not in allowed]
    if unknown:
        return Row(line, None, tuple(unknown))
    values = {**defaults, **{column: value for column, value in record.items() if column in FIELDS}}
    try:
        submission = Submission.model_validate(values)
        if name:
            named = name.of({**submission.model_dump(mode="json"), **record})
            submission = Submission.model_validate({**values, "name": named})
    except ValidationError as error:
        return Row(line, None, tuple(_problems(line, error)))
    except KeyError as error:
        return Row(line, None, (Problem(line, str(error.args[0]), "is empty, and --name uses it"),))
    return Row(line, submission)


def _problems(line: int, error: ValidationError) -> Iterator[Problem]:
    for detail in error.errors(include_url=False):
        yield Problem(line, ".".join(map(str, detail["loc"])), detail["msg"].removeprefix("Value error, "))


class _Namer:
    """Fills the template of ``--name``: plain ``{column}`` places, nothing of Python's format language beyond them."""

    def __init__(self, template: str) -> None:
        # A suffix may be given as users think of it; the image's format decides.
        self._template = template.removesuffix(".{format}")
        for suffix in (".png", ".jpg", ".jpeg", ".webp"):
            self._template = self._template.removesuffix(suffix)
        try:
            parts = list(string.Formatter().parse(self._template))
        except ValueError as error:
            raise ManifestError([Problem(0, None, f"--name {template!r}: {error}")]) from None
        self.columns = [column for _, column, _, _ in parts if column is not None]
        if any(spec or conversion for _, _, spec, conversion in parts) or not all(
            column.isidentifier() for column in self.columns
        ):
            raise ManifestError([Problem(0, None, f"--name {template!r}: write columns as {{column}}, nothing else")])

    def of(self, values: Mapping[str, Any]) -> str:
        """The name of one row. Raises: KeyError, naming a column that the row leaves empty."""
        for column in self.columns:
            if values[column] in (None, ""):
                raise KeyError(column)
        return self._template.format_map(values)
