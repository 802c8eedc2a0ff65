"""What the farm answers, typed. Fields that a later farm adds are passed over.

What a caller says has ``Literal`` types; the same words in an answer are ``str``, since a later farm may know more.
"""

from datetime import datetime
from typing import Any, Literal, TypedDict
from uuid import UUID

from pydantic import BaseModel, ConfigDict

State = Literal["queued", "running", "succeeded", "failed", "cancelled"]
BatchState = Literal["open", "finished"]
RetriedState = Literal["failed", "cancelled"]
Priority = Literal["interactive", "standard", "bulk"]
Sort = Literal["-created_at", "created_at", "-finished_at", "finished_at"]
"""By which column; after a minus the last one first."""
ManifestKind = Literal["csv", "jsonl", "xlsx"]
ResultsFormat = Literal["csv", "jsonl", "xlsx"]
WebhookKind = Literal["job.running", "job.queued", "job.succeeded", "job.failed", "job.cancelled", "batch.finished"]
Scope = Literal["submit", "read", "admin"]

TERMINAL = frozenset({"succeeded", "failed", "cancelled"})


class Answer(BaseModel):
    """Root of all that the farm answers."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Fault(Answer):
    """One wrong field."""

    field: str
    message: str
    line: int | None = None

    def __str__(self) -> str:
        if self.line is None:
            return f"{self.field}: {self.message}" if self.field else self.message
        return f"line {self.line}{f', column {self.field!r}' if self.field else ''}: {self.message}"


class Problem(Answer):
    """A problem document (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    instance: str = ""
    errors: list[Fault] | None = None
    state: str | None = None

    def __str__(self) -> str:
        return f"{self.title} ({self.status}): {'; '.join(map(str, self.errors or ())) or self.detail}"


class Job(Answer):
    """A job as the farm said it was at that moment."""

    id: UUID
    tenant: str
    batch_id: UUID | None
    position: int
    line: int | None
    source: dict[str, Any] | None
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
    copy_of: UUID | None
    preview_key: str | None
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
    preview_url: str | None = None

    @property
    def done(self) -> bool:
        return self.state in TERMINAL


class Batch(Answer):
    """A batch, counted by state."""

    id: UUID
    tenant: str
    name: str
    weight: float
    created_at: datetime
    paused: bool
    cancelled_at: datetime | None
    finished_at: datetime | None
    file_id: str | None
    metadata: dict[str, str]
    refused: list[dict[str, Any]]
    jobs: int
    lines: int
    rejected: int
    counts: dict[str, int]
    finished: int
    done: bool


class Rejection(Answer):
    """A line of a batch's input that became no job, and what is wrong with it."""

    line: int
    source: dict[str, Any]
    code: str
    message: str
    field: str | None


class ClaimRecord(Answer):
    """One worker's taking of a job: when, where, and how it ended."""

    claim: int
    worker_id: UUID
    host: str | None
    device: str | None
    claimed_at: datetime
    ended_at: datetime | None
    outcome: str | None
    error: str | None


class Event(Answer):
    """What became of a job or a batch at one moment. ``id`` is None for what the farm does not keep, as progress."""

    id: str | None
    kind: str
    at: datetime | None = None
    job_id: UUID | None = None
    batch_id: UUID | None = None
    state: str | None = None
    step: int | None = None
    steps: int | None = None
    preview_url: str | None = None
    data: dict[str, Any]
    """All that the event tells."""


class Estimate(Answer):
    """What drawing costs: seconds on one device, and when it would end if it were submitted now.

    ``by``: measured, by the workers that live, or arithmetic, for the device ``assumed``. ``speed``: of one worker, in
    megapixel-steps a second.
    """

    gpu_s: float
    finishes_at: datetime | None
    by: str
    workers: int
    speed: float
    assumed: str | None


class Preview(Answer):
    """What a manifest would become: its first jobs, its first problems. Nothing of it was submitted.

    ``work`` is of all its jobs, in megapixel-steps. ``carried``: columns that nothing uses and that come along into the
    results; the first 100. ``separator``: of the cells of a CSV file. ``short_rows``: its good rows that end before the
    header, and of which the rest is taken as empty.
    """

    rows: list[dict[str, Any]]
    jobs: int
    rejected: int
    problems: list[Fault]
    problem_count: int
    carried: list[str]
    separator: str | None
    short_rows: int = 0
    work: float
    estimate: Estimate


class NamedSize(Answer):
    """A size that may be given by its name, in pixels."""

    name: str
    set: str
    width: int
    height: int


class Tenant(Answer):
    """Somebody whose jobs share the farm with others' by weight, within limits. None: no limit."""

    name: str
    weight: float
    max_queued: int | None
    max_a_day: int | None
    max_running: int | None
    max_requests_s: float | None


class Key(Answer):
    """A key to the API. ``key``, the key itself, is there in the answer that made it and never again."""

    id: UUID
    tenant: str
    name: str
    scopes: list[str]
    shown: str
    created_at: datetime
    used_at: datetime | None
    revoked_at: datetime | None
    key: str | None = None


class Webhook(Answer):
    """An address that is told of events. ``secret`` is there in the answer that made it and never again."""

    id: UUID
    tenant: str
    url: str
    kinds: list[str]
    created_at: datetime
    disabled_at: datetime | None
    secret: str | None = None


class Delivery(Answer):
    """An event on its way to a webhook."""

    id: UUID
    webhook_id: UUID
    kind: str
    data: dict[str, Any]
    created_at: datetime
    attempts: int
    next_at: datetime | None
    delivered_at: datetime | None
    last_status: int | None
    last_error: str | None


class Worker(Answer):
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


class Farm(Answer):
    """The whole farm at one moment of its own clock."""

    at: datetime
    counts: dict[str, int]
    paused: int
    oldest_queued_s: float | None
    images_last_minute: int
    published: int
    workers: list[Worker]


class TenantChanges(TypedDict, total=False):
    """What of a tenant is changed; what is not named stays. None takes a limit away."""

    weight: float
    max_queued: int | None
    max_a_day: int | None
    max_running: int | None
    max_requests_s: float | None
