"""Reads a batch's input, line by line. A fault of the input refuses all of it; a fault of a body only that line.

Invariant: what is yielded before a fault of the input is found must be undone by whoever reads, for ``Refused`` is
raised at the end: by then the first faults are known, not only one.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from math import isfinite
from typing import IO, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from pipeline.request import Text
from producer.api.bodies import parse
from producer.api.errors import Fault, Invalid, Malformed
from producer.api.openai.contents import METHOD, Endpoint, Method
from producer.api.openai.generation import read_generation
from producer.api.openai.models import unpromised
from producer.api.problems import faults_of
from producer.jobs.contract import Entry, Rejection
from producer.manifest.record import kept, storable

LINES_MAX = 50_000
LINE_MAX_BYTES = 1_000_000
FAULTS_MAX = 100
BODY_FAULTS_MAX = 20
"""Faults of one body that are told."""
MESSAGE_MAX_CHARACTERS = 2_000
CUSTOM_ID_MAX = 512

_CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
}
"""By pydantic's type of an error; others are of the field that they name."""


class Refused(Exception):
    """The input as a whole. ``faults`` are as OpenAI names them: code, line, message, param."""

    def __init__(self, faults: list[dict[str, Any]]) -> None:
        super().__init__(f"{len(faults)} faults of the input")
        self.faults = faults


class Line(BaseModel):
    """A line: a request, and the name that its answer will have."""

    model_config = ConfigDict(extra="forbid")

    custom_id: Annotated[Text, StringConstraints(min_length=1, max_length=CUSTOM_ID_MAX)]
    method: Method = Field(description=f"{METHOD}, as of each of them.")
    url: Endpoint
    body: dict[str, Any]


@dataclass
class Input:
    """The lines of one input. ``models`` are what the farm draws with; a body may name one if there is no other."""

    file: IO[bytes]
    models: Collection[str]
    _lines_by_id: dict[str, int] = field(default_factory=dict)
    _faults: list[dict[str, Any]] = field(default_factory=list)

    def entries(self) -> Iterator[Entry | Rejection]:
        """What becomes of each line, in order; after a first fault of the input nothing more.

        Raises:
            Refused
        """
        for number, raw in self._raw_lines():
            try:
                line = self._read(number, raw)
            except Refused as refused:
                self._faults += refused.faults
                if len(self._faults) >= FAULTS_MAX:
                    break
                continue
            if not self._faults:
                yield from _entries(number, line)
        if self._faults:
            raise Refused(self._faults[:FAULTS_MAX])
        if not self._lines_by_id:
            raise _refused("empty_file", None, "no line holds a request")

    def _raw_lines(self) -> Iterator[tuple[int, bytes]]:
        """Those that are not blank, each cut just beyond its limit, so that one without end fills no memory."""
        found = 0
        number = 0
        while found <= LINES_MAX and (raw := self.file.readline(LINE_MAX_BYTES + 1)):
            number += 1
            if raw.strip() or len(raw) > LINE_MAX_BYTES:
                found += 1
                yield number, raw
            if len(raw) > LINE_MAX_BYTES:  # what is left of it is no line
                return

    def _read(self, number: int, raw: bytes) -> Line:
        """Raises: Refused: the line's faults."""
        if len(raw) > LINE_MAX_BYTES:
            raise _refused("line_too_long", number, f"is longer than {LINE_MAX_BYTES:,} bytes")
        line = _parsed(number, raw)
        earlier = self._lines_by_id.setdefault(line.custom_id, number)
        if earlier != number:
            raise _refused("duplicate_custom_id", number, f"was line {earlier}'s already", "custom_id")
        if len(self._lines_by_id) > LINES_MAX:
            raise _refused("too_many_lines", number, f"a batch has at most {LINES_MAX:,} lines")
        model = line.body.get("model")
        if isinstance(model, str):
            self._check_model(number, model)
        return line

    def _check_model(self, number: int, model: str) -> None:
        """Raises: Refused."""
        if model not in self.models:
            known = ", ".join(self.models) or "none yet, since no worker has been seen"
            raise _refused("model_not_found", number, f"is none that the farm draws with: {known}", "body.model")
        if len(self.models) > 1:
            raise _refused("model_not_promised", number, unpromised(self.models), "body.model")


def _parsed(number: int, raw: bytes) -> Line:
    """Raises: Refused."""
    try:
        return Line.model_validate(parse(raw))
    except Malformed as error:
        raise _refused("invalid_json_line", number, str(error)) from None
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False, include_context=False)[:FAULTS_MAX]
        raise Refused(
            [_fault(number, detail["type"], fault) for detail, fault in zip(details, faults_of(details), strict=True)]
        ) from None


def _fault(number: int, kind: str, fault: Fault) -> dict[str, Any]:
    if not fault.field:
        return _refused("invalid_json_line", number, fault.message).faults[0]
    name = fault.field.replace("\x00", "\\x00")  # which Postgres keeps in no text
    return _refused(_CODES.get(kind, f"invalid_{name}"), number, fault.message, name).faults[0]


def _refused(code: str, line: int | None, message: str, param: str | None = None) -> Refused:
    said = f"{param}: {message}" if param else message
    return Refused([{"code": code, "line": line, "message": said, "param": param}])


def _entries(number: int, line: Line) -> Iterator[Entry | Rejection]:
    """One job for each image of the line. What the line held goes along with each, and comes back in the results."""
    name = {"custom_id": line.custom_id}
    source = name | kept(_plain(line.body)) | name  # it stands first, and no field of the body takes its place
    try:
        generation, submissions = read_generation(line.body)
    except Invalid as error:
        fault = error.faults[0]
        message = "; ".join(
            f"{fault.field}: {fault.message}" if fault.field else fault.message
            for fault in error.faults[:BODY_FAULTS_MAX]
        )
        yield Rejection(number, source, "invalid_value", message[:MESSAGE_MAX_CHARACTERS], fault.field or None)
        return
    if generation.stream:
        yield Rejection(number, source, "invalid_value", "stream: is not for batches: leave it out", "stream")
        return
    for submission in submissions:
        yield Entry(submission, number, source)


def _plain(body: dict[str, Any]) -> dict[str, Any]:
    """What of a body can be kept and stands in one cell: text and numbers, as every field is that is known."""
    return {
        storable(name): storable(value)
        for name, value in body.items()
        if isinstance(value, str | int) or (isinstance(value, float) and isfinite(value))
    }
