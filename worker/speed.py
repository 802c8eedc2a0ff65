"""How fast this worker draws, as its heartbeat tells: what an estimate of the time that a batch takes is made from.

Measured over what was really drawn, whatever sizes were in the packs, with the waits between two images left out. What
was drawn long ago counts less and less, so that a new mix of sizes is soon the one that is told.
"""

from math import exp

MEMORY_S = 60.0
"""Of drawing, not of the clock: what was drawn so long ago counts 1/e."""


class Speed:
    """Megapixel-steps a second (``ImageRequest.work``) while it draws. The engine's thread alone writes it."""

    def __init__(self, memory_s: float = MEMORY_S) -> None:
        self._memory_s = memory_s
        self._work = 0.0
        self._drawing_s = 0.0

    def note(self, work: float, drawing_s: float) -> None:
        """So much was drawn in so much time."""
        kept = exp(-drawing_s / self._memory_s)
        self._work = self._work * kept + work
        self._drawing_s = self._drawing_s * kept + drawing_s

    @property
    def now(self) -> float | None:
        """None while nothing was drawn yet."""
        return self._work / self._drawing_s if self._work and self._drawing_s else None
