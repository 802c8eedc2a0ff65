"""A batch as OpenAI's clients see it: how far it is, in their words, told from the farm's rows.

``validating`` is never seen, since the input is read before the batch is there, nor ``expired``: nothing here expires.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel

from producer.api.openai.contents import ENDPOINT, Endpoint
from producer.api.openai.identifiers import FileId, Part, batch_name
from producer.api.services import Services
from producer.jobs import contract
from producer.jobs.contract import State
from producer.jobs.lines import LineCounts, Lines

Window = Literal["24h"]
WINDOW: Window = "24h"
Status = Literal["failed", "in_progress", "finalizing", "completed", "cancelling", "cancelled"]
ENDED = frozenset({"failed", "completed", "cancelled"})


class LineFault(BaseModel):
    """Why the input was refused."""

    code: str
    line: int | None
    message: str
    param: str | None


class LineFaults(BaseModel):
    """The first of them."""

    object: Literal["list"] = "list"
    data: list[LineFault]


class RequestCounts(BaseModel):
    """Lines of the input, whatever number of images each asked for; jobs, where the batch came in another way."""

    total: int
    completed: int
    failed: int


class Progress(BaseModel):
    """A batch. Its output and error files are there when it has ended, if they would hold a line."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: Endpoint = ENDPOINT
    errors: LineFaults | None = None
    input_file_id: str
    completion_window: Window = WINDOW
    status: Status
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts
    metadata: dict[str, str] | None = None


def progress_of(batches: Sequence[contract.Batch], here: Services) -> list[Progress]:
    """Each of them, counted in lines."""
    counts = Lines(here.database).counts(batches)
    return [_progress(batch, counts[batch.id]) for batch in batches]


def _progress(batch: contract.Batch, lines: LineCounts) -> Progress:
    status = _status(batch)
    failed = lines.failed + batch.rejected
    ended = status in ENDED - {"failed"}
    return Progress(
        id=batch_name(batch.id),
        errors=LineFaults(data=[LineFault(**fault) for fault in batch.refused]) if batch.refused else None,
        input_file_id=batch.file_id or str(FileId(batch.id, Part.INPUT)),
        status=status,
        output_file_id=str(FileId(batch.id, Part.OUTPUT)) if ended and lines.completed else None,
        error_file_id=str(FileId(batch.id, Part.ERRORS)) if ended and failed else None,
        request_counts=RequestCounts(total=lines.lines + batch.rejected, completed=lines.completed, failed=failed),
        metadata=batch.metadata or None,
        **_times(batch, status),
    )


def _status(batch: contract.Batch) -> Status:
    if batch.refused:
        return "failed"
    if batch.cancelled_at and batch.counts[State.CANCELLED]:
        return "cancelled" if batch.done else "cancelling"
    if not batch.done:
        return "in_progress"
    return "completed" if batch.finished_at else "finalizing"


def _times(batch: contract.Batch, status: Status) -> dict[str, Any]:
    created_at, finished_at, cancelled_at = map(_seconds, (batch.created_at, batch.finished_at, batch.cancelled_at))
    if status == "failed":
        return {"created_at": created_at, "failed_at": created_at}
    times = {"created_at": created_at, "in_progress_at": created_at}
    if status in {"cancelling", "cancelled"}:
        times["cancelling_at"] = cancelled_at
    if status == "cancelled":  # with the end of its last job; that may have come before the cancel, too
        times["cancelled_at"] = max(finished_at or 0, cancelled_at or 0)
    if status == "completed":
        times |= {"finalizing_at": finished_at, "completed_at": finished_at}
    return times


def _seconds(at: datetime | None) -> int | None:
    return None if at is None else int(at.timestamp())
