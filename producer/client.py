"""The farm from other people's Python: typed, and over HTTP alone.

    with Client() as farm:
        batch = farm.submit_batch("banners", [{"prompt": 'a banner that says "SALE"', "width": 728, "height": 90}])
        batch = farm.wait(batch)
        for job in farm.batch_jobs(batch):
            Path(job.file_name).write_bytes(farm.download(job))

Everything is asked again a few times when the farm is away for a moment or the connection is lost. Submissions carry an
idempotency key, by which the farm knows what it has already: nothing is submitted twice. Reading, cancelling and
weighing do nothing twice by themselves.

ClientError
├── Unreachable    nobody answers, or the answer broke off: .url, .heard
├── ServerError    the farm answers that it cannot now (5xx): .problem, .retry_after_s
├── Refused        the farm refuses what was asked (4xx): .problem names the fields
│   └── NotFound   there is no such job, batch or image
├── Corrupt        an image that arrived is not the one that was recorded
└── NotDone        the time to wait is over: .last is what was seen last
"""

import hashlib
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from types import TracebackType
from typing import IO, Any, Self, TypeVar
from urllib.parse import quote
from uuid import UUID, uuid4

import httpx
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.request import ImageRequest

ATTEMPTS = 5
FIRST_WAIT_S = 0.25
LONGEST_WAIT_S = 8.0
"""A farm that wants to be asked later than that is not waited for."""
SUBMISSION_TIMEOUT_S = 900.0
"""A file of 200,000 rows is answered once all of them are in the table."""
PIECE_BYTES = 65_536
SPOOL_BYTES = 8 * 2**20
"""Of a batch on its way; what is beyond lies in a temporary file."""
RETRIED_STATUSES = frozenset({429, 500, 502, 503, 504})
"""500 too: nothing that is asked here does more when it is asked twice."""
UNHEARD_ERRORS = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.UnsupportedProtocol)
RETRIED_ERRORS = (httpx.TimeoutException, httpx.NetworkError, httpx.ProxyError, httpx.RemoteProtocolError)
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
    tenant: str
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
    tenant: str
    name: str
    weight: float
    created_at: datetime
    jobs: int
    counts: dict[str, int]
    finished: int
    done: bool


class Tenant(_Answer):
    """Somebody whose jobs share the farm with others' by weight."""

    name: str
    weight: float


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


class _TenantList(_Answer):
    tenants: list[Tenant]


class ClientError(Exception):
    """Root of all errors of this client."""


class Unreachable(ClientError):
    """Nobody answers at ``url``, or the answer broke off.

    ``heard`` says whether the farm may have got what was asked. What was being submitted may then be there: submitting
    it again with the same key finds out, and does no more.
    """

    def __init__(self, url: str, reason: str, *, heard: bool = True) -> None:
        super().__init__(f"{url}: {reason}")
        self.url = url
        self.heard = heard


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

    def submit(self, request: Request, *, tenant: str | None = None, key: str | None = None, **more: Any) -> Job:
        """Submit one job; ``more`` are further fields, as ``name`` and ``priority``.

        Args:
            tenant: whose job it is; None: the farm's default tenant.
            key: what the farm knows this submission by. With the key of an earlier call, and the same request, the
                answer is that call's job and nothing is submitted. None: a new one.

        Raises:
            Refused: fields are wrong, or the key came before with another request.
            ClientError
        """
        return self._asked(
            Job,
            "POST",
            "jobs",
            params=_given(tenant=tenant),
            headers=_headers("application/json", key),
            content=json.dumps(_fields(request) | more).encode(),
        )

    def submit_batch(
        self,
        name: str,
        requests: Iterable[Request],
        *,
        tenant: str | None = None,
        weight: float | None = None,
        key: str | None = None,
    ) -> Batch:
        """Submit a batch of any length: all or nothing. ``requests`` is read once, in constant memory.

        What ``requests`` itself raises passes on, and nothing is submitted.

        Args:
            tenant: whose batch it is; None: the farm's default tenant.
            weight: of its share beside the tenant's other batches, 0.01 to 100; None: 1.
            key: as for ``submit``.

        Raises:
            Refused: lines are wrong: ``problem.errors`` names each line (from 1) and field. Or the key came before
                with other lines, another name or weight.
            ClientError
        """
        with tempfile.SpooledTemporaryFile(SPOOL_BYTES) as spool:
            spool.writelines(_lines(requests))
            return self._asked(
                Batch,
                "POST",
                "batches",
                params=_given(name=name, tenant=tenant, weight=weight),
                headers=_headers("application/x-ndjson", key),
                content=_Pieces(spool),
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

    def tenants(self) -> list[Tenant]:
        """Those that were given a weight; all others have 1. Raises: ClientError."""
        return self._asked(_TenantList, "GET", "tenants").tenants

    def weigh_tenant(self, name: str, weight: float) -> Tenant:
        """Give a tenant its share beside others, 0.01 to 100. Raises: Refused, ClientError."""
        body = json.dumps({"weight": weight}).encode()
        headers = {"Content-Type": "application/json"}
        return self._asked(Tenant, "PUT", f"tenants/{quote(name, safe='')}", content=body, headers=headers)

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
        """A successful answer; asked again, with growing waits, where that may help."""
        heard = False
        for attempt in range(1, ATTEMPTS + 1):
            wait_s = _backoff_s(attempt)
            try:
                response = self._http.request(method, path, **options)
            except httpx.HTTPError as error:
                heard = heard or not isinstance(error, UNHEARD_ERRORS)
                if attempt == ATTEMPTS or not isinstance(error, RETRIED_ERRORS):
                    raise Unreachable(self.base_url, str(error) or type(error).__name__, heard=heard) from error
            else:
                heard = True
                if response.is_success:
                    return response
                wait_s += _retry_after_s(response) or 0
                if attempt == ATTEMPTS or response.status_code not in RETRIED_STATUSES or wait_s > LONGEST_WAIT_S:
                    raise _error_of(response)
            time.sleep(wait_s)
        raise AssertionError("the last attempt returns or raises")


def _backoff_s(attempt: int) -> float:
    """From half of it to all of it, so that clients that were cut off together do not come back together."""
    return float(FIRST_WAIT_S * 2 ** (attempt - 1)) * random.uniform(0.5, 1)


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


def _given(**parameters: str | float | None) -> dict[str, str | float]:
    return {name: value for name, value in parameters.items() if value is not None}


def _headers(content_type: str, key: str | None) -> dict[bytes, bytes]:
    """As bytes: a key that is no ASCII is the farm's to refuse, in its words."""
    return {b"Content-Type": content_type.encode(), b"Idempotency-Key": (str(uuid4()) if key is None else key).encode()}


class _Pieces:
    """A body that can be sent again: from its beginning, each time it is iterated."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def __iter__(self) -> Iterator[bytes]:
        self._file.seek(0)
        while piece := self._file.read(PIECE_BYTES):
            yield piece


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
