"""Checkpoints of images that are being drawn: from the engine's thread to the bucket, and their place in the row.

The engine's thread hands bytes over and never waits: a thread of this module's own stores them, the latest of each
image. While the bucket or Postgres is away it tries one with each that comes in, and an image that dies then costs more
than it should; nothing else does.

A row points to one checkpoint. The object that a new one replaces is removed, and so is that of an image that has
ended; what is left behind when this fails, the sweep of the bucket removes.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from producer.jobs.contract import Claim, Message
from producer.jobs.errors import LostClaim, Unavailable
from producer.jobs.storage import Storage, checkpoint_key
from producer.jobs.store import Store
from worker.held import Held, Latents
from worker.outages import Outages

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/octet-stream"
MOST_RUBBISH = 1000
"""Keys that one request can delete."""


@dataclass(eq=False)
class _Drawing:
    """A claim that is being drawn."""

    claim: Claim
    key: str | None  # what the row points to
    newest: Latents | None = None
    stored: Latents | None = None
    storing: threading.Lock = field(default_factory=threading.Lock)


class Checkpoints:
    """Stores the checkpoints of one worker's claims."""

    def __init__(self, store: Store, storage: Storage, outages: Outages, held: Held) -> None:
        self._store = store
        self._storage = storage
        self._outages = outages
        self._held = held
        self._changed = threading.Condition()
        self._drawings: dict[Message, _Drawing] = {}
        self._rubbish: list[str] = []
        self._news = False
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="checkpoints", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """End when what can be removed is removed, or after ``timeout_s``."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join(timeout_s)

    @contextmanager
    def following(self, claim: Claim) -> Iterator[None]:
        """Take checkpoints of this claim for as long as the body runs."""
        with self._changed:
            self._drawings[claim.message] = _Drawing(claim, claim.checkpoint_key)
        try:
            yield
        finally:
            with self._changed:
                del self._drawings[claim.message]

    def take(self, message: Message, latents: Latents) -> None:
        """The engine's newest checkpoint of this claim; never waits. Of a claim that is not followed it is nothing."""
        with self._changed:
            if drawing := self._drawings.get(message):
                drawing.newest = latents
                self._tell()

    def save(self, claim: Claim) -> None:
        """Store the newest before the claim is given back. What cannot be stored, this host holds."""
        drawing = self._drawings[claim.message]
        newest = drawing.newest
        if newest is None or newest is drawing.stored:
            return
        # First here: a bucket that hangs could use up all the time that is left.
        held = self._held.keep_latents(claim.job_id, newest)
        try:
            self._store_newest(drawing)
            self._held.drop_latents(claim.job_id)
        except Unavailable as error:
            where = "on this host" if held else "nowhere"
            log.warning("job %s: step %d is kept %s (%s)", claim.job_id, newest.step, where, error)

    def discard(self, claim: Claim) -> None:
        """The job's image is there, or will be drawn from its start: nobody needs its checkpoint any more."""
        drawing = self._drawings[claim.message]
        drawing.newest = None
        if drawing.key:
            self._throw_away(drawing.key)

    def _run(self) -> None:
        while self._wait():
            try:
                for drawing in list(self._drawings.values()):
                    self._store_newest(drawing)
                self._remove_rubbish()
            except Unavailable:  # the outages have said it; the next checkpoint tries again
                continue
            except Exception:  # drawing goes on without
                log.exception("a checkpoint could not be stored")

    def _wait(self) -> bool:
        """For something to do; False when all is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._news or self._stopped)
            going_on, self._news = self._news, False
            return going_on

    def _tell(self) -> None:
        """With the lock held: there is something to do."""
        self._news = True
        self._changed.notify()

    def _store_newest(self, drawing: _Drawing) -> None:
        """Raises: Unavailable."""
        with drawing.storing:
            newest = drawing.newest
            if newest is not None and newest is not drawing.stored:
                self._put(drawing, newest)
                drawing.stored = newest

    def _put(self, drawing: _Drawing, latents: Latents) -> None:
        claim = drawing.claim
        key = checkpoint_key(claim.job_id, claim.claim, latents.step)
        with self._outages.watching("S3"):
            self._storage.put(key, latents.body, MEDIA_TYPE)
        try:
            with self._outages.watching("Postgres"):
                self._store.note_checkpoint(claim, key, latents.step)
        except LostClaim:
            pass  # it has ended, or is another worker's, and the row may even point here: this is for the sweep
        else:
            replaced, drawing.key = drawing.key, key
            if replaced and replaced != key:
                self._throw_away(replaced)

    def _throw_away(self, key: str) -> None:
        with self._changed:
            self._rubbish.append(key)
            self._tell()

    def _remove_rubbish(self) -> None:
        """Asked for once: what stays, the sweep removes."""
        with self._changed:
            keys, self._rubbish = self._rubbish[:MOST_RUBBISH], []
        if keys:
            self._storage.delete(keys)
