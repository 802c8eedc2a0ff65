"""Reads a manifest, a CSV, JSONL or XLSX file with an image or more a row, into jobs.

Bad rows are told by line and column, and the first of them all at once, before anything is submitted. Rows are read one
by one and never all held, so a manifest may have any length. Knows no HTTP and no SQL.
"""

from collections.abc import Iterator
from enum import StrEnum
from typing import IO

from producer.jobs.contract import Entry, Rejection
from producer.manifest.csv_rows import SEPARATORS, csv_rows, separator_of
from producer.manifest.json_rows import json_rows
from producer.manifest.names import Names
from producer.manifest.problem import ManifestError, Problem
from producer.manifest.recipe import Recipe
from producer.manifest.record import NAMED_CHARACTERS, Record, kept, storable
from producer.manifest.sizes import Size, drawn_larger, size_sets

__all__ = [
    "SEPARATORS",
    "ManifestError",
    "ManifestKind",
    "Problem",
    "Reading",
    "Recipe",
    "Size",
    "drawn_larger",
    "size_sets",
]

PROBLEMS_MAX = 20
"""Problems that are told; more are only counted."""
MESSAGE_MAX_CHARACTERS = 2_000
"""Of what a rejection says; names of columns stand in it."""


class ManifestKind(StrEnum):
    """How a manifest is written."""

    CSV = "csv"
    JSONL = "jsonl"
    XLSX = "xlsx"


class Reading:
    """One pass through a manifest: the jobs as they come, and what was wrong on the way.

    ``file`` is at its beginning, can be rewound, and stays open. A row is taken or rejected whole: with all that is
    varied of it.
    """

    def __init__(self, file: IO[bytes], kind: ManifestKind, recipe: Recipe) -> None:
        self._file = file
        self._kind = kind
        self._recipe = recipe
        self._names = Names()
        self._good = 0
        self.rejected = 0
        self.problems: list[Problem] = []
        self.count = 0
        self.short_rows = 0  # good ones of which the last cells were left out
        self.separator: str | None = None  # of the cells of a CSV file

    @property
    def carried(self) -> list[str]:
        """Columns that nothing uses and that only come along into the results: the first ones that were read."""
        return self._recipe.carried

    def entries(self, *, partial: bool = False) -> Iterator[Entry | Rejection]:
        """Every job, in order; with ``partial`` the bad rows between them. Without it nothing follows a first bad row,
        and reading goes on only to know what else is wrong.

        Raises:
            ManifestError: rows are bad and not ``partial``, or none is good, or the file cannot be read to its end;
                with what was found before.
        """
        try:
            for entries in self._rows():
                if isinstance(entries, Rejection):
                    if partial:
                        yield entries
                elif partial or not self.count:
                    yield from entries
        except ManifestError as broken:
            raise ManifestError([*self.problems, *broken.problems][:PROBLEMS_MAX], self.count + broken.count) from None
        if self.count and not (partial and self._good):
            raise ManifestError(self.problems, self.count)
        if not self._good:
            raise ManifestError.of_file("holds no rows: there is nothing to submit")

    def _rows(self) -> Iterator[list[Entry] | Rejection]:
        for record in self._records():
            made = self._recipe.entries(record)
            if isinstance(made, list):
                clash = self._names.take(record.line, [entry.submission.name for entry in made])
                if clash is None:
                    self._good += 1
                    self.short_rows += record.left_out > 0
                    yield made
                    continue
                made = (clash,)
            yield self._rejection(record, made)

    def _records(self) -> Iterator[Record]:
        if self._kind is ManifestKind.JSONL:
            return json_rows(self._file)
        if self._kind is ManifestKind.CSV:
            self.separator = separator_of(self._file, self._recipe.knows)
            return csv_rows(self._file, self.separator, self._recipe.check_header)
        from producer.manifest.xlsx_rows import xlsx_rows  # openpyxl takes a quarter of a second to import

        return xlsx_rows(self._file, self._recipe.check_header)

    def _rejection(self, record: Record, problems: tuple[Problem, ...]) -> Rejection:
        self.rejected += 1
        self.count += len(problems)
        self.problems += problems[: PROBLEMS_MAX - len(self.problems)]
        first = problems[0]
        told = "; ".join(problem.message if problem is first else str(problem) for problem in problems)
        column = first.column and storable(first.column[:NAMED_CHARACTERS])
        return Rejection(
            record.line, storable(kept(record.values)), "invalid", storable(told[:MESSAGE_MAX_CHARACTERS]), column
        )
