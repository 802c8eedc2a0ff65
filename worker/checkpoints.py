"""Checkpoints of images that are being drawn: from the engine's thread to the bucket, and their place in the row.

The engine's thread hands bytes over and never waits: a thread in the background stores them, the latest of each image.
While the bucket or Postgres is away it tries again with each that comes in, and an image that dies then costs more
than it should; nothing else does.

A row points to one checkpoint. The object that a new one replaces is removed, and so is that of an image that has
ended; what is left behind when this fails, the sweep of the bucket removes.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from producer.jobs.contract import Claim, Message
from producer.jobs.errors import LostClaim, Unavailable
from producer.jobs.storage import Storage, checkpoint_key
from producer.jobs.store import Store
from worker.background import Background
from worker.held import Held, Latents
from worker.outages import Outages

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/octet-stream"


@dataclass(eq=False)
class _Drawing:
    """A claim that is being drawn."""

    claim: Claim
    key: str | None  # what the row points to
    step: int  # of that
    newest: Latents | None = None  # not stored yet
    tried_step: int = 0  # the furthest that was tried to be stored, since it was last asked for


class Checkpoints:
    """Stores the checkpoints of one worker's claims."""

    def __init__(self, store: Store, storage: Storage, outages: Outages, held: Held) -> None:
        self._store = store
        self._storage = storage
        self._outages = outages
        self._held = held
        self._background = Background("checkpoints", storage, self._store_all)
        self._changed = self._background.changed
        self._drawings: dict[Message, _Drawing] = {}

    def start(self) -> None:
        self._background.start()

    def stop(self, timeout_s: float) -> None:
        """End when what can be removed is removed, or after ``timeout_s``."""
        self._background.stop(timeout_s)

    @contextmanager
    def following(self, claim: Claim) -> Iterator[None]:
        """Take checkpoints of this claim for as long as the body runs."""
        with self._changed:
            self._drawings[claim.message] = _Drawing(claim, claim.checkpoint_key, claim.checkpoint_step)
        try:
            yield
        finally:
            with self._changed:
                del self._drawings[claim.message]

    def take(self, message: Message, latents: Latents) -> None:
        """The engine's newest checkpoint of this claim; never waits. Of a claim that is not followed it is nothing."""
        with self._changed:
            drawing = self._drawings.get(message)
            if drawing and latents.step > drawing.step:
                drawing.newest = latents
                self._background.tell()

    def start_afresh(self, claim: Claim) -> None:
        """What the row points to is of no use: from now on any step is further."""
        self._drawings[claim.message].step = 0

    def save(self, claim: Claim, *, wait_s: float) -> None:
        """Store the newest before the claim is given back: one try, for which this waits up to ``wait_s``.

        What is not stored by then, this host holds.
        """
        drawing = self._drawings[claim.message]
        newest = drawing.newest
        if newest is None:
            return
        # First here: a bucket that hangs uses up all the time that there is.
        held = self._held.keep_latents(claim.job_id, claim.failures, newest)
        with self._changed:
            drawing.tried_step = 0
            self._background.tell()
            self._changed.wait_for(lambda: drawing.tried_step >= newest.step, wait_s)
            stored = drawing.step >= newest.step
        if stored:
            self._held.drop_latents(claim.job_id)
        else:
            where = "on this host alone" if held else "nowhere"
            log.warning("job %s: step %d is kept %s: the bucket or Postgres is away", claim.job_id, newest.step, where)

    def discard(self, claim: Claim) -> None:
        """The job's image is there, or will be drawn from its start: nobody needs its checkpoint any more."""
        drawing = self._drawings[claim.message]
        drawing.newest = None
        if drawing.key:
            self._background.throw_away(drawing.key)

    def _store_all(self) -> None:
        with self._changed:
            drawings = list(self._drawings.values())
        for drawing in drawings:
            self._try_to_store(drawing)

    def _try_to_store(self, drawing: _Drawing) -> None:
        newest = drawing.newest
        if newest is None:
            return
        try:
            self._put(drawing, newest)
        except Unavailable:  # the outages have said it; the next checkpoint tries again
            pass
        except Exception:  # drawing goes on without, and so do the others' checkpoints
            log.exception("job %s: a checkpoint could not be stored", drawing.claim.job_id)
        with self._changed:
            drawing.tried_step = newest.step
            self._changed.notify_all()

    def _put(self, drawing: _Drawing, latents: Latents) -> None:
        """Raises: Unavailable."""
        claim = drawing.claim
        key = checkpoint_key(claim.job_id, claim.claim, latents.step)
        with self._outages.watching("S3"):
            self._storage.put(key, latents.body, MEDIA_TYPE)
        try:
            with self._outages.watching("Postgres"):
                self._store.note_checkpoint(claim, key, latents.step)
        except LostClaim:
            return  # it has ended, or is another worker's, and the row may even point here: this is for the sweep
        with self._changed:
            replaced, drawing.key, drawing.step = drawing.key, key, latents.step
            if drawing.newest is latents:
                drawing.newest = None
        if replaced and replaced != key:
            self._background.throw_away(replaced)
