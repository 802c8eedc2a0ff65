"""The way of one job through a worker: claimed, drawn, encoded, uploaded, recorded.

``Executor.execute`` is the whole way; ``ending_of`` maps every class of error to what happens then. Whatever
happens, the message is forgotten: the row, not Redis, remembers what is to be done.

A message that cannot be claimed now, for a bucket or Postgres that is away or a suspect that is drawn alone, is kept
for as long as the audit takes to publish it again, and only then let go: a worker that let go at once would swallow
the farm's messages, and one that kept them for ever would sit on them beside idle workers.
"""

import hashlib
import logging
import random
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from time import monotonic, perf_counter
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
from worker.previews import Previews

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

MOST_DOUBLINGS = 6
"""Of the wait after a failure: 64 times the first."""
LOOK_S = 0.1
"""Between two looks of one who waits for the room whether it still should."""


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


@dataclass(eq=False)
class _Picture:
    """An image's file, and the seconds that this claim took for it."""

    body: bytes
    drawing_s: float = 0.0
    encoding_s: float = 0.0
    held: bool = False  # on this host's disk too
    recorded: bool = False  # in its row: the copy on the disk is needless


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
        previews: Previews,
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
        self._previews = previews
        self._held = held
        self._outages = outages
        self._metrics = metrics
        self._durations = durations
        self._room = Room()
        self._unrecorded: dict[Message, _Picture] = {}
        self._saved_by: float | None = None
        self._draining = threading.Event()
        self._out_of_time = threading.Event()
        self._too_late = threading.Event()

    def drain(self) -> None:
        """Claim nothing more; what is drawn is still stored, however often that takes."""
        self._draining.set()

    def give_up(self, endings_s: float) -> None:
        """The grace time is over: wait for no dependency any more, but to give back, for up to ``endings_s``."""
        self._saved_by = monotonic() + 0.75 * endings_s  # the rest is for the row
        self._out_of_time.set()
        timer = threading.Timer(endings_s, self._too_late.set)
        timer.daemon = True
        timer.start()

    def hold_drawn(self) -> None:
        """Write every drawn image that is not recorded yet to this host's disk; never raises.

        For a worker that may end at any moment, while its threads wait for a bucket or a Postgres that hangs.
        """
        for message, picture in list(self._unrecorded.items()):
            self._hold(message.job_id, picture)
            if picture.recorded:  # meanwhile; one that left because its worker's time is over stays
                self._held.drop(message.job_id)

    def execute(self, message: Message) -> None:
        """Take the message's job from its claim to its record; returns when nothing is left to do for it."""
        until = monotonic() + self._durations.audit_s

        def patient() -> bool:
            return not self._draining.is_set() and monotonic() < until

        with self._room.entered(partial(self._claim, message, patient), patient) as claim:
            if claim is None:
                return
            with self._lease.holding(claim), self._checkpoints.following(claim), self._previews.following(claim):
                try:
                    self._carry_out(claim)
                except Exception as error:  # noqa: BLE001  # the table decides; one of no class is a failure
                    self._settle(claim, error)

    def _claim(self, message: Message, patient: Callable[[], bool]) -> Claim | None:
        """The job, if the message still holds. One that is not taken here is published again by the audit."""
        for pause_s in self._pauses():
            try:
                if self._can_store():
                    with self._outages.watching("Postgres"):
                        claim = self._store.claim(message, self._worker_id)
                    break
            except Unavailable:  # the outages have said it
                pass
            if self._draining.wait(pause_s) or not patient():
                return None
        if claim is None:
            log.info("job %s: nobody waits for claim %d", message.job_id, message.claim)
            return None
        self._metrics.phase("waiting", claim.waiting_s)
        return claim

    def _can_store(self) -> bool:
        """Whether the bucket takes images, as far as is known. Raises: Unavailable.

        An image that waits for it is the only sure probe: a bucket that is full, or not ours to write, answers a ping.
        """
        if not self._outages.away("S3"):
            return True
        if self._unrecorded:
            return False
        with self._outages.watching("S3"):
            self._storage.ping()
        return True

    def _carry_out(self, claim: Claim) -> None:
        request = self._begin(claim)
        picture = self._held_picture(claim, request) or self._draw(claim, request)
        self._unrecorded[claim.message] = picture
        try:
            key, uploading_s = self._upload(claim, request, picture)
            self._record(claim, request, picture, key, uploading_s)
        finally:
            del self._unrecorded[claim.message]
        self._forget(claim)

    def _begin(self, claim: Claim) -> ImageRequest:
        if claim.suspect:
            self._room.wait_for_the_others(lambda: not self._draining.is_set() and not self._lease.lost(claim))
            if self._draining.is_set():
                raise Drained("the worker stops")
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
        return _Picture(body, held=True)

    def _draw(self, claim: Claim, request: ImageRequest) -> _Picture:
        drawn = self._drawn(claim, request)
        self._metrics.phase("drawing", drawn.drawing_s)
        began = perf_counter()
        body = image_file.encode(drawn.pixels, request, self._model, self._revision)
        return _Picture(body, drawn.drawing_s, self._metrics.phase("encoding", perf_counter() - began))

    def _drawn(self, claim: Claim, request: ImageRequest) -> DrawnImage:
        """From the furthest checkpoint that can be used, or from the start."""
        draw = partial(self._device.draw, claim.message, request, priority=claim.priority.rank, previews=claim.previews)
        for drop, unfinished in self._unfinished(claim):
            try:
                return draw(unfinished=unfinished)
            except UnusableLatents as error:
                log.warning("job %s: %s", claim.job_id, error)
                drop()
        return draw()

    def _unfinished(self, claim: Claim) -> Iterator[tuple[Callable[[], None], bytes]]:
        """Its checkpoints, the furthest first: this host's and the one that the row points to, each with what to do
        if it is of no use."""
        held = self._held.latents(claim.job_id, claim.failures)
        if held is not None and held.step > claim.checkpoint_step:
            yield partial(self._held.drop_latents, claim.job_id), held.body
        key = claim.checkpoint_key
        if key is None:
            return
        try:
            # An answer is no sign that the bucket takes images.
            body = self._persist(claim, "S3", lambda: self._storage.get(key), proving=False)
        except NotFound:
            log.warning("job %s: its checkpoint is gone: it is drawn from its start", claim.job_id)
            self._checkpoints.start_afresh(claim)
        else:
            yield partial(self._checkpoints.start_afresh, claim), body

    def _upload(self, claim: Claim, request: ImageRequest, picture: _Picture) -> tuple[str, float]:
        key = object_key(claim.batch_id, claim.job_id, claim.claim, request.format)
        began = perf_counter()
        self._persist(
            claim,
            "S3",
            lambda: self._storage.put(key, picture.body, request.format.media_type),
            picture=picture,
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
        self._persist(claim, "Postgres", lambda: self._store.record(claim, recorded), picture=picture)
        picture.recorded = True
        self._metrics.ended(Outcome.SUCCEEDED)

    def _forget(self, claim: Claim) -> None:
        """Nobody will go on from what this claim or those before it left."""
        self._checkpoints.discard(claim)
        self._held.drop(claim.job_id)

    def _settle(self, claim: Claim, error: Exception) -> None:
        ending = ending_of(error)
        if ending.outcome is None:
            log.info("job %s: %s", claim.job_id, error)
            if isinstance(error, Cancelled):  # nobody wants it any more; a claim that was lost is drawn again
                self._held.drop(claim.job_id)
            return
        log.warning("job %s: %s (%s)", claim.job_id, error, ending.code, exc_info=ending.traced)
        trace = "".join(traceback.format_exception(error)) if ending.traced else None
        try:
            if ending.outcome is Outcome.DRAINED:
                self._checkpoints.save(claim, wait_s=self._saving_s())
            self._persist(
                claim,
                "Postgres",
                lambda: self._write_ending(claim, ending, str(error), trace),
                over=self._too_late,
            )
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
        claim: Claim,
        dependency: Dependency,
        act: Callable[[], Answer],
        *,
        picture: _Picture | None = None,
        proving: bool = True,
        over: threading.Event | None = None,
    ) -> Answer:
        """Do ``act``, again and again while its dependency is away. What is drawn is held, not drawn again.

        Raises: LostClaim when the claim was lost meanwhile, Unavailable when the worker's time is ``over``.
        """
        over = over or self._out_of_time
        if picture is not None and self._in_danger():
            self._hold(claim.job_id, picture)
        for pause_s in self._pauses():
            try:
                with self._outages.watching(dependency, proving=proving):
                    return act()
            except Unavailable as error:
                if self._lease.lost(claim):
                    raise LostClaim(claim.job_id, claim.claim) from error
                if picture is not None:
                    self._hold(claim.job_id, picture)
                if over.wait(pause_s):
                    raise
        raise AssertionError("the pauses never end")

    def _saving_s(self) -> float:
        """What the bucket may take for the last checkpoint of a claim before this is given back without."""
        if self._saved_by is None:  # it only gives way
            return self._durations.lease_s
        return max(0.0, self._saved_by - monotonic())

    def _in_danger(self) -> bool:
        """Whether an image may wait long to be recorded, or its worker end meanwhile."""
        return self._draining.is_set() or self._outages.away("S3") or self._outages.away("Postgres")

    def _hold(self, job_id: UUID, picture: _Picture) -> None:
        if not picture.held:
            picture.held = self._held.keep_image(job_id, picture.body)

    def _pauses(self) -> Iterator[float]:
        pause_s = self._durations.retry_s / 4
        while True:
            yield pause_s * random.uniform(0.5, 1.5)
            pause_s = min(pause_s * 2, self._durations.retry_s * 5)


class Room:
    """Many share the process, or one has it alone: a job whose last worker died must not take neighbours along.

    One at a time stands in the door, claims there, and goes in. A suspect stays in the door until it has ended. So at
    most one suspect is claimed and not drawn yet, and nothing else is claimed that could not begin at once; what is
    inside goes on. At the door the first comes first: messages are in a fair order.
    """

    def __init__(self) -> None:
        self._queue: deque[object] = deque()  # at the door, or in it
        self._changed = threading.Condition()
        self._inside = 0

    @contextmanager
    def entered(self, claim: Callable[[], Claim | None], patient: Callable[[], bool]) -> Iterator[Claim | None]:
        """Do ``claim`` in the door, and stay for the body. None: nothing was claimed, or patience was over before."""
        with ExitStack() as leaving:
            if not self._at_the_door(patient):
                yield None
                return
            leaving.callback(self._leave_the_door)
            claimed = claim()
            if claimed is not None and not claimed.suspect:
                self._count(1)
                leaving.close()  # the door is for the next
                leaving.callback(self._count, -1)
            yield claimed

    def wait_for_the_others(self, patient: Callable[[], bool]) -> None:
        """From the door: return when nobody is inside, or patience is over."""
        with self._changed:
            while self._inside and patient():
                self._changed.wait(LOOK_S)

    def _at_the_door(self, patient: Callable[[], bool]) -> bool:
        with self._changed:
            self._queue.append(me := object())
            while patient():
                if self._queue[0] is me:
                    return True
                self._changed.wait(LOOK_S)
            self._queue.remove(me)
            self._changed.notify_all()
        return False

    def _leave_the_door(self) -> None:
        with self._changed:
            self._queue.popleft()
            self._changed.notify_all()

    def _count(self, more: int) -> None:
        with self._changed:
            self._inside += more
            self._changed.notify_all()
