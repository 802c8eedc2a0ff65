"""The pauses after which processes that ended are started again: the workers of a machine, and the parts of ``up``.

It starts nothing itself.
"""

import time
from collections.abc import Callable

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0
LIVED_S = 60.0
"""A process that ran for this long is started again as if it had never ended before."""


class Restarts:
    """When each process that ended is started again: soon, and later each time that it ends at once."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started: dict[str, float] = {}
        self._pauses: dict[str, float] = {}
        self._due: dict[str, float] = {}

    def started(self, name: str) -> None:
        """Note that the process runs from now on."""
        self._started[name] = self._clock()
        self._due.pop(name, None)

    def ended(self, name: str) -> float:
        """Note that the process has ended; returns the seconds until it is due."""
        now = self._clock()
        quick = now - self._started.get(name, now) < LIVED_S
        before = self._pauses.get(name) if quick else None
        pause_s = FIRST_PAUSE_S if before is None else min(2 * before, LONGEST_PAUSE_S)
        self._pauses[name] = pause_s
        self._due[name] = now + pause_s
        return pause_s

    def due(self) -> list[str]:
        """The processes whose pause is over."""
        return [name for name, at in self._due.items() if at <= self._clock()]
