"""What sharing steps is worth: mean waiting time from submission to image, on devices of known cost.

Time is counted, not measured. The planner is told nothing of the device. It learns from what it observes, and that is
noisy: times scatter by a tenth, and one step in a hundred seems ten times too slow. The clock itself goes by the true
times, so that two planners differ by what they chose and not by their luck. Everything is seeded.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from statistics import fmean, median, quantiles

import pytest

from pipeline.planner import Candidate, Planner, SharedSteps

CAPACITY = 32
BUDGET_TOKENS = 16_384
SCATTER = 0.1
SLOW_SHARE, SLOW_FACTOR = 0.01, 10.0


@dataclass(frozen=True)
class Kind:
    """Images of one sort: tokens of both branches of a guided one, steps, and how many of them come."""

    tokens: int
    steps: int
    weight: float = 1.0


MIXED = [
    Kind(400, 8, 3),
    Kind(1_064, 12, 3),
    Kind(1_064, 20, 3),
    Kind(700, 16, 2),
    Kind(1_464, 20, 2),
    Kind(2_464, 28, 1.5),
    Kind(2_560, 30, 1.5),
    Kind(4_352, 50, 0.5),
    Kind(8_704, 50, 0.5),
]
BANNERS = [Kind(1_064, 20)]


@dataclass(frozen=True)
class Device:
    """A step takes ``fixed_s + per_token_s * tokens``."""

    name: str
    fixed_s: float
    per_token_s: float

    def step_s(self, tokens: int) -> float:
        return self.fixed_s + self.per_token_s * tokens

    def measured_s(self, tokens: int, random: Random) -> float:
        slow = SLOW_FACTOR if random.random() < SLOW_SHARE else 1.0
        return self.step_s(tokens) * random.lognormvariate(0, SCATTER) * slow


GPU = Device("like a GPU", 6e-3, 14e-6)
CPU = Device("like a small model on a CPU", 5e-3, 8e-6)
FULL = Device("filled by one image", 0.0, 14e-6)


@dataclass(frozen=True)
class Arrival:
    at_s: float
    kind: Kind


class OneByOne:
    """The oldest draws until it is done."""

    def pick(self, candidates: Sequence[Candidate]) -> list[int]:
        return [min(candidate.ticket for candidate in candidates)]

    def observe(self, tokens: int, seconds: float) -> None:
        pass

    def shrink(self, tokens: int) -> None:
        raise AssertionError("nothing runs out of memory here")


class AlwaysFull(OneByOne):
    """Fills the budget in order of arrival, whether it helps or not."""

    def pick(self, candidates: Sequence[Candidate]) -> list[int]:
        picked: list[int] = []
        left = BUDGET_TOKENS
        for candidate in candidates:
            if not picked or candidate.tokens <= left:
                picked.append(candidate.ticket)
                left -= candidate.tokens
        return picked


def arrivals(device: Device, kinds: Sequence[Kind], load: float, *, images: int = 200, seed: int = 3) -> list[Arrival]:
    """Poisson arrivals at ``load`` of what the device can draw one by one."""
    random = Random(seed)
    weights = [kind.weight for kind in kinds]
    alone_s = sum(kind.weight * kind.steps * device.step_s(kind.tokens) for kind in kinds) / sum(weights)
    now_s, found = 0.0, []
    for kind in random.choices(kinds, weights, k=images):
        now_s += random.expovariate(load / alone_s)
        found.append(Arrival(now_s, kind))
    return found


@dataclass
class Drawing:
    kind: Kind
    steps_left: int
    last_step: int


def waits_in_engine(device: Device, trace: Sequence[Arrival], planner: Planner) -> list[float]:
    """Seconds that each image waited, in an engine of CAPACITY that asks ``planner`` before every step."""
    random, now_s, step = Random(7), 0.0, 0
    outside = deque(enumerate(trace))
    inside: dict[int, Drawing] = {}
    waited_s: dict[int, float] = {}
    while outside or inside:
        while outside and len(inside) < CAPACITY and outside[0][1].at_s <= now_s:
            ticket, arrival = outside.popleft()
            inside[ticket] = Drawing(arrival.kind, arrival.kind.steps, step)
        if not inside:
            now_s = outside[0][1].at_s
            continue
        picked = planner.pick(
            [
                Candidate(ticket, one.kind.tokens, one.steps_left, waited=step - one.last_step)
                for ticket, one in inside.items()
            ]
        )
        tokens = sum(inside[ticket].kind.tokens for ticket in picked)
        planner.observe(tokens, device.measured_s(tokens, random))
        now_s, step = now_s + device.step_s(tokens), step + 1
        for ticket in picked:
            inside[ticket].steps_left -= 1
            inside[ticket].last_step = step
            if not inside[ticket].steps_left:
                waited_s[ticket] = now_s - trace[ticket].at_s
                del inside[ticket]
    return [waited_s[ticket] for ticket in range(len(trace))]


def waits_in_static_batches(device: Device, trace: Sequence[Arrival], hold_s: float) -> list[float]:
    """Seconds that each image waited, where a batch is of one kind and all its members start and end together.

    Whichever kind's oldest came first goes next, once its batch is full or its oldest has waited ``hold_s``.
    """
    now_s = 0.0
    outside = deque(enumerate(trace))
    queues: dict[Kind, deque[int]] = {}
    waited_s: dict[int, float] = {}
    while len(waited_s) < len(trace):
        while outside and outside[0][1].at_s <= now_s:
            ticket, arrival = outside.popleft()
            queues.setdefault(arrival.kind, deque()).append(ticket)
        waiting = [(queue[0], kind) for kind, queue in queues.items() if queue]
        ready = [one for one in waiting if _is_full(queues[one[1]], one[1]) or trace[one[0]].at_s + hold_s <= now_s]
        if not ready:
            due_s = [trace[oldest].at_s + hold_s for oldest, _ in waiting]
            now_s = min(due_s + [arrival.at_s for _, arrival in list(outside)[:1]])
            continue
        _, kind = min(ready, key=lambda one: one[0])
        batch = list(_taken(queues[kind], max(1, BUDGET_TOKENS // kind.tokens)))
        now_s += kind.steps * device.step_s(kind.tokens * len(batch))
        waited_s |= {ticket: now_s - trace[ticket].at_s for ticket in batch}
    return [waited_s[ticket] for ticket in range(len(trace))]


def _is_full(queue: Sequence[int], kind: Kind) -> bool:
    return len(queue) >= BUDGET_TOKENS // kind.tokens


def _taken(queue: deque[int], most: int) -> Iterator[int]:
    while queue and most:
        most -= 1
        yield queue.popleft()


def shared_steps() -> SharedSteps:
    return SharedSteps(BUDGET_TOKENS, capacity=CAPACITY)


def p95(waits_s: Sequence[float]) -> float:
    return quantiles(waits_s, n=20)[-1]


@pytest.mark.parametrize("load", [0.7, 0.95])
@pytest.mark.parametrize("device", [GPU, CPU], ids=lambda device: device.name)
def test_a_mixed_load_waits_less_than_in_the_better_of_two_static_batches(device: Device, load: float) -> None:
    trace = arrivals(device, MIXED, load)
    shared = waits_in_engine(device, trace, shared_steps())
    static = min((waits_in_static_batches(device, trace, hold_s) for hold_s in (0.0, 2.0)), key=fmean)
    assert fmean(shared) < 0.8 * fmean(static)
    assert median(shared) < median(static)
    assert p95(shared) < p95(static)


@pytest.mark.parametrize("device", [GPU, CPU], ids=lambda device: device.name)
def test_equal_images_wait_about_as_little_as_in_static_batches_which_are_made_for_them(device: Device) -> None:
    trace = arrivals(device, BANNERS, 0.95)
    shared = waits_in_engine(device, trace, shared_steps())
    assert fmean(shared) < 1.05 * fmean(waits_in_static_batches(device, trace, hold_s=0.0))
    assert fmean(shared) < 0.7 * fmean(waits_in_engine(device, trace, OneByOne()))


@pytest.mark.parametrize("device", [GPU, CPU], ids=lambda device: device.name)
def test_many_equal_images_at_once_end_as_soon_as_if_every_pack_were_full(device: Device) -> None:
    trace = [Arrival(0.0, BANNERS[0])] * 200
    shared = waits_in_engine(device, trace, shared_steps())
    assert max(shared) < 1.03 * max(waits_in_engine(device, trace, AlwaysFull()))


@pytest.mark.parametrize("load", [0.7, 0.95])
def test_where_one_image_fills_the_device_equal_images_wait_as_one_by_one_and_full_packs_lose(load: float) -> None:
    trace = arrivals(FULL, BANNERS, load)
    one_by_one = fmean(waits_in_engine(FULL, trace, OneByOne()))
    assert fmean(waits_in_engine(FULL, trace, shared_steps())) < 1.05 * one_by_one
    assert fmean(waits_in_engine(FULL, trace, AlwaysFull())) > 1.3 * one_by_one


@pytest.mark.parametrize("load", [0.7, 0.95])
def test_where_one_image_fills_the_device_short_images_still_do_not_wait_for_long_ones(load: float) -> None:
    trace = arrivals(FULL, MIXED, load)
    shared = waits_in_engine(FULL, trace, shared_steps())
    for planner in (OneByOne(), AlwaysFull()):
        assert fmean(shared) < 0.9 * fmean(waits_in_engine(FULL, trace, planner))
