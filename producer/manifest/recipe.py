"""How the rows of a manifest become submissions: templates, defaults, what is varied; checked before any row is read.

What a row says goes before a default, and what is varied goes before both. ``size`` is a column like others, and stands
for width and height. A column that nothing uses comes along into the results, with or without a template; one that
plainly means a field, see ``columns``, is refused with the field's name, unless that is a column too.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from pydantic import ValidationError

from pipeline.request import PROMPT_MAX_CHARACTERS
from producer.jobs.contract import Entry, Submission
from producer.manifest.columns import FIELDS, SIZE, meant
from producer.manifest.problem import ManifestError, Problem
from producer.manifest.record import Record, too_large, unstorable
from producer.manifest.sizes import drawn_larger, size_of
from producer.manifest.template import Template, Unfilled
from producer.manifest.variation import variations

SIDES = ("width", "height")
DEFAULTS = Submission(prompt="-").model_dump(mode="json", exclude={"prompt"})
SUFFIXES = (".{format}", ".png", ".jpg", ".jpeg", ".webp")
NAME_MAX_CHARACTERS = 200
"""As ``contract.Submission`` counts bytes, of which a character has one at least."""
CHECKED_MAX = 1_000
"""Sets of columns that are remembered: rows of JSONL may have other ones each."""
CHECKED_MAX_CHARACTERS = 1_000_000
"""Of all their names, the set that came last apart."""
CARRIED_MAX = 100
"""Columns that are remembered to be told."""
CARRIED_NAME_MAX_CHARACTERS = 100
DECIMAL_COMMA = re.compile(r"\s*\d+,\d{1,2}\s*")
"""With three digits behind it, it may mean thousands."""
ROW_PROBLEMS_MAX = 20
"""Problems of one row that are told."""


class Recipe:
    """What is the same for all rows.

    Args:
        template: makes the prompt from the columns of a row; without it a column ``prompt`` holds it.
        file_name: names each output; a suffix is left out, as the image's format decides it.
        vary: ``field=values``, see ``variation``.
        defaults: ``field=value`` for what a row leaves empty.

    Raises:
        ManifestError: an option is wrong; the problem's column names the option.
    """

    def __init__(
        self,
        *,
        template: str | None = None,
        file_name: str | None = None,
        vary: Sequence[str] = (),
        defaults: Sequence[str] = (),
    ) -> None:
        self._prompt = Template(template, "template", "prompt", PROMPT_MAX_CHARACTERS) if template is not None else None
        self._name = (
            Template(_stem(file_name), "file_name", "name", NAME_MAX_CHARACTERS) if file_name is not None else None
        )
        used = [made.columns for made in (self._prompt, self._name) if made]
        self._used = frozenset[str]().union(*used)
        self._defaults = _sized(_pairs(defaults), "default")
        self._needed = (self._used | {"prompt"}) - self._defaults.keys()
        self._variations = [_sized(values, "vary") for values in variations(vary)]
        self._varied = frozenset(self._variations[0])
        for values, option in ((self._defaults, "default"), *((values, "vary") for values in self._variations)):
            self._check_values(values, option)
        self._checked: dict[tuple[str, ...], tuple[Problem, ...]] = {}
        self._checked_characters = 0
        self._carried: dict[int, str] = {}  # by the hash of a name, which may have any length; in order of their coming

    @property
    def carried(self) -> list[str]:
        """The first columns that nothing uses, their names shortened."""
        return list(self._carried.values())

    def knows(self, column: str) -> bool:
        """Whether it is used, or plainly means what would be."""
        return column in self._used or meant(column) is not None

    def _check_values(self, values: Mapping[str, Any], option: str) -> None:
        for field in values:
            if field not in FIELDS and field != SIZE and field not in self._used:
                raise ManifestError([Problem(0, option, f"{field!r} is no field of a request, nor in a template")])
        try:
            Submission.model_validate({"prompt": "-"} | _fields(values))
        except ValidationError as error:
            found = _problems(0, error, values)
            problems = [Problem(0, option, f"{problem.column}: {problem.message}") for problem in found]
            raise ManifestError(problems) from None

    def check_header(self, columns: Sequence[str], line: int) -> list[Problem]:
        """What is wrong with the columns of a file in which every row has the same; ``line`` names them."""
        twice = sorted({column for column in columns if columns.count(column) > 1})
        problems = [Problem(line, column, "is there twice") for column in twice]
        problems += self._unknown(line, columns)
        there = {*columns, *self._defaults, *self._varied, *DEFAULTS, SIZE}
        for column in sorted(self._used - there):
            problems.append(Problem(line, column, "is used by the template or the name, and is no column of the file"))
        if self._prompt is None and "prompt" not in {*map(meant, columns), *there}:
            there_are = ", ".join(columns)
            problems.append(Problem(line, "prompt", f"is missing: the columns are {there_are[:200]}"))
        return problems

    def _unknown(self, line: int, columns: Sequence[str]) -> Iterator[Problem]:
        there = dict.fromkeys(columns)
        for column in there:
            if (told := self._refusal(column, there)) is not None:
                yield Problem(line, column, told)
        if SIZE in columns and not set(SIDES).isdisjoint(columns):
            yield Problem(line, SIZE, "stands beside width or height: give one or the other")

    def _refusal(self, column: str, there: Collection[str]) -> str | None:
        if column in self._varied:
            return "is varied, and is a column of the file too: leave one out"
        if column == "prompt" and self._prompt is not None and column not in self._used:
            return "is a column, but the template makes the prompt: write {prompt} in it, or remove the column"
        if column in FIELDS or column == SIZE or column in self._used:
            return None
        field = meant(column)
        if field is None or field in there:
            if len(self._carried) < CARRIED_MAX:
                self._carried[hash(column)] = column[:CARRIED_NAME_MAX_CHARACTERS]
            return None
        return f"is no column of a request: write {field!r}, or call it something else if it is your own"

    def entries(self, record: Record) -> list[Entry] | tuple[Problem, ...]:
        """The jobs of one row, or all that is wrong with it."""
        if problems := self._problems_before(record):
            return problems
        source = dict(record.values)
        try:
            given = _sized({key: value for key, value in source.items() if value not in (None, "")}, None)
            return [
                Entry(self._submission({**self._base(given), **varied}), record.line, source)
                for varied in self._variations
            ]
        except ValidationError as error:
            return tuple(_problems(record.line, error, {**self._base(given), **self._variations[0]}))
        except Unfilled as error:
            return (Problem(record.line, error.column, str(error)),)

    def _problems_before(self, record: Record) -> tuple[Problem, ...]:
        """What is wrong with a row whatever its cells hold."""
        return (
            record.problems
            or too_large(record)
            or self._left_out(record)
            or self._checked_columns(record)
            or _unstorable(record)
        )

    def _left_out(self, record: Record) -> tuple[Problem, ...]:
        """The first needed cell that the row does not reach: it may be another that was forgotten."""
        if not record.left_out:
            return ()
        reached = len(record.values) - record.left_out
        told = f"is missing: the row has {reached} cells and the header names {len(record.values)}"
        left_out = islice(record.values, reached, None)
        return tuple(Problem(record.line, column, told) for column in left_out if column in self._needed)[:1]

    def _base(self, given: Mapping[str, Any]) -> dict[str, Any]:
        sides = [side for side in SIDES if side in given]
        default = self._defaults
        if sides and SIZE in default and SIZE not in given:  # its name is of another size then
            default = {key: value for key, value in default.items() if key != SIZE}
        return {**default, **given}

    def _submission(self, values: Mapping[str, Any]) -> Submission:
        """Raises: ValidationError, Unfilled."""
        fields = _fields(values)
        if self._used:
            known = {**DEFAULTS, **values}
            known.setdefault(SIZE, f"{known['width']}x{known['height']}")
            if self._prompt:
                known["prompt"] = fields["prompt"] = self._prompt.fill(known)
            if self._name:
                fields["name"] = self._name.fill(known)
        return Submission.model_validate(fields)

    def _checked_columns(self, record: Record) -> tuple[Problem, ...]:
        columns = tuple(record.values)
        if columns not in self._checked:
            if len(self._checked) >= CHECKED_MAX or self._checked_characters > CHECKED_MAX_CHARACTERS:
                self._checked.clear()
                self._checked_characters = 0
            self._checked[columns] = tuple(islice(self._unknown(0, columns), ROW_PROBLEMS_MAX))
            self._checked_characters += sum(map(len, columns))
        return tuple(Problem(record.line, found.column, found.message) for found in self._checked[columns])


def _fields(values: Mapping[str, Any]) -> dict[str, Any]:
    fields = {field: value for field, value in values.items() if field in FIELDS}
    guidance = fields.get("guidance")  # the one number that has a fraction
    if isinstance(guidance, str) and DECIMAL_COMMA.fullmatch(guidance):
        fields["guidance"] = guidance.replace(",", ".")
    return fields


def _stem(file_name: str) -> str:
    """Without a suffix, which may be given as people think of it."""
    for suffix in SUFFIXES:
        file_name = file_name.removesuffix(suffix)
    return file_name


def _pairs(options: Sequence[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for option in options:
        field, given, value = option.partition("=")
        if not (field.strip() and given and value):
            raise ManifestError([Problem(0, "default", f"{option!r}: write field=value")])
        if field.strip() in pairs:
            raise ManifestError([Problem(0, "default", f"{field.strip()!r} is there twice")])
        pairs[field.strip()] = value
    return pairs


def _sized(values: dict[str, Any], option: str | None) -> dict[str, Any]:
    """With width and height, where a size is given. Raises: ManifestError with ``option``, else Unfilled."""
    if SIZE not in values:
        return values
    try:
        if not set(SIDES).isdisjoint(values):
            raise ValueError("stands beside width or height: give one or the other")
        return values | size_of(values[SIZE])._asdict()
    except ValueError as error:
        told = f"{str(values[SIZE])[:100]!r} {error}"
        if option is None:
            raise Unfilled(SIZE, told) from None
        raise ManifestError([Problem(0, option, f"size: {told}")]) from None


def _unstorable(record: Record) -> tuple[Problem, ...]:
    found = ((column, unstorable(column) or unstorable(value)) for column, value in record.values.items())
    problems = (Problem(record.line, column, told) for column, told in found if told)
    return tuple(islice(problems, ROW_PROBLEMS_MAX))


def _problems(line: int, error: ValidationError, values: Mapping[str, Any]) -> list[Problem]:
    found = []
    for detail in error.errors(include_url=False, include_input=False, include_context=False):
        column, told = ".".join(map(str, detail["loc"])), detail["msg"].removeprefix("Value error, ")
        larger = drawn_larger(*map(values.get, SIDES)) if column in SIDES else None
        found.append(Problem(line, column, f"{told}: {larger}" if larger else told))
    return found
