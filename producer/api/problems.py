"""Every error as an RFC 9457 problem document, under ``/v1`` as OpenAI's clients read errors. The one place that maps
error classes to answers.

No answer repeats what a caller sent, except names of fields and an idempotency key, and those only as text that surely
encodes.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from producer.api.errors import (
    AnswerNotKept,
    ApiError,
    Busy,
    Fault,
    Forbidden,
    Invalid,
    Malformed,
    TooLarge,
    Unauthorized,
    WrongMediaType,
)
from producer.api.openai import errors as openai
from producer.api.parameters import IDEMPOTENCY_KEY
from producer.jobs.errors import (
    BadCursor,
    Deleted,
    FarmError,
    IllegalTransition,
    KeyAtWork,
    KeyReused,
    MadeBefore,
    NotFound,
    NotReady,
    Overloaded,
    TooManyColumns,
    TooManyJobs,
    TooManyRejections,
    TooManyWebhooks,
    Unavailable,
    WebhookDisabled,
)
from producer.jobs.models import ModelNotFound

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_S = 5
KEY_RETRY_AFTER_S = 1
NAME_MAX_CHARACTERS = 200


@dataclass(frozen=True)
class Kind:
    """What a class of errors is called outside."""

    status: int
    slug: str
    title: str


INVALID = Kind(422, "invalid", "Fields are wrong")
INTERNAL = Kind(500, "internal", "The server made a mistake")
ANSWER_NOT_KEPT = Kind(409, "answer-not-kept", "What was asked with this idempotency key was done")

KINDS: dict[type[Exception], Kind] = {
    Malformed: Kind(400, "malformed", "The body cannot be read"),
    Unauthorized: Kind(401, "unauthorized", "A key is needed"),
    Forbidden: Kind(403, "forbidden", "The key is not for this"),
    TooLarge: Kind(413, "too-large", "The body is too large"),
    WrongMediaType: Kind(415, "wrong-media-type", "The Content-Type is not understood here"),
    Invalid: INVALID,
    BadCursor: INVALID,
    KeyReused: Kind(422, "key-reused", "The idempotency key stands for something else"),
    KeyAtWork: Kind(409, "key-at-work", "What was asked with this idempotency key is still being done"),
    AnswerNotKept: ANSWER_NOT_KEPT,
    MadeBefore: ANSWER_NOT_KEPT,
    Deleted: Kind(410, "deleted", "What was submitted with this idempotency key was deleted"),
    NotFound: Kind(404, "not-found", "There is no such thing"),
    NotReady: Kind(409, "not-ready", "The job has no image"),
    IllegalTransition: Kind(409, "illegal-transition", "The job's state does not allow this"),
    ModelNotFound: Kind(404, "model-not-found", "The farm does not draw with this model"),
    openai.Ended: Kind(409, "ended", "The batch has ended"),
    openai.Undrawable: Kind(400, "undrawable", "The request cannot be drawn"),
    openai.NotDrawn: Kind(500, "not-drawn", "The job failed"),
    openai.Unanswered: Kind(503, "unanswered", "It is submitted, and what the answer is made of is away"),
    openai.Defect: Kind(500, "internal", "The server made a mistake"),
    openai.StillDrawing: Kind(504, "still-drawing", "The images are not drawn yet"),
    WebhookDisabled: Kind(409, "webhook-disabled", "The webhook is disabled"),
    TooManyWebhooks: Kind(409, "too-many-webhooks", "There are as many webhooks as may be"),
    TooManyJobs: Kind(422, "too-many-jobs", "These are too many jobs at once"),
    TooManyRejections: Kind(422, "too-many-rejections", "Too many lines are wrong"),
    TooManyColumns: Kind(422, "too-many-columns", "No table has as many columns"),
    Overloaded: Kind(429, "overloaded", "A limit is reached"),
    Busy: Kind(503, "busy", "The server does as much as it can"),
    Unavailable: Kind(503, "unavailable", "A service that the farm needs is away"),
}


class Problem(BaseModel):
    """RFC 9457, with ``errors`` where fields are wrong and ``state`` where a job's state is in the way."""

    type: str = Field(description="urn:ovis-batch:problem:…, one per class of errors; 'about:blank' for plain HTTP.")
    title: str
    status: int
    detail: str
    instance: str = Field(description="The path that was asked.")
    errors: list[Fault] | None = None
    state: str | None = None

    @classmethod
    def of(cls, kind: Kind, request: Request, detail: str, **members: Any) -> "Problem":
        return cls(
            type=f"urn:ovis-batch:problem:{kind.slug}",
            title=kind.title,
            status=kind.status,
            detail=printable(detail),
            instance=request.scope["path"],
            **members,
        )

    def answer(self, headers: Mapping[str, str] | None = None) -> Response:
        if self.instance.startswith(f"{openai.PREFIX}/"):
            status, content = openai.document(self.status, self._slug, self.detail, self.errors)
            return JSONResponse(content, status, headers)
        content = self.model_dump(exclude_none=True)
        if self.errors is not None:
            content["errors"] = [fault.model_dump(exclude_none=True) for fault in self.errors]
        return JSONResponse(content, self.status, headers, media_type=MEDIA_TYPE)

    @property
    def _slug(self) -> str | None:
        """Of its kind; plain HTTP has none."""
        return self.type.rpartition(":")[2] if self.type.startswith("urn:") else None


def faults_of(errors: Iterable[Any], *, line: int | None = None, skip: int = 0) -> list[Fault]:
    """Pydantic's errors as faults that name the field; ``skip`` leading parts of each place are left out."""
    return [
        Fault(line=line, field=printable(".".join(map(str, error["loc"][skip:]))), message=_message(error))
        for error in errors
    ]


def printable(text: str) -> str:
    """``text`` cut to what an answer may hold, with what UTF-8 cannot encode written out."""
    cut = text if len(text) <= 2 * NAME_MAX_CHARACTERS else text[: 2 * NAME_MAX_CHARACTERS] + "…"
    return cut.encode("utf-8", "backslashreplace").decode()


def _message(error: Mapping[str, Any]) -> str:
    if error["type"] == "extra_forbidden":
        return "is no field that is known here"
    if error["type"] == "model_type":
        return "must be a JSON object"
    return printable(str(error["msg"]).removeprefix("Value error, "))


def install(app: FastAPI) -> None:
    """Let every error of ``app`` end as a problem document."""
    app.add_exception_handler(FarmError, of_known)
    app.add_exception_handler(ApiError, of_known)
    app.add_exception_handler(RequestValidationError, _of_parameters)
    app.add_exception_handler(HTTPException, _of_http)
    app.add_exception_handler(ClientDisconnect, _of_disconnect)
    app.add_exception_handler(Exception, _of_mistake)


def of_known(request: Request, error: Exception) -> Response:
    kind = next((KINDS[cls] for cls in type(error).__mro__ if cls in KINDS), INTERNAL)
    if kind is INTERNAL:
        log.error("%s %s: %s", request.method, request.url.path, error)
    members = {"errors": _faults_in(error), "state": getattr(error, "state", None)}
    return Problem.of(kind, request, str(error), **members).answer(_headers_of(error))


def _headers_of(error: Exception) -> dict[str, str] | None:
    if isinstance(error, Unauthorized):
        return {"WWW-Authenticate": "Bearer"}
    if isinstance(error, Overloaded):
        return {"Retry-After": str(error.retry_after_s)}
    if isinstance(error, KeyAtWork):
        return {"Retry-After": str(KEY_RETRY_AFTER_S)}
    if isinstance(error, openai.NotAgain):
        return error.headers
    return {"Retry-After": str(RETRY_AFTER_S)} if isinstance(error, Unavailable | Busy) else None


def _faults_in(error: Exception) -> list[Fault] | None:
    if isinstance(error, KeyReused):
        return [Fault(field=IDEMPOTENCY_KEY, message="was used for something else")]
    return error.faults if isinstance(error, Invalid) else None


def _of_parameters(request: Request, error: Exception) -> Response:
    """FastAPI's own validation: of the path and the query. Bodies are read by ``bodies``."""
    assert isinstance(error, RequestValidationError)
    faults = faults_of(error.errors(), skip=1)
    detail = "; ".join(f"{fault.field}: {fault.message}" for fault in faults)
    return Problem.of(INVALID, request, detail, errors=faults).answer()


def _of_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    status, path = error.status_code, request.scope["path"]
    detail = openai.UNSPOKEN if status == 404 and path.startswith(f"{openai.PREFIX}/") else error.detail
    problem = Problem(type="about:blank", title=HTTPStatus(status).phrase, status=status, detail=detail, instance=path)
    return problem.answer(error.headers)


def _of_disconnect(request: Request, error: Exception) -> Response:
    """The caller went away while sending; nobody reads this, and nothing was submitted."""
    log.info("%s %s: the caller went away while sending", request.method, request.url.path)
    return Response(status_code=400)


def _of_mistake(request: Request, error: Exception) -> Response:
    """Whatever nothing else knows. The server logs the traceback; the caller sees none of it."""
    return Problem.of(INTERNAL, request, "this is a defect of the server; its log tells more").answer()
