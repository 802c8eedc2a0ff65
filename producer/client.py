"""The farm from other people's Python: typed, and over HTTP alone.

    with Client() as farm:
        batch = farm.submit_batch("banners", [{"prompt": 'a banner that says "SALE"', "width": 728, "height": 90}])
        batch = farm.wait(batch)
        for job in farm.batch_jobs(batch):
            Path(job.file_name).write_bytes(farm.download(job))

Reading is repeated a few times when the farm is away for a moment. Submitting and cancelling are repeated only while
no connection could be made at all, so nothing is ever submitted twice by this client's own doing.

ClientError
├── Unreachable    nobody answers, or the answer broke off: .url
├── ServerError    the farm answers that it cannot now (5xx): .problem, .retry_after_s
├── Refused        the farm refuses what was asked (4xx): .problem names the fields
│   └── NotFound   there is no such job, batch or image
├── Corrupt        an image that arrived is not the one that was recorded
└── NotDone        the time to wait is over: .last is what was seen last
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from types import TracebackType
from typing import Any, Self, TypeVar
from uuid import UUID

import httpx
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.request import ImageRequest

ATTEMPTS = 4
FIRST_WAIT_S = 0.25
LONGEST_WAIT_S = 8.0
SUBMISSION_TIMEOUT_S = 900.0
"""A file of 200,000 rows is answered once all of them are in the table."""
PIECE_BYTES = 65_536
RETRIED_STATUSES = frozenset({429, 502, 503, 504})
TERMINAL = frozenset({"succeeded", "failed", "cancelled"})


class _Answer(BaseModel):
    """What the farm answers. Fields that a later farm adds are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Fault(_Answer):
    """One wrong field."""

    field: str
    message: str
    line: int | None = None


class Problem(_Answer):
    """A problem document (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    instance: str = ""
    errors: list[Fault] | None = None
    state: str | None = None

    def __str__(self) -> str:
        faults = "; ".join(
            f"{f'line {fault.line}: ' if fault.line else ''}{fault.field}: {fault.message}"
            for fault in self.errors or []
        )
        return f"{self.title} ({self.status}): {faults or self.detail}"


class Job(_Answer):
    """A job as the farm said it was at that moment."""

    id: UUID
    batch_id: UUID | None
    position: int
    name: str | None
    priority: str
    state: str
    request: dict[str, Any]
    claim: int
    failures: int
    created_at: datetime
    claimed_at: datetime | None
    finished_at: datetime | None
    error_code: str | None
    error_message: str | None
    object_key: str | None
    sha256: str | None
    size_bytes: int | None
    width_px: int | None
    height_px: int | None
    format: str | None
    waiting_s: float | None
    drawing_s: float | None
    encoding_s: float | None
    uploading_s: float | None
    warnings: list[str]
    file_name: str
    image_url: str | None

    @property
    def done(self) -> bool:
        return self.state in TERMINAL


class Batch(_Answer):
    """A batch, counted by state."""

    id: UUID
    name: str
    created_at: datetime
    jobs: int
    counts: dict[str, int]
    finished: int
    done: bool


class Worker(_Answer):
    """A worker process as its last heartbeat told."""

    id: UUID
    host: str
    pid: int
    device: str
    model: str
    revision: str
    version: str
    capacity: int
    started_at: datetime
    heartbeat_at: datetime
    stopped_at: datetime | None
    heartbeat_age_s: float
    live: bool
    drawing: list[dict[str, Any]]


class Farm(_Answer):
    """The whole farm at one moment of its own clock."""

    at: datetime
    counts: dict[str, int]
    oldest_queued_s: float | None
    images_last_minute: int
    published: int
    workers: list[Worker]


class _JobPage(_Answer):
    jobs: list[Job]
    next: int | None


class _BatchList(_Answer):
    batches: list[Batch]


class ClientError(Exception):
    """Root of all errors of this client."""


class Unreachable(ClientError):
    """Nobody answers at ``url``, or the answer broke off. What was being submitted may or may not be there."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"{url}: {reason}")
        self.url = url


class _Answered(ClientError):
    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


class ServerError(_Answered):
    """The farm cannot do it now; ask again after ``retry_after_s``."""

    def __init__(self, problem: Problem, retry_after_s: float | None = None) -> None:
        super().__init__(problem)
        self.retry_after_s = retry_after_s


class Refused(_Answered):
    """The farm refuses; ``problem.errors`` names the fields."""


class NotFound(Refused):
    """There is no such job, batch or image."""


class Corrupt(ClientError):
    """The image that arrived has another sha256 than the one that was recorded."""

    def __init__(self, job_id: UUID, expected: str | None, found: str) -> None:
        super().__init__(f"the image of job {job_id} has sha256 {found}, recorded is {expected}")
        self.job_id = job_id


class NotDone(ClientError):
    """The time to wait is over; the jobs go on in peace."""

    def __init__(self, last: Job | Batch, waited_s: float) -> None:
        super().__init__(f"{last.id} is not done after {waited_s:g} s; it goes on, wait for it again")
        self.last = last


Waited = TypeVar("Waited", Job, Batch)
Answered = TypeVar("Answered", bound=_Answer)
Request = ImageRequest | Mapping[str, Any]


class Client:
    """The farm at ``base_url``. One connection pool; safe to share between threads."""

    def __init__(self, base_url: str = "http://127.0.0.1:8000", *, timeout_s: float = 30.0) -> None:
        self.base_url = base_url.rstrip("/")
        self._timeout_s = timeout_s
        self._http = httpx.Client(base_url=f"{self.base_url}/api/v1/", timeout=timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def submit(self, request: Request, **more: Any) -> Job:
        """Submit one job; ``more`` are further fields, as ``name`` and ``priority``. Raises: ClientError."""
        body = json.dumps(_fields(request) | more).encode()
        return self._asked(Job, "POST", "jobs", content=body, headers={"Content-Type": "application/json"})

    def submit_batch(self, name: str, requests: Iterable[Request]) -> Batch:
        """Submit a batch of any length: all or nothing. ``requests`` is read once, in constant memory.

        What ``requests`` itself raises passes on, and nothing is submitted.

        Raises:
            Refused: lines are wrong: ``problem.errors`` names each line (from 1) and field.
            ClientError
        """
        return self._asked(
            Batch,
            "POST",
            "batches",
            params={"name": name},
            headers={"Content-Type": "application/x-ndjson"},
            content=_lines(requests),
            timeout=httpx.Timeout(self._timeout_s, read=max(self._timeout_s, SUBMISSION_TIMEOUT_S)),
        )

    def job(self, job: Job | UUID | str) -> Job:
        """The job as it is now. Raises: NotFound, ClientError."""
        return self._asked(Job, "GET", f"jobs/{_id(job)}")

    def jobs(self, *, state: str | None = None, page: int = 500) -> Iterator[Job]:
        """All jobs, the newest first, asked for page by page. Raises: ClientError."""
        return self._pages("jobs", "before", state, page)

    def batch(self, batch: Batch | UUID | str) -> Batch:
        """The batch as it is now. Raises: NotFound, ClientError."""
        return self._asked(Batch, "GET", f"batches/{_id(batch)}")

    def batches(self, limit: int = 20) -> list[Batch]:
        """The newest batches first. Raises: ClientError."""
        return self._asked(_BatchList, "GET", "batches", params={"limit": limit}).batches

    def batch_jobs(self, batch: Batch | UUID | str, *, state: str | None = None, page: int = 500) -> Iterator[Job]:
        """The batch's jobs in the order of submission, page by page. Raises: NotFound, ClientError."""
        return self._pages(f"batches/{_id(batch)}/jobs", "after", state, page)

    def cancel(self, job: Job | UUID | str) -> Job:
        """Cancel a queued or running job. Raises: Refused if it has ended otherwise, NotFound, ClientError."""
        return self._asked(Job, "POST", f"jobs/{_id(job)}/cancel")

    def cancel_batch(self, batch: Batch | UUID | str) -> Batch:
        """Cancel all of a batch that has not ended; images that are there stay. Raises: NotFound, ClientError."""
        return self._asked(Batch, "POST", f"batches/{_id(batch)}/cancel")

    def farm(self) -> Farm:
        """Counts, backlog and workers. Raises: ClientError."""
        return self._asked(Farm, "GET", "farm")

    def wait(
        self,
        what: Waited,
        *,
        poll_s: float = 1.0,
        timeout_s: float | None = None,
        progress: Callable[[Waited], object] = lambda _: None,
    ) -> Waited:
        """The job or batch once it is done, however it ended; ``progress`` is called with each look at it.

        Raises:
            NotDone: it was not within ``timeout_s``.
            ClientError
        """
        began = time.monotonic()
        while True:
            what = self.job(what) if isinstance(what, Job) else self.batch(what)
            progress(what)
            if what.done:
                return what
            if timeout_s is not None and time.monotonic() - began + poll_s > timeout_s:
                raise NotDone(what, timeout_s)
            time.sleep(poll_s)

    def download(self, job: Job | UUID | str) -> bytes:
        """The image file of a succeeded job, checked against its sha256.

        Raises:
            Refused: the job has no image; ``problem.state`` says where it is.
            Corrupt, NotFound, ClientError
        """
        known = job if isinstance(job, Job) and job.sha256 else self.job(job)
        body = self._answer("GET", f"jobs/{known.id}/image", follow_redirects=True).content
        found = hashlib.sha256(body).hexdigest()
        if found != known.sha256:
            raise Corrupt(known.id, known.sha256, found)
        return body

    def _pages(self, path: str, cursor: str, state: str | None, limit: int) -> Iterator[Job]:
        params: dict[str, Any] = {"limit": limit} | ({"state": state} if state else {})
        while True:
            page = self._asked(_JobPage, "GET", path, params=params)
            yield from page.jobs
            if page.next is None:
                return
            params[cursor] = page.next

    def _asked(self, model: type[Answered], method: str, path: str, **options: Any) -> Answered:
        response = self._answer(method, path, **options)
        try:
            return model.model_validate_json(response.content)
        except ValidationError:
            raise Unreachable(
                str(response.url), f"what answers there is no ovis-batch API ({model.__name__})"
            ) from None

    def _answer(self, method: str, path: str, **options: Any) -> httpx.Response:
        """A successful answer; tried again, with growing waits, where trying again cannot do anything twice."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                response = self._http.request(method, path, **options)
            except httpx.HTTPError as error:
                if attempt == ATTEMPTS or not _may_repeat(method, error):
                    raise Unreachable(self.base_url, str(error) or type(error).__name__) from error
                wait_s = _backoff_s(attempt)
            else:
                if response.is_success:
                    return response
                if attempt == ATTEMPTS or method != "GET" or response.status_code not in RETRIED_STATUSES:
                    raise _error_of(response)
                wait_s = min(_retry_after_s(response) or _backoff_s(attempt), LONGEST_WAIT_S)
            time.sleep(wait_s)
        raise AssertionError("the last attempt returns or raises")


def _may_repeat(method: str, error: httpx.HTTPError) -> bool:
    """Anything may be asked again when no connection was made: then nothing was said."""
    unsaid = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
    return unsaid or (method == "GET" and isinstance(error, httpx.TransportError))


def _backoff_s(attempt: int) -> float:
    return float(FIRST_WAIT_S * 2 ** (attempt - 1))


def _retry_after_s(response: httpx.Response) -> float | None:
    value = response.headers.get("Retry-After", "")
    return float(value) if value.isdecimal() else None


def _error_of(response: httpx.Response) -> ClientError:
    problem = _problem(response)
    if response.status_code >= 500:
        return ServerError(problem, _retry_after_s(response))
    return (NotFound if response.status_code == 404 else Refused)(problem)


def _problem(response: httpx.Response) -> Problem:
    """The problem document, or one made up for an answer that is none: a proxy's, or the bucket's."""
    try:
        return Problem.model_validate_json(response.content)
    except ValidationError:
        return Problem(
            type="about:blank",
            title=response.reason_phrase or "no problem document",
            status=response.status_code,
            detail=response.text[:500],
            instance=response.url.path,
        )


def _fields(request: Request) -> dict[str, Any]:
    if isinstance(request, ImageRequest):
        return request.model_dump(mode="json", exclude_none=True)
    return dict(request)


def _lines(requests: Iterable[Request]) -> Iterator[bytes]:
    """One request a line, in pieces of some 64 kB: a piece for each line costs more than the lines themselves."""
    piece = bytearray()
    for request in requests:
        piece += json.dumps(_fields(request)).encode() + b"\n"
        if len(piece) >= PIECE_BYTES:
            yield bytes(piece)
            piece.clear()
    yield bytes(piece)


def _id(what: Job | Batch | UUID | str) -> str:
    return str(UUID(str(what.id if isinstance(what, Job | Batch) else what)))
