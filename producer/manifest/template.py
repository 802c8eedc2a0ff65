"""A text with places to be filled from a row: ``A {style} banner``.

A place is the name of a column in braces, and nothing else of Python's format language: no attribute, index, number,
conversion or format. Values are put in as they are, never formatted, so no template reaches beyond its row.
``{{`` and ``}}`` are braces.
"""

import string
from collections.abc import Mapping
from typing import Any

from producer.manifest.problem import ManifestError, Problem

BEYOND_A_NAME = frozenset(".[]!:{}")


class Unfilled(Exception):
    """A row says nothing for a place of the template, or no text, or too much: ``column`` names it."""

    def __init__(self, column: str, message: str) -> None:
        super().__init__(message)
        self.column = column


class Template:
    """One such text. ``option`` is what the template is called in errors, ``field`` what it makes, of ``longest``
    characters at most."""

    def __init__(self, text: str, option: str, field: str, longest: int) -> None:
        """Raises: ManifestError: something else than columns stands in its braces."""
        self._option = option
        self._field = field
        self._longest = longest
        try:
            self._parts = [self._part(*part) for part in string.Formatter().parse(text)]
        except ValueError as error:
            raise ManifestError([Problem(0, option, f"{text!r}: {error}; write columns as {{column}}")]) from None
        self.columns = frozenset(column for _, column in self._parts if column is not None)

    def _part(
        self, literal: str, column: str | None, spec: str | None, conversion: str | None
    ) -> tuple[str, str | None]:
        if column is None:
            return literal, None
        plain = column.strip() and not column.isdigit() and not BEYOND_A_NAME & set(column)
        if not plain or spec or conversion:
            written = column + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise ValueError(f"{{{written}}} is no plain column")
        return literal, column

    def fill(self, values: Mapping[str, Any]) -> str:
        """The text for one row. No longer one is ever held. Raises: Unfilled."""
        filled: list[str] = []
        characters = 0
        for literal, column in self._parts:
            filled += (literal, "" if column is None else self._text(column, values))
            characters += len(filled[-2]) + len(filled[-1])
            if characters > self._longest:
                told = f"has more than {self._longest:,} characters as {self._option} makes it"
                raise Unfilled(self._field, told)
        return "".join(filled)

    def _text(self, column: str, values: Mapping[str, Any]) -> str:
        value = values.get(column)
        if value is None or value == "":
            raise Unfilled(column, f"is empty, and {self._option} uses it")
        if isinstance(value, bool):
            return str(value).lower()
        if not isinstance(value, str | int | float):
            raise Unfilled(column, f"is neither text nor a number, and {self._option} uses it")
        return str(value)
