"""Which images draw the next step.

Pure logic over plain facts: it knows no torch, no tensors and no clock, so it is tested by itself.

First come, first served, one image a step: the oldest unfinished image draws until it is done. With steps that are
not shared, no other order gives a smaller mean waiting time for images of equal length, and none starves. A later
issue makes it pack several images into a step, within a budget of tokens; that is why it is told about tokens and
answers with a list.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Candidate:
    """What a planner may know of an unfinished image."""

    ticket: int  # grows with every submission
    tokens: int  # of all its sequences, text and image, in one step
    steps_left: int


class Planner(Protocol):
    """Anything that chooses. Tests bring their own."""

    def pick(self, candidates: Sequence[Candidate]) -> list[int]:
        """The tickets that draw the next step: at least one, if there is a candidate."""
        ...


class FirstComeFirstServed:
    """The oldest ticket draws."""

    def pick(self, candidates: Sequence[Candidate]) -> list[int]:
        return [min(candidate.ticket for candidate in candidates)] if candidates else []
