"""Which servers are away, and the log's one line when one goes and one when it answers again.

Many threads of a worker meet the same outage: heartbeat, claims, uploads, checkpoints, Celery's consumer. Each tells it
here, and none writes a line of its own.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from producer.jobs.errors import FarmError, Unavailable

log = logging.getLogger(__name__)

Dependency = Literal["Postgres", "S3", "Redis"]
SAME_OUTAGE_S = 30.0
"""A server that fails again so soon after it answered was never well: nothing new is said."""


class Outages:
    """What one process knows of the servers that it needs. Safe to share between threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._changing = threading.Lock()
        self._away: set[Dependency] = set()
        self._answered: dict[Dependency, float] = {}  # when it last answered after an outage

    @contextmanager
    def watching(self, dependency: Dependency, *, proving: bool = True) -> Iterator[None]:
        """Learns from the body, which asks ``dependency`` for something, whether it is there. Errors pass on.

        Unless ``proving``, an answer ends no outage: a bucket may be read that takes nothing.
        """
        try:
            yield
        except Unavailable as error:
            self.begin(dependency, str(error))
            raise
        except FarmError:  # an answer, though not the one that was hoped for
            if proving:
                self.end(dependency)
            raise
        else:
            if proving:
                self.end(dependency)

    def away(self, dependency: Dependency) -> bool:
        """Whether it did not answer when it was last asked."""
        return dependency in self._away

    def begin(self, dependency: Dependency, reason: str) -> None:
        """It does not answer."""
        with self._changing:
            if dependency in self._away:
                return
            self._away.add(dependency)
            if self._clock() - self._answered.get(dependency, -SAME_OUTAGE_S) >= SAME_OUTAGE_S:
                log.error("waiting for %s", reason)

    def end(self, dependency: Dependency) -> None:
        """It answers."""
        if dependency not in self._away:  # without the lock: this is asked at every success
            return
        with self._changing:
            if dependency not in self._away:
                return
            self._away.remove(dependency)
            if self._clock() - self._answered.get(dependency, -SAME_OUTAGE_S) >= SAME_OUTAGE_S:
                log.info("%s answers again", dependency)
            self._answered[dependency] = self._clock()
