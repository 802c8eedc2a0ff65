"""Previews of images that are being drawn: from the engine's thread to the bucket, and their place in the row.

For jobs that were submitted with them alone. Nothing waits for a preview: a thread in the background stores the latest
of each image, once; one that cannot be stored is forgotten. A row points to its last one, and each that was replaced
or whose claim has ended is removed; what is left behind when this fails, the sweep of the bucket removes.
"""

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from producer.jobs.contract import Claim, Message
from producer.jobs.errors import LostClaim, Unavailable
from producer.jobs.storage import Storage, preview_key
from producer.jobs.store import Store
from worker.background import Background
from worker.outages import Outages

log = logging.getLogger(__name__)

MEDIA_TYPE = "image/jpeg"
QUALITY = 80


@dataclass(eq=False)
class _Shown:
    """A claim whose image is shown on the way."""

    claim: Claim
    key: str | None = None  # what the row points to
    newest: tuple[int, NDArray[np.uint8]] | None = None  # not stored yet: steps done, pixels
    ended: bool = False


class Previews:
    """Stores the previews of one worker's claims."""

    def __init__(self, store: Store, storage: Storage, outages: Outages) -> None:
        self._store = store
        self._storage = storage
        self._outages = outages
        self._background = Background("previews", storage, self._store_all)
        self._changed = self._background.changed
        self._shown: dict[Message, _Shown] = {}

    def start(self) -> None:
        self._background.start()

    def stop(self, timeout_s: float) -> None:
        """End when what can be removed is removed, or after ``timeout_s``."""
        self._background.stop(timeout_s)

    @contextmanager
    def following(self, claim: Claim) -> Iterator[None]:
        """Take previews of this claim for as long as the body runs; with its end the last one goes."""
        if not claim.previews:
            yield
            return
        shown = _Shown(claim)
        with self._changed:
            self._shown[claim.message] = shown
        try:
            yield
        finally:
            with self._changed:
                del self._shown[claim.message]
                shown.ended = True
                if shown.key:
                    self._background.throw_away(shown.key)

    def take(self, message: Message, step: int, pixels: NDArray[np.uint8]) -> None:
        """The newest preview of this claim; never waits. Of a claim that is not followed it is nothing."""
        with self._changed:
            shown = self._shown.get(message)
            if shown:
                shown.newest = step, pixels
                self._background.tell()

    def _store_all(self) -> None:
        with self._changed:
            waiting = [(shown, shown.newest) for shown in self._shown.values() if shown.newest]
            for shown, _ in waiting:
                shown.newest = None
        for shown, (step, pixels) in waiting:
            self._try_to_store(shown, step, pixels)

    def _try_to_store(self, shown: _Shown, step: int, pixels: NDArray[np.uint8]) -> None:
        try:
            self._put(shown, step, pixels)
        except Unavailable:  # the outages have said it; the next preview may get through
            pass
        except Exception:  # drawing goes on without, and so do the others' previews
            log.exception("job %s: a preview could not be stored", shown.claim.job_id)

    def _put(self, shown: _Shown, step: int, pixels: NDArray[np.uint8]) -> None:
        """Raises: Unavailable."""
        claim = shown.claim
        key = preview_key(claim.job_id, claim.claim, step)
        with self._outages.watching("S3"):
            self._storage.put(key, _encoded(pixels), MEDIA_TYPE)
        try:
            with self._outages.watching("Postgres"):
                self._store.note_preview(claim, key)
        except LostClaim:
            self._background.throw_away(key)
            return
        with self._changed:
            replaced, shown.key = shown.key, key
            if shown.ended:
                self._background.throw_away(key)
        if replaced:
            self._background.throw_away(replaced)


def _encoded(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()
