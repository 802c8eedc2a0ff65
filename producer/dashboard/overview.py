"""What the page shows, read from the store at one go. Knows no HTML.

Each part is one field, so that a page for operators can grow by adding parts.
"""

from dataclasses import dataclass
from typing import Any

from producer.jobs.contract import DEFAULT_TENANT, Batch, Farm, Job, State, Worker
from producer.jobs.store import Store

BATCHES = 8
THUMBNAILS = 6
FAILURES = 5
IMAGES = 18

BAR = (State.SUCCEEDED, State.FAILED, State.CANCELLED, State.RUNNING)
"""The parts of a batch's bar from the left; what remains is queued."""


@dataclass(frozen=True)
class Segment:
    """A part of a bar, in percent of its length."""

    state: State
    start: float
    width: float


@dataclass(frozen=True)
class BatchRow:
    """A batch with its first images."""

    batch: Batch
    images: list[Job]

    @property
    def bar(self) -> list[Segment]:
        segments, start = [], 0.0
        for state in BAR:
            width = 100 * self.batch.counts[state] / max(1, self.batch.jobs)
            if width:
                segments.append(Segment(state, round(start, 3), round(width, 3)))
            start += width
        return segments

    @property
    def finished_percent(self) -> int:
        """Rounded down, so that 100 means all of them."""
        return 100 * self.batch.finished // max(1, self.batch.jobs)


@dataclass(frozen=True)
class Drawing:
    """One image that a worker is drawing, as its heartbeat told; a field that it did not tell is None."""

    job: str
    step: int | None
    steps: int | None
    size: str | None

    @classmethod
    def of(cls, entry: dict[str, Any]) -> "Drawing":
        width, height = entry.get("width"), entry.get("height")
        size = f"{width}×{height}" if width and height else None
        return cls(str(entry.get("job", "")), entry.get("step"), entry.get("steps"), size)


@dataclass(frozen=True)
class WorkerCard:
    """A worker and what it draws."""

    worker: Worker
    drawing: list[Drawing]


@dataclass(frozen=True)
class Overview:
    """All that the page shows."""

    farm: Farm
    batches: list[BatchRow]
    workers: list[WorkerCard]
    failures: list[Job]
    images: list[Job]

    @property
    def empty(self) -> bool:
        """Whether nothing was ever handed in."""
        return not any(self.farm.counts.values())

    @property
    def several_tenants(self) -> bool:
        """Whether it must be said whose each batch is."""
        return any(row.batch.tenant != DEFAULT_TENANT for row in self.batches)

    @property
    def open_jobs(self) -> int:
        return self.farm.counts[State.QUEUED] + self.farm.counts[State.RUNNING]

    @property
    def left_s(self) -> float | None:
        """Until the open jobs are drawn, but for paused ones, at the last minute's speed; None if nothing was drawn in
        it."""
        open_jobs = self.open_jobs - self.farm.paused
        if not self.farm.images_last_minute or not open_jobs:
            return None
        return 60 * open_jobs / self.farm.images_last_minute

    @property
    def live_workers(self) -> int:
        return sum(card.worker.live for card in self.workers)


def read_overview(store: Store, *, lease_s: float) -> Overview:
    """Raises: Unavailable."""
    farm = store.farm(lease_s=lease_s)
    return Overview(
        farm=farm,
        batches=[_row(store, batch) for batch in store.batches(BATCHES)],
        workers=[WorkerCard(worker, [Drawing.of(entry) for entry in worker.drawing]) for worker in farm.workers],
        failures=store.last_failures(FAILURES) if farm.counts[State.FAILED] else [],
        images=store.last_images(IMAGES) if farm.counts[State.SUCCEEDED] else [],
    )


def _row(store: Store, batch: Batch) -> BatchRow:
    if not batch.counts[State.SUCCEEDED]:
        return BatchRow(batch, [])
    return BatchRow(batch, store.batch_jobs(batch.id, state=State.SUCCEEDED, limit=THUMBNAILS))
