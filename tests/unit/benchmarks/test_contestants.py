"""The play hands requests over at their time, and static batches are put together as they are said to be."""

import math

import numpy as np

from pipeline.request import ImageRequest
from tests.benchmarks.banner_trace import Arrival, at_once
from tests.benchmarks.contestants import BatchQueue, Pixels, play

SMALL = ImageRequest(prompt="A fox", width=64, height=64, steps=4, guidance=5.0)


class OneAtATime:
    """Draws nothing, but in order and one by one; notes how many it had been handed by then."""

    def __init__(self) -> None:
        self._waiting: list[Arrival] = []
        self.seen: list[int] = []

    def take(self, arrival: Arrival) -> None:
        self._waiting.append(arrival)

    def due_s(self) -> float:
        return self._waiting[0].at_s if self._waiting else math.inf

    def work(self) -> dict[int, Pixels]:
        self.seen.append(len(self._waiting))
        number = self._waiting.pop(0).number
        return {number: np.full((1, 1, 3), number, np.uint8)}


def arrivals_at(*at_s: float, **fields: object) -> list[Arrival]:
    request = SMALL.model_copy(update=fields)
    return [Arrival(number, at, request) for number, at in enumerate(at_s)]


def queue_of(arrivals: list[Arrival], largest: int = 3, wait_s: float = 0.0) -> BatchQueue:
    queue = BatchQueue(largest, wait_s)
    for arrival in arrivals:
        queue.add(arrival)
    return queue


def numbers(batch: list[Arrival]) -> list[int]:
    return [arrival.number for arrival in batch]


def test_requests_that_are_there_at_once_are_handed_over_together() -> None:
    contestant = OneAtATime()
    played = play(contestant, at_once([SMALL] * 3))
    assert contestant.seen == [3, 2, 1]
    assert [int(picture[0, 0, 0]) for picture in played.pictures] == [0, 1, 2]
    assert max(played.waits_s) <= played.wall_s


def test_a_request_is_handed_over_no_earlier_than_it_comes() -> None:
    contestant = OneAtATime()
    played = play(contestant, arrivals_at(0.0, 0.02))
    assert contestant.seen == [1, 1]
    assert played.wall_s >= 0.02
    assert 0 <= played.waits_s[1] <= played.wall_s - 0.02


def test_a_batch_is_the_oldest_request_and_its_equals_in_order() -> None:
    first, second, third, fourth, fifth = arrivals_at(0, 0, 0, 0, 0)
    other = Arrival(second.number, 0, SMALL.model_copy(update={"steps": 5}))
    queue = queue_of([first, other, third, fourth, fifth])
    assert numbers(queue.pop()) == [0, 2, 3]
    assert numbers(queue.pop()) == [1]
    assert numbers(queue.pop()) == [4]
    assert queue.due_s() == math.inf


def test_another_size_step_count_or_guidance_is_another_batch() -> None:
    for field, value in (("width", 80), ("height", 80), ("steps", 5), ("guidance", 1.0)):
        (one,), (other,) = arrivals_at(0), arrivals_at(0, **{field: value})
        assert len(queue_of([one, other]).pop()) == 1, field


def test_sizes_that_are_drawn_alike_share_a_batch() -> None:
    (one,) = arrivals_at(0, width=728, height=90)
    (other,) = [Arrival(1, 0, one.request.model_copy(update={"width": 736, "height": 96}))]
    assert len(queue_of([one, other]).pop()) == 2


def test_a_batch_that_is_not_full_waits_for_more_and_a_full_one_does_not() -> None:
    assert queue_of(arrivals_at(1.0, 1.5), wait_s=2.0).due_s() == 3.0
    assert queue_of(arrivals_at(1.0, 1.5, 1.7), wait_s=2.0).due_s() == 1.0
    assert queue_of(arrivals_at(1.0, 1.5), wait_s=0.0).due_s() == 1.0
