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
from functools import partial
from time import perf_counter
from typing import TypeVar
from uuid import UUID

from pipeline import image_file
from pipeline.engine import DrawnImage
from pipeline.errors import BrokenImage, Cancelled, Drained, Exhausted, InvalidRequest, UnusableLatents
from pipeline.request import ImageRequest
from producer.jobs.contract import Claim, Message, Outcome, Recorded
from producer.jobs.errors import LostClaim, NotFound, Unavailable
from producer.jobs.settings import Durations
from producer.jobs.storage import Storage, object_key
from producer.jobs.store import Store
from worker.checkpoints import Checkpoints
from worker.device import Device
from worker.held import Held
from worker.lease import Lease
from worker.metrics import Metrics
from worker.outages import Dependency, Outages

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

MOST_DOUBLINGS = 6
"""Of the wait after a failure: 64 times the first."""


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


@dataclass(frozen=True)
class _Picture:
    """An image's file, and the seconds that this claim took for it."""

    body: bytes
    drawing_s: float = 0.0
    encoding_s: float = 0.0


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
        checkpoints: Checkpoints,
        held: Held,
        outages: Outages,
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
        self._checkpoints = checkpoints
        self._held = held
        self._outages = outages
        self._metrics = metrics
        self._durations = durations
        self._room = Room()
        self._probing = threading.Lock()
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
        with self._lease.holding(claim), self._checkpoints.following(claim), self._room.entered(alone=claim.suspect):
            try:
                request = self._begin(claim)
                picture = self._held_picture(claim, request) or self._draw(claim, request)
                key, uploading_s = self._upload(claim, request, picture)
                self._record(claim, request, picture, key, uploading_s)
            except Exception as error:  # noqa: BLE001  # the table decides; one of no class is a failure
                self._settle(claim, error)

    def _claim(self, message: Message) -> Claim | None:
        """The job, if the message still holds. One that is not taken here is published again by the audit."""
        if self._draining.is_set() or not self._can_store():
            return None
        try:
            claim = self._persist(None, "Postgres", lambda: self._store.claim(message, self._worker_id))
        except Unavailable:
            return None
        if claim is None:
            log.info("job %s: nobody waits for claim %d", message.job_id, message.claim)
            return None
        self._metrics.phase("waiting", claim.waiting_s)
        return claim

    def _can_store(self) -> bool:
        """Whether the bucket answers, as far as is known. While it does not, one thread at a time asks it."""
        if not self._outages.away("S3"):
            return True
        if not self._probing.acquire(blocking=False):
            return False
        try:
            with self._outages.watching("S3"):
                self._storage.ping()
        except Unavailable:
            return False
        finally:
            self._probing.release()
        return True

    def _begin(self, claim: Claim) -> ImageRequest:
        if claim.suspect:
            self._persist(claim, "Postgres", lambda: self._store.mark_alone(claim))
        if self._lease.lost(claim):  # while it waited for its turn
            raise LostClaim(claim.job_id, claim.claim)
        return ImageRequest.model_validate(claim.request)

    def _held_picture(self, claim: Claim, request: ImageRequest) -> _Picture | None:
        """What an earlier claim drew on this host and could not store, if this worker would draw the same."""
        body = self._held.image(claim.job_id)
        if body is None:
            return None
        try:
            if image_file.read_request(body) != (request, self._model, self._revision):
                return None
        except InvalidRequest:
            return None
        log.info("job %s: was drawn before, and is only stored now", claim.job_id)
        return _Picture(body)

    def _draw(self, claim: Claim, request: ImageRequest) -> _Picture:
        drawn = self._drawn(claim, request)
        self._metrics.phase("drawing", drawn.drawing_s)
        began = perf_counter()
        body = image_file.encode(drawn.pixels, request, self._model, self._revision)
        return _Picture(body, drawn.drawing_s, self._metrics.phase("encoding", perf_counter() - began))

    def _drawn(self, claim: Claim, request: ImageRequest) -> DrawnImage:
        """From the furthest checkpoint that there is, or from the start."""
        draw = partial(self._device.draw, claim.message, request, priority=claim.priority.rank)
        unfinished = self._unfinished(claim)
        if unfinished is not None:
            try:
                return draw(unfinished=unfinished)
            except UnusableLatents as error:
                log.warning("job %s: %s", claim.job_id, error)
        return draw()

    def _unfinished(self, claim: Claim) -> bytes | None:
        """The furthest checkpoint: this host's or the one that the row points to."""
        held = self._held.latents(claim.job_id)
        if held is not None and held.step > claim.checkpoint_step:
            return held.body
        key = claim.checkpoint_key
        if key is None:
            return None
        try:
            return self._persist(claim, "S3", lambda: self._storage.get(key))
        except NotFound:
            log.warning("job %s: its checkpoint is gone: it is drawn from its start", claim.job_id)
            return None

    def _upload(self, claim: Claim, request: ImageRequest, picture: _Picture) -> tuple[str, float]:
        key = object_key(claim.batch_id, claim.job_id, claim.claim, request.format)
        began = perf_counter()
        self._persist(
            claim,
            "S3",
            lambda: self._storage.put(key, picture.body, request.format.media_type),
            holding=picture,
        )
        return key, self._metrics.phase("uploading", perf_counter() - began)

    def _record(self, claim: Claim, request: ImageRequest, picture: _Picture, key: str, uploading_s: float) -> None:
        recorded = Recorded(
            object_key=key,
            sha256=hashlib.sha256(picture.body).hexdigest(),
            size_bytes=len(picture.body),
            width_px=request.width,
            height_px=request.height,
            format=request.format,
            drawing_s=picture.drawing_s,
            encoding_s=picture.encoding_s,
            uploading_s=uploading_s,
            warnings=request.warnings(),
        )
        self._persist(claim, "Postgres", lambda: self._store.record(claim, recorded), holding=picture)
        self._forget(claim)
        self._metrics.ended(Outcome.SUCCEEDED)

    def _forget(self, claim: Claim) -> None:
        """Nobody will go on from what this claim or those before it left."""
        self._checkpoints.discard(claim)
        self._held.drop(claim.job_id)

    def _settle(self, claim: Claim, error: Exception) -> None:
        ending = ending_of(error)
        if ending.outcome is None:
            log.info("job %s: %s", claim.job_id, error)
            return
        log.warning("job %s: %s (%s)", claim.job_id, error, ending.code, exc_info=ending.traced)
        trace = "".join(traceback.format_exception(error)) if ending.traced else None
        try:
            if ending.outcome is Outcome.DRAINED:
                self._checkpoints.save(claim)
            self._persist(claim, "Postgres", lambda: self._write_ending(claim, ending, str(error), trace))
            if ending.outcome is not Outcome.DRAINED:
                self._forget(claim)
            self._metrics.ended(ending.outcome)
        except LostClaim as lost:
            log.info("job %s: %s", claim.job_id, lost)
        except Unavailable as away:
            log.warning("job %s: could not be given back (%s); its lease will lapse", claim.job_id, away)
        except Exception:  # the claim check finds the job running and unheld, and gives it back
            log.exception("job %s: its end could not be written", claim.job_id)

    def _write_ending(self, claim: Claim, ending: Ending, message: str, trace: str | None) -> None:
        if ending.outcome is Outcome.DRAINED:
            self._store.give_back(claim)
        elif ending.outcome is Outcome.FAILED:
            self._store.fail(claim, ending.code, message, trace=trace)
        else:
            # Full jitter: those that failed together do not come back together.
            delay_s = random.uniform(0, self._durations.retry_s * 2 ** min(claim.failures, MOST_DOUBLINGS))
            self._store.retry(claim, ending.code, message, delay_s=delay_s, trace=trace)

    def _persist(
        self,
        claim: Claim | None,
        dependency: Dependency,
        act: Callable[[], Answer],
        *,
        holding: _Picture | None = None,
    ) -> Answer:
        """Do ``act``, again and again while its dependency is away. What is drawn is held, not drawn again.

        Raises: LostClaim when the claim was lost meanwhile, Unavailable when the worker's time is over.
        """
        over = self._out_of_time if claim is not None else self._draining
        for pause_s in self._pauses():
            try:
                with self._outages.watching(dependency):
                    return act()
            except Unavailable as error:
                if claim is not None and self._lease.lost(claim):
                    raise LostClaim(claim.job_id, claim.claim) from error
                if claim is not None and holding is not None:
                    self._held.keep_image(claim.job_id, holding.body)
                    holding = None
                if over.wait(pause_s):
                    raise
        raise AssertionError("the pauses never end")

    def _pauses(self) -> Iterator[float]:
        pause_s = self._durations.retry_s / 4
        while True:
            yield pause_s * random.uniform(0.5, 1.5)
            pause_s = min(pause_s * 2, self._durations.retry_s * 5)


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
