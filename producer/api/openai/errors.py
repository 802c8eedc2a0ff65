"""Errors as OpenAI's clients read them: ``{"error": {message, type, param, code}}``. ``problems`` asks for this shape.

ApiError
└── NotAgain
    ├── StillDrawing    the caller has waited as long as it may; the jobs go on
    ├── Unanswered      it is submitted, and what the answer is made of is away
    │   └── Defect      and the server made a mistake
    ├── NotDrawn        a job ended without an image
    │   └── Undrawable  and would again: the request is at fault
    └── Ended           a batch that has ended cannot be cancelled

The ``openai`` package asks again by itself after a 409 and after any 5xx, and sends no idempotency key. That would draw
images a second time, so whatever goes wrong once a submission is committed forbids it (``X-Should-Retry``): see
``submitted``. What no header can forbid is a connection that breaks: the caller's while it waits, or Postgres's in the
commit itself. Who must draw nothing twice even then sends an ``Idempotency-Key``.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from producer.api.answers import PREFIX as NATIVE
from producer.api.errors import ApiError, Busy, Fault
from producer.jobs.contract import Job, State
from producer.jobs.errors import FarmError, NotFound

log = logging.getLogger(__name__)

PREFIX = "/v1"
UNSPOKEN = "there is nothing here: of images only images/generations is spoken, beside models, files and batches"
"""Of OpenAI's paths that this farm has not."""
NOT_AGAIN = {"X-Should-Retry": "false"}

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_STATUSES = {"invalid_value": 400, "wrong_media_type": 400, "too_many_jobs": 400, "too_many_rejections": 400}
_CODES = {"invalid": "invalid_value", "unauthorized": "invalid_api_key", "overloaded": "rate_limit_exceeded"}


class NotAgain(ApiError):
    """What the caller's library must not ask again by itself."""

    headers = NOT_AGAIN


class StillDrawing(NotAgain):
    """The images are not there yet; their jobs go on."""

    def __init__(self, jobs: list[Job], waited_s: float) -> None:
        paths = ", ".join(paths_of(jobs))
        super().__init__(f"not drawn within {waited_s:g} s; nothing is lost and the drawing goes on: see {paths}")


class Unanswered(NotAgain):
    """It was submitted and goes on, but it cannot be told how."""

    def __init__(self, paths: Iterable[str], why: object) -> None:
        super().__init__(f"{why}. Nothing is lost, what was asked for is submitted: see {', '.join(paths)}")


class Defect(Unanswered):
    """The same, by a mistake of the server."""

    def __init__(self, paths: Iterable[str]) -> None:
        super().__init__(paths, "the answer met a defect of the server; its log tells more")


class NotDrawn(NotAgain):
    """A job ended without an image."""

    def __init__(self, job: Job) -> None:
        super().__init__(f"job {job.id}: {fault_of(job)['message']}")


class Undrawable(NotDrawn):
    """The request itself can never be drawn."""


class Ended(NotAgain):
    """The batch has ended: there is nothing left to cancel."""

    def __init__(self, status: str) -> None:
        super().__init__(f"the batch is {status}: only one that has not ended can be cancelled")


def paths_of(jobs: Iterable[Job]) -> list[str]:
    """Where the native API has them."""
    return [f"{NATIVE}/jobs/{job.id}" for job in jobs]


@contextmanager
def submitted(*paths: str) -> Iterator[None]:
    """Whatever goes wrong within names what was submitted before, by these paths, and is not asked again.

    Raises: NotAgain; NotFound: somebody has deleted it, and nobody asks again after that either.
    """
    try:
        yield
    except (NotAgain, NotFound):
        raise
    except Busy as error:
        raise Unanswered(paths, "the server does as much as it can") from error
    except FarmError as error:
        raise Unanswered(paths, error) from error
    except Exception as error:
        log.exception("an answer about %s could not be made", ", ".join(paths))
        raise Defect(paths) from error


INVALID_REQUEST = "invalid_request"
"""The error code of jobs whose request a worker refused: ``worker.executor``."""


def not_drawn(job: Job) -> NotDrawn:
    """The error that a job without an image is."""
    return Undrawable(job) if job.error_code == INVALID_REQUEST else NotDrawn(job)


def fault_of(job: Job) -> dict[str, Any]:
    """Why the job, which ended so, has no image."""
    if job.state is State.CANCELLED:
        return error("the job was cancelled", 500, code="cancelled")
    status = 400 if job.error_code == INVALID_REQUEST else 500
    return error(job.error_message or "the job failed", status, code=job.error_code)


def error(message: str, status: int, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """What stands under ``error``."""
    plain = "server_error" if status >= 500 else "invalid_request_error"
    return {"message": message, "type": _TYPES.get(status, plain), "param": param, "code": code}


def document(status: int, slug: str | None, detail: str, faults: Sequence[Fault] | None) -> tuple[int, dict[str, Any]]:
    """Status and body of a problem. OpenAI's clients know a wrong value by 400."""
    code = None if slug is None else _CODES.get(slug, slug.replace("-", "_"))
    if faults:
        detail = "; ".join(f"{fault.field}: {fault.message}" if fault.field else fault.message for fault in faults)
    param = (faults[0].field or None) if faults else None
    status = _STATUSES.get(code or "", status)
    return status, {"error": error(detail, status, param=param, code=code)}
