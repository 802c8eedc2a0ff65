"""Removes objects that nothing points to: what lost claims uploaded, checkpoints that were gone past, previews, and all
that belonged to a batch or file that a person deleted, or to a file whose upload was broken off.

A walk goes through the bucket a page at a time, asks Postgres which of the keys no row points to and no claim can ever
point to any more, and deletes those. That answer never becomes wrong, so a claim that comes between question and
deletion loses nothing, and two sweepers at once do no harm. Keys that are not this farm's are left alone.

Of a deleted batch no row tells any more: where its objects are was noted when it was deleted. They go once no worker
can still be uploading for it; an image that a job of another batch shares stays. So does, for a while, what was noted
when somebody began to upload a file (``files``).
"""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

from producer.jobs.errors import Unavailable
from producer.jobs.settings import Durations
from producer.jobs.storage import CHECKPOINTS, IMAGES, PREVIEWS, Storage
from producer.jobs.store import Store

log = logging.getLogger(__name__)

PAGE_PAUSE_S = 0.1
"""So that a walk through millions of objects leaves bucket and database to those who draw."""


class Sweeper:
    """Sweeps while ``leads`` says so: beside a dispatcher, while that one leads. ``run`` it in a thread of its own."""

    def __init__(self, store: Store, storage: Storage, durations: Durations, leads: Callable[[], bool]) -> None:
        self.swept = 0
        self._store = store
        self._storage = storage
        self._durations = durations
        self._leads = leads
        self._missing: str | None = None

    def run(self, stop: threading.Event) -> None:
        """Walk now and then until ``stop`` is set; a missing bucket or Postgres is waited for, and said once."""
        while not stop.is_set():
            if not self._leads():
                stop.wait(self._durations.renew_s)
                continue
            try:
                self.walk(stop)
                stop.wait(self._durations.sweep_s)
            except Unavailable as error:
                self._note_missing(error)
                stop.wait(self._durations.lease_s)
            except Exception:  # what lies there too long costs only room: say what happened, and go on
                log.exception("a walk of the sweep failed")
                stop.wait(self._durations.sweep_s)

    def walk(self, stop: threading.Event) -> None:
        """Sweep the whole bucket once, as long as this one leads. Raises: Unavailable."""
        swept = self.swept
        if self._remove_deleted(stop):
            self._sweep(self._pages(), self._store.sweepable, stop)
        if self.swept > swept:
            log.info("%d objects that nothing points to were removed", self.swept - swept)

    def _remove_deleted(self, stop: threading.Event) -> bool:
        """Whether all is gone of what was deleted long enough ago; False: it was to stop before."""
        for deletion, prefixes in self._store.deletions(after_s=self._durations.sweep_s):
            for prefix in prefixes:
                if not self._sweep(self._storage.pages(prefix), self._store.deletable, stop):
                    return False
            self._store.deleted(deletion)
        return True

    def _sweep(
        self, pages: Iterable[list[str]], removable: Callable[[Sequence[str]], list[str]], stop: threading.Event
    ) -> bool:
        """Remove what is removable of these pages; False: it was to stop before their end."""
        for keys in pages:
            if stop.wait(PAGE_PAUSE_S) or not self._leads():
                return False
            removed = removable(keys)
            self._storage.delete(removed)
            self.swept += len(removed)
            self._found_again()
        return not stop.is_set()  # there may be many in a row that hold no page

    def _pages(self) -> Iterator[list[str]]:
        yield from self._storage.pages(IMAGES)
        yield from self._storage.pages(CHECKPOINTS)
        yield from self._storage.pages(PREVIEWS)

    def _note_missing(self, error: Unavailable) -> None:
        if self._missing != error.dependency:
            self._missing = error.dependency
            log.warning("sweeping the bucket waits for %s", error)

    def _found_again(self) -> None:
        if self._missing:
            log.info("%s answers again: sweeping goes on", self._missing)
            self._missing = None
