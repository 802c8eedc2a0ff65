"""Reads bodies: within a limit while they arrive, as strict JSON, into submissions.

One way in for every body, so that the limits, the Content-Type (which also keeps other web sites' forms out) and the
words for what is wrong are the same everywhere. Invariant: what is not wholly valid submits nothing.
"""

import json
import tempfile
from collections.abc import AsyncGenerator, Callable
from typing import IO, Annotated, Any, TypeVar
from unicodedata import category

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from producer.api.errors import Fault, Invalid, Malformed, TooLarge, WrongMediaType
from producer.api.parameters import WEIGHT_MAX, WEIGHT_MIN, TenantName
from producer.api.problems import faults_of
from producer.jobs.contract import EventKind, Priority, Scope, Submission

JSON = "application/json"
NDJSON = "application/x-ndjson"

JOB_MAX_BYTES = 1_000_000
BATCH_MAX_BYTES = 64_000_000
BATCH_MAX_JOBS = 10_000
BATCH_MAX_COMMAS = 3_000_000
"""Of a document, by which it is known before it is parsed that it would take gigabytes: 64 MB of ``{},`` takes two."""
LINES_MAX_BYTES = 4_000_000_000
IN_MEMORY_BYTES = 1_000_000
"""Of a streamed body; what is beyond lies in a temporary file."""
FAULTS_MAX = 20
LIMIT_MAX = 2**31 - 1


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


class TenantChange(BaseModel):
    """What a tenant is changed to: fields that are left out stay as they are, and null takes a limit away."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    weight: float = Field(
        default=1.0,
        ge=WEIGHT_MIN,
        le=WEIGHT_MAX,
        allow_inf_nan=False,
        description="Of its share of the farm beside other tenants.",
    )
    max_queued: int | None = Field(default=None, ge=0, le=LIMIT_MAX, description="Jobs that may wait.")
    max_a_day: int | None = Field(default=None, ge=0, le=LIMIT_MAX, description="Jobs submitted in 24 hours.")
    max_running: int | None = Field(default=None, ge=0, le=LIMIT_MAX, description="Images drawn at the same time.")
    max_requests_s: float | None = Field(
        default=None, ge=0.01, le=1e6, allow_inf_nan=False, description="Requests a second to each API process."
    )


class BatchPriority(BaseModel):
    """How urgent what has not ended of a batch is from now on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    priority: Priority


class KeyRequest(BaseModel):
    """A key to be made."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: BatchName = Field(description="What a person will know it by.")
    tenant: TenantName | None = Field(default=None, description="On whose behalf it asks; default: the caller's own.")
    scopes: set[Scope] = Field(default={Scope.SUBMIT, Scope.READ}, min_length=1)


def _told_to_webhooks(kinds: set[EventKind]) -> set[EventKind]:
    if EventKind.JOB_PROGRESS in kinds:
        raise ValueError(f"{EventKind.JOB_PROGRESS} is told in streams alone")
    return kinds


class WebhookRequest(BaseModel):
    """An address that is to be told of events."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str = Field(description="Of the receiver, https://…")
    kinds: Annotated[set[EventKind], AfterValidator(_told_to_webhooks)] = Field(
        default={EventKind.BATCH_FINISHED}, min_length=1
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
    """The whole body, which must be small. Raises: TooLarge, as soon as that is known."""
    body = bytearray()  # however many pieces it comes in
    async for chunk in chunks(request, limit_bytes):
        body += chunk
    return bytes(body)


async def spool(
    request: Request, file: IO[bytes], seen: Callable[[bytes], None], limit_bytes: int = LINES_MAX_BYTES
) -> int:
    """Write the body to ``file``, however large, in constant memory, and rewind it. ``seen`` is shown each piece.

    Returns its size in bytes. Raises: TooLarge.
    """
    async for chunk in chunks(request, limit_bytes):
        seen(chunk)
        await run_in_threadpool(file.write, chunk)
    size_bytes = file.tell()
    file.seek(0)
    return size_bytes


def spooled() -> IO[bytes]:
    """A temporary file that is in memory while it is small."""
    return tempfile.SpooledTemporaryFile(max_size=IN_MEMORY_BYTES)  # the caller closes it


async def chunks(request: Request, limit_bytes: int) -> AsyncGenerator[bytes, None]:
    """The body piece by piece. Raises: TooLarge, as soon as that is known."""
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
    if body.count(b",") > BATCH_MAX_COMMAS:
        raise TooLarge(f"more than {BATCH_MAX_COMMAS:,} commas: send {NDJSON}, one job a line, with ?name=")
    value = parse(body)
    jobs = value.get("jobs") if isinstance(value, dict) else None
    if isinstance(jobs, list) and len(jobs) > BATCH_MAX_JOBS:
        raise TooLarge(
            f"{len(jobs):,} jobs: a JSON body takes {BATCH_MAX_JOBS:,}; send {NDJSON}, one job a line, with ?name="
        )
    return validated(BatchSubmission, value)


def _faults(error: ValidationError) -> list[Fault]:
    return faults_of(error.errors(include_url=False, include_input=False, include_context=False)[:FAULTS_MAX])
