"""Reads bodies: within a limit while they arrive, as strict JSON, into submissions.

One way in for every body, so that the limits, the Content-Type (which also keeps other web sites' forms out) and the
words for what is wrong are the same everywhere. Invariant: what is not wholly valid submits nothing.
"""

import json
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from typing import IO, Annotated, Any, TypeVar
from unicodedata import category

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from producer.api.errors import Fault, Invalid, Malformed, TooLarge, WrongMediaType
from producer.api.parameters import WEIGHT_MAX, WEIGHT_MIN
from producer.api.problems import faults_of
from producer.jobs.contract import Submission

JSON = "application/json"
NDJSON = "application/x-ndjson"

JOB_MAX_BYTES = 1_000_000
BATCH_MAX_BYTES = 64_000_000
BATCH_MAX_JOBS = 10_000
LINES_MAX_BYTES = 4_000_000_000
IN_MEMORY_BYTES = 1_000_000
"""Of a streamed body; what is beyond lies in a temporary file."""
FAULTS_MAX = 20


def _title(name: str) -> str:
    if not name.strip():
        raise ValueError("is empty: say what the batch is called")
    if any(category(character) in {"Cc", "Cs", "Zl", "Zp"} for character in name):
        raise ValueError("holds a control character or a lone surrogate: remove it")
    return name


BatchName = Annotated[str, StringConstraints(max_length=200), AfterValidator(_title)]


class BatchSubmission(BaseModel):
    """A batch as one JSON document; larger ones come as NDJSON."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: BatchName
    jobs: list[Submission] = Field(min_length=1, max_length=BATCH_MAX_JOBS)


class TenantWeight(BaseModel):
    """What a tenant is changed to."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    weight: float = Field(
        ge=WEIGHT_MIN, le=WEIGHT_MAX, allow_inf_nan=False, description="Of its share of the farm beside other tenants."
    )


Model = TypeVar("Model", bound=BaseModel)


def media_type(request: Request, *understood: str) -> str:
    """The body's media type, one of ``understood``. Raises: WrongMediaType."""
    given = request.headers.get("content-type", "")
    found = given.partition(";")[0].strip().lower()
    if found not in understood:
        raise WrongMediaType(given, understood)
    return found


async def read_document(request: Request) -> bytes:
    """A dependency: a small JSON document, not parsed yet. Raises: WrongMediaType, TooLarge."""
    media_type(request, JSON)
    return await read(request, JOB_MAX_BYTES)


async def read(request: Request, limit_bytes: int) -> bytes:
    """The whole body. Raises: TooLarge, as soon as that is known."""
    return b"".join([chunk async for chunk in _chunks(request, limit_bytes)])


async def spool(
    request: Request, file: IO[bytes], seen: Callable[[bytes], None], limit_bytes: int = LINES_MAX_BYTES
) -> None:
    """Write the body to ``file``, however large, in constant memory, and rewind it. ``seen`` is shown each piece.

    Raises:
        TooLarge
    """
    async for chunk in _chunks(request, limit_bytes):
        seen(chunk)
        await run_in_threadpool(file.write, chunk)
    file.seek(0)


def spooled() -> IO[bytes]:
    """A temporary file that is in memory while it is small."""
    return tempfile.SpooledTemporaryFile(max_size=IN_MEMORY_BYTES)  # the caller closes it


async def _chunks(request: Request, limit_bytes: int) -> AsyncIterator[bytes]:
    declared = request.headers.get("content-length", "")
    size_bytes = int(declared) if declared.isdecimal() else 0
    if size_bytes > limit_bytes:
        raise _beyond(limit_bytes)
    size_bytes = 0
    async for chunk in request.stream():
        size_bytes += len(chunk)
        if size_bytes > limit_bytes:
            raise _beyond(limit_bytes)
        yield chunk


def _beyond(limit_bytes: int) -> TooLarge:
    hint = "" if limit_bytes == LINES_MAX_BYTES else f"; POST /api/v1/batches takes more jobs as {NDJSON}"
    return TooLarge(f"the body is larger than {limit_bytes:,} bytes{hint}")


def parse(body: bytes) -> Any:
    """Strict JSON: UTF-8, no NaN, no endless nesting, no number of thousands of digits. Raises: Malformed."""
    try:
        return json.loads(body, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        raise Malformed(f"not JSON: {error}") from None
    except UnicodeDecodeError as error:
        raise Malformed(f"not UTF-8: byte {error.start} begins no character") from None
    except (ValueError, RecursionError) as error:
        raise Malformed(f"not JSON that is read here: {error}") from None


def _no_number(literal: str) -> float:
    raise ValueError(f"{literal} is no number in JSON")


def validated(model: type[Model], value: Any) -> Model:
    """Raises: Invalid: the first faults, each with its field."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise Invalid(_faults(error)) from None


def parse_batch(body: bytes) -> BatchSubmission:
    """Raises: Malformed, TooLarge, Invalid."""
    value = parse(body)
    jobs = value.get("jobs") if isinstance(value, dict) else None
    if isinstance(jobs, list) and len(jobs) > BATCH_MAX_JOBS:
        raise TooLarge(
            f"{len(jobs):,} jobs: a JSON body takes {BATCH_MAX_JOBS:,}; send {NDJSON}, one job a line, with ?name="
        )
    return validated(BatchSubmission, value)


def submissions(file: IO[bytes]) -> Iterator[Submission]:
    """One submission a line, in constant memory; blank lines are passed over.

    After a first fault nothing more is yielded, but reading goes on, to name up to ``FAULTS_MAX`` faults at once.

    Raises:
        Invalid: lines are wrong, each named, or there is none at all.
    """
    faults: list[Fault] = []
    found = False
    for number, line in enumerate(_lines(file), start=1):
        if len(faults) >= FAULTS_MAX:
            break
        if not line.strip():
            continue
        found = True
        submission = _of_line(number, line, faults)
        if submission is not None and not faults:
            yield submission
    if faults:
        raise Invalid(faults[:FAULTS_MAX])
    if not found:
        raise Invalid([Fault(field="", message="no line holds a job: send one JSON object a line")])


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """The lines, each cut at just beyond the limit for one job, so that a line without end fills no memory."""
    while line := file.readline(JOB_MAX_BYTES + 1):
        yield line
        if len(line) > JOB_MAX_BYTES:
            return


def _of_line(number: int, line: bytes, faults: list[Fault]) -> Submission | None:
    """The line's submission; None if it has faults, which are then among ``faults``."""
    if len(line) > JOB_MAX_BYTES:
        faults.append(Fault(line=number, field="", message=f"is longer than {JOB_MAX_BYTES:,} bytes"))
        return None
    try:
        return Submission.model_validate(parse(line))
    except Malformed as error:
        faults.append(Fault(line=number, field="", message=str(error)))
    except ValidationError as error:
        faults.extend(_faults(error, line=number))
    return None


def _faults(error: ValidationError, *, line: int | None = None) -> list[Fault]:
    details = error.errors(include_url=False, include_input=False, include_context=False)
    return faults_of(details[:FAULTS_MAX], line=line)
