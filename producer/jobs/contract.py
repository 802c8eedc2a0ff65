"""What both sides agree on: states and their legal transitions, the message, the names in Redis, a job as it is read.

Knows no SQL, no Celery and no bucket.
"""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, NamedTuple, Self
from uuid import UUID

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from pipeline.request import ImageFormat, ImageRequest

QUEUE = "ovis.images"
TASK = "ovis.draw"
DEFAULT_TENANT = "default"
"""Whose jobs those are that name no tenant."""


class State(StrEnum):
    """Where a job is. Nothing leaves a terminal state, but what a person retries."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        return not TRANSITIONS[self]


TRANSITIONS: dict[State, frozenset[State]] = {
    State.QUEUED: frozenset({State.RUNNING, State.CANCELLED}),
    State.RUNNING: frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED, State.QUEUED}),
    State.SUCCEEDED: frozenset(),
    State.FAILED: frozenset(),
    State.CANCELLED: frozenset(),
}


RETRIED = frozenset({State.FAILED, State.CANCELLED})
"""What a person may send back to the queue: the one way out of a terminal state."""


class Scope(StrEnum):
    """What a key is for. Whoever may administer may do the rest too."""

    SUBMIT = "submit"
    READ = "read"
    ADMIN = "admin"


class Outcome(StrEnum):
    """How a claim ended; one per row of the history."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    RETRIED = "retried"
    LEASE_LOST = "lease_lost"
    DRAINED = "drained"
    CANCELLED = "cancelled"


class EventKind(StrEnum):
    """What streams and webhooks tell. All but ``job.progress`` are rows, written by triggers."""

    JOB_RUNNING = "job.running"
    JOB_PROGRESS = "job.progress"
    JOB_QUEUED = "job.queued"  # given back or retried: a submission tells nothing
    JOB_SUCCEEDED = "job.succeeded"
    JOB_FAILED = "job.failed"
    JOB_CANCELLED = "job.cancelled"
    BATCH_FINISHED = "batch.finished"

    @classmethod
    def of_state(cls, state: State) -> "EventKind":
        """What is told when a job comes to be in ``state``."""
        return cls(f"job.{state}")


class Priority(StrEnum):
    """Who goes first. Kept in the table as its rank, so that an index orders by it."""

    INTERACTIVE = "interactive"
    STANDARD = "standard"
    BULK = "bulk"

    @property
    def rank(self) -> int:
        return list(Priority).index(self)

    @classmethod
    def of_rank(cls, rank: int) -> "Priority":
        return list(cls)[rank]

    @property
    def share(self) -> int:
        """Its part of the farm's work while jobs of every priority wait: 16 to 4 to 1."""
        return (16, 4, 1)[self.rank]


@dataclass(frozen=True)
class Message:
    """What travels through Redis: a job's id and the claim that it is meant for, nothing of its contents."""

    job_id: UUID
    claim: int

    @property
    def task_id(self) -> str:
        return f"{self.job_id}:{self.claim}"


@dataclass(frozen=True)
class Outgoing:
    """A message to be published, and how urgent it is."""

    message: Message
    priority: Priority


@dataclass(frozen=True)
class Next(Outgoing):
    """A message that was just put into the window: of which lane, and the work that it stands for."""

    lane_id: int
    work: float  # ImageRequest.work


class Lane(NamedTuple):
    """The jobs of one tenant, one batch (or none) and one priority: what the fair order chooses between.

    A tuple, since thousands are made several times a second.
    """

    id: int
    tenant: str
    tenant_weight: float
    batch_id: UUID | None
    batch_weight: float
    priority: Priority


@dataclass(frozen=True)
class Window:
    """What Redis should hold, and who is there to take it."""

    published: dict[Priority, int]  # messages that nobody has claimed yet
    workers: int  # whose heartbeat is fresh
    free: int  # images that these could draw besides what they do


@dataclass(frozen=True)
class SubmissionKey:
    """An idempotency key as a client gave it, and the SHA-256 (hex) of all that it submitted with it, and where."""

    key: str
    fingerprint: str


@dataclass(frozen=True)
class Rejection:
    """A line of the input that became no job: where it stood, what it held, and what is wrong with it."""

    line: int
    source: dict[str, Any]
    code: str
    message: str
    field: str | None = None


@dataclass(frozen=True)
class Fence:
    """What every write of a claim's end must match."""

    job_id: UUID
    claim: int
    worker_id: UUID


@dataclass(frozen=True)
class Claim(Fence):
    """One worker's taking of a job: its fence, and what it needs to draw."""

    batch_id: UUID | None
    priority: Priority
    suspect: bool
    failures: int
    waiting_s: float
    request: dict[str, Any]
    checkpoint_key: str | None  # where an earlier claim left the unfinished image
    checkpoint_step: int  # steps done in it
    previews: int  # unfinished pictures that are wanted on the way

    @property
    def message(self) -> Message:
        return Message(self.job_id, self.claim)


@dataclass(frozen=True)
class Recorded:
    """What a succeeded job's row gets: where the image is, what it is, and the time that each phase took."""

    object_key: str
    sha256: str
    size_bytes: int
    width_px: int
    height_px: int
    format: ImageFormat
    drawing_s: float
    encoding_s: float
    uploading_s: float
    warnings: list[str]


def _file_stem(name: object) -> object:
    if isinstance(name, str):
        if (
            not name.strip()
            or name in {".", ".."}
            or any(c in name for c in '/\\\x00:*?"<>|')
            or not name.isprintable()
        ):
            raise ValueError("is no file name: use letters, digits, '-', '_', '.', without a path")
        if len(name.encode(errors="replace")) > 200:
            raise ValueError("is longer than 200 bytes")
    return name


class Submission(ImageRequest):
    """A request as somebody hands it in: with the name of its output and its priority."""

    name: Annotated[str, BeforeValidator(_file_stem)] | None = Field(
        default=None, description="Name of the output file, without its suffix."
    )
    priority: Priority = Priority.STANDARD

    def request(self) -> ImageRequest:
        """The request alone, with a seed: what the row keeps and a worker draws."""
        return ImageRequest.model_construct(
            **{name: getattr(self, name) for name in ImageRequest.model_fields}
        ).seeded()


@dataclass(frozen=True)
class Entry:
    """A submission out of an input of many: the line that asked for it, from 1, and what else that line held.

    ``source`` is given back with the results: a spreadsheet's own columns, or a ``custom_id``.
    """

    submission: Submission
    line: int
    source: dict[str, Any]


class Job(BaseModel):
    """A job as its row says it is."""

    model_config = ConfigDict(frozen=True)

    id: UUID
    tenant: str
    batch_id: UUID | None
    position: int
    line: int | None = Field(description="Of the input that it came with, from 1.")
    source: dict[str, Any] | None = Field(description="What that line held.")
    name: str | None
    priority: Priority
    state: State
    request: ImageRequest
    claim: int = Field(description="How often it was taken by a worker.")
    failures: int
    created_at: datetime
    claimed_at: datetime | None
    finished_at: datetime | None
    error_code: str | None
    error_message: str | None
    object_key: str | None
    copy_of: UUID | None = Field(description="The job that drew the image, if it was there already.")
    preview_key: str | None
    sha256: str | None
    size_bytes: int | None
    width_px: int | None
    height_px: int | None
    format: ImageFormat | None
    waiting_s: float | None
    drawing_s: float | None
    encoding_s: float | None
    uploading_s: float | None
    warnings: list[str]

    @property
    def file_name(self) -> str:
        """What the downloaded image is called: its own name, else its place in the batch, else its id."""
        stem = self.name or (f"{self.position + 1:06d}" if self.batch_id else str(self.id))
        return f"{stem}.{(self.format or self.request.format).suffix}"


class Standing(NamedTuple):
    """Where a job is, in few words: for those who wait for it."""

    state: State
    preview_key: str | None


class Batch(BaseModel):
    """The jobs that were submitted together, counted by state."""

    model_config = ConfigDict(frozen=True)

    id: UUID
    tenant: str
    name: str
    weight: float = Field(description="Of its share beside the tenant's other batches.")
    created_at: datetime
    paused: bool
    cancelled_at: datetime | None = Field(description="When somebody cancelled it.")
    finished_at: datetime | None = Field(description="When the last of its jobs ended.")
    file_id: str | None = Field(description="The uploaded file that it was read from.")
    metadata: dict[str, str]
    refused: list[dict[str, Any]] = Field(description="Why the whole input was refused, line by line; then no job is.")
    jobs: int
    lines: int = Field(description="Of the input that became jobs; one that asks for several images is several jobs.")
    rejected: int = Field(description="Lines of the input that became no job.")
    counts: dict[State, int]

    @property
    def finished(self) -> int:
        return sum(count for state, count in self.counts.items() if state.terminal)

    @property
    def done(self) -> bool:
        return self.finished == self.jobs

    @classmethod
    def of(cls, *, counts: dict[str, int], **row: Any) -> Self:
        return cls(counts={state: counts.get(state.value, 0) for state in State}, **row)


class Tenant(BaseModel):
    """Somebody whose jobs share the farm with others' by weight, within limits."""

    model_config = ConfigDict(frozen=True)

    name: str
    weight: float
    max_queued: int | None = Field(default=None, description="Jobs that may wait; null: no limit.")
    max_a_day: int | None = Field(default=None, description="Jobs that may be submitted in 24 hours; null: no limit.")
    max_running: int | None = Field(default=None, description="Images drawn at the same time; null: no limit.")
    max_requests_s: float | None = Field(default=None, description="Requests a second to the API; null: no limit.")


class Worker(BaseModel):
    """A worker process as its last heartbeat told."""

    model_config = ConfigDict(frozen=True)

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


class Farm(BaseModel):
    """The whole farm at one moment of the database's clock."""

    model_config = ConfigDict(frozen=True)

    at: datetime
    counts: dict[State, int]
    paused: int = Field(description="Of those that are queued: in paused batches.")
    oldest_queued_s: float | None = Field(description="Age of the oldest job that still waits.")
    images_last_minute: int
    published: int = Field(description="Messages in Redis that nobody has claimed yet.")
    workers: list[Worker]


class Webhook(BaseModel):
    """An address that is told of a tenant's events. Its secret is shown once, when it is made."""

    model_config = ConfigDict(frozen=True)

    id: UUID
    tenant: str
    url: str
    kinds: list[EventKind]
    created_at: datetime
    disabled_at: datetime | None = Field(description="When its receiver said that it is gone for good.")


class Delivery(BaseModel):
    """An event on its way to one webhook."""

    model_config = ConfigDict(frozen=True)

    id: UUID = Field(description="Of the message, the same at each attempt.")
    webhook_id: UUID
    kind: EventKind
    data: dict[str, Any]
    created_at: datetime
    attempts: int
    next_at: datetime | None = Field(description="When it is tried next; null: no more.")
    delivered_at: datetime | None
    last_status: int | None = Field(description="HTTP status of the last attempt.")
    last_error: str | None = Field(description="What was wrong with the last attempt.")
