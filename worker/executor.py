"""The way of one job through a worker: claimed, drawn, encoded, uploaded, recorded.

``Executor.execute`` is the whole way; ``ending_of`` maps every class of error to what happens then. Whatever
happens, the message is acknowledged afterwards: the row, not Redis, remembers what is to be done.
"""

import hashlib
import logging
import random
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import TypeVar
from uuid import UUID

from pipeline import image_file
from pipeline.engine import DrawnImage
from pipeline.errors import BrokenImage, Cancelled, Drained, Exhausted, InvalidRequest
from pipeline.request import ImageRequest
from producer.jobs.contract import Claim, Message, Outcome, Recorded
from producer.jobs.errors import LostClaim, Unavailable
from producer.jobs.settings import Durations
from producer.jobs.storage import Storage, object_key
from producer.jobs.store import Store
from worker.device import Device
from worker.lease import Lease
from worker.metrics import Metrics

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Ending:
    """What becomes of a job whose claim ended without an image."""

    outcome: Outcome | None  # None: the row is somebody else's, write nothing
    code: str
    traced: bool = False


ENDINGS: dict[type[Exception], Ending] = {
    InvalidRequest: Ending(Outcome.FAILED, "invalid_request"),
    Exhausted: Ending(Outcome.FAILED, "exhausted"),
    BrokenImage: Ending(Outcome.FAILED, "broken_image"),
    Drained: Ending(Outcome.DRAINED, "drained"),
    Cancelled: Ending(None, "cancelled"),
    LostClaim: Ending(None, "lost_claim"),
    Unavailable: Ending(Outcome.DRAINED, "unavailable"),  # raised only when the worker ends meanwhile
    Exception: Ending(Outcome.RETRIED, "internal", traced=True),  # an error of no class: a failure, never a success
}


def ending_of(error: Exception) -> Ending:
    """The table's row for this error: that of its nearest class."""
    return next(ENDINGS[cls] for cls in type(error).__mro__ if cls in ENDINGS)


class Executor:
    """Takes jobs through their way, many at a time, each on a thread of its own."""

    def __init__(
        self,
        worker_id: UUID,
        model: str,
        revision: str,
        *,
        store: Store,
        storage: Storage,
        device: Device,
        lease: Lease,
        metrics: Metrics,
        durations: Durations,
    ) -> None:
        self._worker_id = worker_id
        self._model = model
        self._revision = revision
        self._store = store
        self._storage = storage
        self._device = device
        self._lease = lease
        self._metrics = metrics
        self._durations = durations
        self._room = Room()
        self._away: set[str] = set()
        self._draining = threading.Event()
        self._out_of_time = threading.Event()

    def drain(self) -> None:
        """Claim nothing more; what is drawn is still stored, however often that takes."""
        self._draining.set()

    def give_up(self) -> None:
        """The grace time is over: wait for no dependency any more."""
        self._out_of_time.set()

    def execute(self, message: Message) -> None:
        """Take the message's job from its claim to its record; returns when nothing is left to do for it."""
        claim = self._claim(message)
        if claim is None:
            return
        with self._lease.holding(claim), self._room.entered(alone=claim.suspect):
            try:
                request = self._begin(claim)
                drawn = self._device.draw(claim.message, request, priority=claim.priority.rank)
                body, encoding_s = self._encode(request, drawn)
                key, uploading_s = self._upload(claim, request, body)
                self._record(claim, request, drawn, body, key, encoding_s, uploading_s)
            except Exception as error:  # noqa: BLE001  # the table decides; one of no class is a failure
                self._settle(claim, error)

    def _claim(self, message: Message) -> Claim | None:
        """The job, if the message still holds. A draining worker takes none: the audit publishes it again."""
        if self._draining.is_set():
            return None
        try:
            claim = self._persist(None, lambda: self._store.claim(message, self._worker_id))
        except Unavailable:
            return None
        if claim is not None:
            self._metrics.phase("waiting", claim.waiting_s)
        return claim

    def _begin(self, claim: Claim) -> ImageRequest:
        if claim.suspect:
            self._persist(claim, lambda: self._store.mark_alone(claim))
        if self._lease.lost(claim):  # while it waited for its turn
            raise LostClaim(claim.job_id, claim.claim)
        return ImageRequest.model_validate(claim.request)

    def _encode(self, request: ImageRequest, drawn: DrawnImage) -> tuple[bytes, float]:
        self._metrics.phase("drawing", drawn.drawing_s)
        began = perf_counter()
        body = image_file.encode(drawn.pixels, request, self._model, self._revision)
        return body, self._metrics.phase("encoding", perf_counter() - began)

    def _upload(self, claim: Claim, request: ImageRequest, body: bytes) -> tuple[str, float]:
        key = object_key(claim.batch_id, claim.job_id, claim.claim, request.format)
        began = perf_counter()
        self._persist(claim, lambda: self._storage.put(key, body, request.format.media_type))
        return key, self._metrics.phase("uploading", perf_counter() - began)

    def _record(
        self,
        claim: Claim,
        request: ImageRequest,
        drawn: DrawnImage,
        body: bytes,
        key: str,
        encoding_s: float,
        uploading_s: float,
    ) -> None:
        height_px, width_px = drawn.pixels.shape[:2]
        recorded = Recorded(
            object_key=key,
            sha256=hashlib.sha256(body).hexdigest(),
            size_bytes=len(body),
            width_px=width_px,
            height_px=height_px,
            format=request.format,
            drawing_s=drawn.drawing_s,
            encoding_s=encoding_s,
            uploading_s=uploading_s,
            warnings=request.warnings(),
        )
        self._persist(claim, lambda: self._store.record(claim, recorded))
        self._metrics.ended(Outcome.SUCCEEDED)

    def _settle(self, claim: Claim, error: Exception) -> None:
        ending = ending_of(error)
        if ending.outcome is None:
            log.info("job %s: %s", claim.job_id, error)
            return
        log.warning("job %s: %s (%s)", claim.job_id, error, ending.code, exc_info=ending.traced)
        trace = "".join(traceback.format_exception(error)) if ending.traced else None
        try:
            self._persist(claim, lambda: self._write_ending(claim, ending, str(error), trace))
            self._metrics.ended(ending.outcome)
        except LostClaim as lost:
            log.info("job %s: %s", claim.job_id, lost)
        except Exception:  # the claim check finds the job running and unheld, and gives it back
            log.exception("job %s: its end could not be written", claim.job_id)

    def _write_ending(self, claim: Claim, ending: Ending, message: str, trace: str | None) -> None:
        if ending.outcome is Outcome.DRAINED:
            self._store.give_back(claim)
        elif ending.outcome is Outcome.FAILED:
            self._store.fail(claim, ending.code, message, trace=trace)
        else:
            delay_s = self._durations.retry_s * random.uniform(0.5, 1.5) * 2 ** min(claim.claim - 1, 6)
            self._store.retry(claim, ending.code, message, delay_s=delay_s, trace=trace)

    def _persist(self, claim: Claim | None, act: Callable[[], Answer]) -> Answer:
        """Do ``act``, again and again while its dependency is away: what is drawn is kept, not drawn again.

        Raises: LostClaim when the claim was lost meanwhile, Unavailable when the worker's time is over.
        """
        over = self._out_of_time if claim is not None else self._draining
        for pause_s in self._pauses():
            try:
                answer = act()
            except Unavailable as error:
                self._note_away(error)
                if claim is not None and self._lease.lost(claim):
                    raise LostClaim(claim.job_id, claim.claim) from error
                if over.wait(pause_s):
                    raise
            else:
                self._away.clear()
                return answer
        raise AssertionError("the pauses never end")

    def _pauses(self) -> Iterator[float]:
        pause_s = self._durations.retry_s / 4
        while True:
            yield pause_s * random.uniform(0.5, 1.5)
            pause_s = min(pause_s * 2, self._durations.retry_s * 5)

    def _note_away(self, error: Unavailable) -> None:
        if error.dependency not in self._away:
            self._away.add(error.dependency)
            log.error("waiting for %s", error)


class Room:
    """Many share the process, or one has it alone: a job whose last worker died must not take neighbours along."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._wanting_alone = 0
        self._taken = False

    @contextmanager
    def entered(self, *, alone: bool) -> Iterator[None]:
        """Wait for a place, alone or among others, and keep it for the body. Who wants to be alone goes first."""
        with self._changed:
            if alone:
                self._wanting_alone += 1
                self._changed.wait_for(lambda: not self._inside)
                self._wanting_alone -= 1
                self._taken = True
            else:
                self._changed.wait_for(lambda: not self._taken and not self._wanting_alone)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._taken = False
                self._changed.notify_all()
