"""Which images share the next denoising step.

Pure logic over plain facts: it knows no torch, no tensors and no clock, so it is tested by itself. Time comes in as
seconds that somebody else measured. Every step is chosen anew, and an image that does not draw keeps all it has: to
pause one costs nothing, so a more urgent newcomer simply draws first.

What it optimises: the mean waiting time, from submission to image, of the most urgent class; then of the next class
with what is left. Within a class the order is first come, first served.

Who may share a step. The most urgent class that is inside, and nobody else: a less urgent image in the pack would make
urgent ones later. Against starvation the oldest image of every other class may share too once it has waited PATIENCE
steps for each class that it is behind; it then has its place by its ticket, draws a step, and waits again. Only the
oldest of a class ages. If all did, a long queue of equals would overtake its own head and all would end late. This is
enough: whoever waits becomes the oldest of its class in the end, and the oldest of all tickets always moves.

The first of these in order draws, whatever its size. The others are asked in order, and join if the pack stays within
the budget and joining pays. One that is too large for what is left is passed over by smaller ones behind it, but only
until it is the first itself: for no more steps than those before it have left together.

When joining pays. A step of a pack takes ``fixed + per_token · tokens`` seconds, of which `StepCost` learns both from
the steps that were measured. Take an image with s steps left and n tokens, and the pack it could join, against the
same image drawn after the pack.

- Each member of the pack with S steps left ends later, by per_token · n in each step that both draw: min(S, s) of them.
- The image itself ends earlier: it no longer waits for the steps that the longest member has left, of which each costs
  ``fixed``, nor for the tokens that members draw after it would be done: per_token · N · (S - s) for each member with
  N tokens that has more steps left.
- Everybody behind it ends earlier too, by ``fixed`` for every step that is shared. Behind are those who may share and
  do not yet, one that will come next, and as many as are inside again if the engine is full: then there is a queue
  outside that nobody has counted.

It joins if the second and third are at least the first. For two equal images alone this says: share if the work of one
is at most twice the fixed cost of a step. For equal images on a device that one of them fills, where ``fixed`` is
nearly nothing, it says: one after the other. And it says on any device that a short image does not wait for a long
one to end.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import log2
from statistics import linear_regression, median
from typing import NamedTuple, Protocol

PATIENCE = 50
"""Steps until the oldest of a class may draw beside the class above it: about as many as an image has. So an endless
stream of urgent images loses about one step in fifty to the class below it, and that class is never still."""

GROW_AFTER = 100
"""Steps that must fit before a budget that was cut grows by an eighth. From a half back to the whole takes six
hundred steps, so a budget that is truly too large costs one failed step in as many."""

KEPT_PER_SIZE = 9  # of which up to four may be wrong
TRUSTED_FROM = 3  # one may be wrong
FORGOTTEN_AFTER = 1_000  # steps: a device gets warm, another process comes and goes
SIZES_PER_OCTAVE = 4
REFIT_EVERY = 10  # steps: a fit takes some 0.15 ms of a step that may take 10


@dataclass(frozen=True)
class Candidate:
    """What a planner may know of an unfinished image."""

    ticket: int  # grows with every submission
    tokens: int  # of all its sequences, text and image, in one step
    steps_left: int
    priority: int = 0  # lower is more urgent
    waited: int = 0  # steps that the engine has taken since this image last drew or came in


class Planner(Protocol):
    """Anything that chooses. Tests bring their own."""

    def pick(self, candidates: Sequence[Candidate]) -> list[int]:
        """The tickets that draw the next step: at least one, if there is a candidate."""
        ...

    def observe(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long, until the device was done with it."""
        ...

    def shrink(self, tokens: int) -> None:
        """A pack of so many tokens did not fit in memory."""
        ...


class StepTime(NamedTuple):
    """A step of a pack takes ``fixed_s + per_token_s * tokens``. Neither is negative."""

    fixed_s: float
    per_token_s: float


class _Measured(NamedTuple):
    """A step that was drawn."""

    number: int  # of all that were measured
    tokens: int
    seconds: float


class StepCost:
    """What a step takes on this device, learnt from the steps themselves.

    Packs whose tokens differ by less than a fifth count as one size. The last few steps of each size are kept and their
    median stands for them: one step that was ten times too slow changes nothing. Seconds per token are fitted over
    1 / tokens by least squares. That is the same line as seconds over tokens, with errors relative to the step's
    length, as noise is; and attention, which makes long sequences dearer by the token, cannot hide the fixed cost that
    small packs show.
    """

    def __init__(self) -> None:
        self._number = 0
        self._by_size: dict[int, deque[_Measured]] = {}
        self._time: StepTime | None = None
        self._fitted = 0  # the number of the last step that the fit has seen

    def observe(self, tokens: int, seconds: float) -> None:
        """Remember a step."""
        self._number += 1
        size = int(SIZES_PER_OCTAVE * log2(tokens))
        self._by_size.setdefault(size, deque(maxlen=KEPT_PER_SIZE)).append(_Measured(self._number, tokens, seconds))

    def time(self) -> StepTime | None:
        """The present fit; None until sizes that differ by a factor of two have been measured often enough."""
        if self._number - self._fitted >= (1 if self._time is None else REFIT_EVERY):
            self._time, self._fitted = self._fit(), self._number
        return self._time

    def _fit(self) -> StepTime | None:
        since = self._number - FORGOTTEN_AFTER
        recent = [[step for step in steps if step.number > since] for steps in self._by_size.values()]
        sizes = [_typical(steps) for steps in recent if len(steps) >= TRUSTED_FROM]
        if not sizes or max(sizes)[0] < 2 * min(sizes)[0]:
            return None
        fixed_s, per_token_s = linear_regression(
            [1 / tokens for tokens, _ in sizes], [seconds / tokens for tokens, seconds in sizes]
        )
        return StepTime(max(0.0, fixed_s), max(0.0, per_token_s))


class SharedSteps:
    """The planner of the product. See the module for its rules.

    ``budget_tokens`` limits a pack of several images, and is the one knob; an image alone may exceed it. It is what
    holds now: `shrink` cuts it to half of what did not fit, and steps that fit bring it back to what was given.
    With ``capacity`` candidates or more, a queue outside is taken for granted. A ``cost`` that has seen steps already
    spares the learning.
    """

    def __init__(self, budget_tokens: int, *, capacity: int, cost: StepCost | None = None) -> None:
        self.budget_tokens = budget_tokens
        self.cost = cost or StepCost()
        self._given_tokens = budget_tokens
        self._capacity = capacity
        self._fitted = 0  # steps that fitted since the budget last changed

    def pick(self, candidates: Sequence[Candidate]) -> list[int]:
        """The tickets of the next step, in order; empty only if nobody waits."""
        if not candidates:
            return []
        line = _line(candidates)
        to_come = 1 + (len(line) if len(candidates) >= self._capacity else 0)
        return [image.ticket for image in self._pack(line, to_come)]

    def observe(self, tokens: int, seconds: float) -> None:
        """Learn from a step. If it filled more than half of a budget that was cut, it counts for growing back."""
        self.cost.observe(tokens, seconds)
        if self.budget_tokens < self._given_tokens and 2 * tokens > self.budget_tokens:
            self._fitted += 1
            if self._fitted == GROW_AFTER:
                self._resize(min(self._given_tokens, self.budget_tokens + max(1, self.budget_tokens // 8)))

    def shrink(self, tokens: int) -> None:
        """Half of what did not fit is the most from now on."""
        self._resize(max(1, min(self.budget_tokens, tokens // 2)))

    def _resize(self, budget_tokens: int) -> None:
        self.budget_tokens, self._fitted = budget_tokens, 0

    def _pack(self, line: list[Candidate], to_come: int) -> list[Candidate]:
        pack, tokens = line[:1], line[0].tokens
        for image in line[1:]:
            if tokens + image.tokens > self.budget_tokens:
                continue
            time = self.cost.time()
            # Nothing known yet: share, for that is what brings the measurements.
            if time is None or _pays(image, pack, time, behind=len(line) - len(pack) + to_come):
                pack.append(image)
                tokens += image.tokens
        return pack


def _typical(steps: Sequence[_Measured]) -> tuple[float, float]:
    """The median tokens and the median seconds of steps of one size."""
    return median(step.tokens for step in steps), median(step.seconds for step in steps)


def _line(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that may draw the next step, in order: the most urgent class, and who of the others waited for too long."""
    by_ticket = sorted(candidates, key=lambda image: image.ticket)
    most_urgent = min(image.priority for image in candidates)
    oldest: dict[int, int] = {}
    for image in by_ticket:
        oldest.setdefault(image.priority, image.ticket)
    return [
        image
        for image in by_ticket
        if image.priority == most_urgent
        or (image.ticket == oldest[image.priority] and image.waited >= PATIENCE * (image.priority - most_urgent))
    ]


def _pays(image: Candidate, pack: Sequence[Candidate], time: StepTime, *, behind: int) -> bool:
    """Whether joining ``pack`` saves at least the waiting that it causes. ``behind`` counts the image and all after it.

    The inequality is the one that the module derives, with the terms of each member taken together.
    """
    tokens, steps = image.tokens, image.steps_left
    longest = max(member.steps_left for member in pack)
    saved_s = time.fixed_s * (longest + (behind - 1) * min(longest, steps))
    # Of each member: what it loses by the image's tokens, less what the image gains by not waiting for the member's.
    lost_tokens = 0
    for member in pack:
        longer = member.steps_left - steps
        lost_tokens += tokens * steps - member.tokens * longer if longer > 0 else tokens * member.steps_left
    return time.per_token_s * lost_tokens <= saved_s
