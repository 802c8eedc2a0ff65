"""A thread that stores what the engine's thread hands over, so that the latter never waits for a bucket or Postgres.

One thread for each kind of thing that is stored: a bucket that hangs holds up that thread and nobody else.
"""

import logging
import threading
from collections.abc import Callable

from producer.jobs.errors import Unavailable
from producer.jobs.storage import Storage

log = logging.getLogger(__name__)

MOST_RUBBISH = 1000
"""Keys that one request can delete."""


class Background:
    """Calls ``store_all`` after each ``tell``; several that come meanwhile are one. Removes objects too.

    ``changed`` is the lock of all that ``store_all`` shares with other threads; ``tell`` and ``throw_away`` take it.
    ``store_all`` is called without it.
    """

    def __init__(self, name: str, storage: Storage, store_all: Callable[[], None]) -> None:
        self.changed = threading.Condition()
        self._name = name
        self._storage = storage
        self._store_all = store_all
        self._rubbish: list[str] = []
        self._news = False
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """End when what can be removed is removed, or after ``timeout_s``."""
        with self.changed:
            self._stopped = True
            self.changed.notify_all()
        self._thread.join(timeout_s)

    def tell(self) -> None:
        """Something is to be stored."""
        with self.changed:
            self._news = True
            self.changed.notify_all()

    def throw_away(self, key: str) -> None:
        """Nobody needs this object any more."""
        with self.changed:
            self._rubbish.append(key)
            self.tell()

    def _run(self) -> None:
        while self._wait():
            self._store_all()
            self._remove_rubbish()

    def _wait(self) -> bool:
        """For something to do; False when all is over."""
        with self.changed:
            self.changed.wait_for(lambda: self._news or self._stopped)
            going_on, self._news = self._news, False
            return going_on

    def _remove_rubbish(self) -> None:
        """Asked for once: what stays, the sweep removes. What is more than one request takes is for the next time."""
        with self.changed:
            keys, self._rubbish = self._rubbish[:MOST_RUBBISH], self._rubbish[MOST_RUBBISH:]
            self._news = self._news or bool(self._rubbish)
        try:
            self._storage.delete(keys)
        except Unavailable as error:
            log.debug("%s are left to the sweep: %s", self._name, error)
        except Exception:
            log.exception("%s are left to the sweep", self._name)
