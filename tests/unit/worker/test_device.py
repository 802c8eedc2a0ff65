import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pipeline.engine import DrawnImage, Finished, Progress
from pipeline.errors import BrokenImage, Cancelled, Drained, InvalidRequest
from pipeline.request import ImageRequest
from tests.waiting import until
from worker.device import Device

PIXELS = np.zeros((64, 64, 3), dtype=np.uint8)


class StepEngine:
    """Takes a millisecond for a step; an image whose prompt is "endless" is never done, one that "hangs" stops all."""

    capacity = 2

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.inside: dict[int, tuple[ImageRequest, int]] = {}
        self.largest = 0
        self.tickets = 0
        self.priorities: list[int] = []
        self.failing: Exception | None = None

    @property
    def idle(self) -> bool:
        return not self.inside

    def submit(self, request: ImageRequest, *, priority: int = 0) -> int:
        if request.prompt == "refused":
            raise InvalidRequest("prompt", "refused")
        self.tickets += 1
        self.priorities.append(priority)
        self.inside[self.tickets] = (request, 0)
        self.largest = max(self.largest, len(self.inside))
        return self.tickets

    def step(self) -> list[Finished]:
        if self.failing:
            raise self.failing
        time.sleep(0.001)
        ends = []
        for ticket, (request, step) in list(self.inside.items()):
            self.inside[ticket] = (request, step + 1)
            if request.prompt == "hangs":
                self.go_on.wait()
            if request.prompt == "broken":
                ends.append(Finished(ticket, error=BrokenImage(step + 1)))
            elif step + 1 >= request.steps and request.prompt != "endless":
                ends.append(Finished(ticket, image=DrawnImage(PIXELS, request.steps, 0.0)))
        for end in ends:
            del self.inside[end.ticket]
        return ends

    def cancel(self, ticket: int) -> bool:
        return self.inside.pop(ticket, None) is not None

    def drain(self) -> list[int]:
        tickets = sorted(self.inside)
        self.inside.clear()
        return tickets

    def progress(self) -> dict[int, Progress]:
        return {ticket: Progress(step, request.steps) for ticket, (request, step) in self.inside.items()}


@pytest.fixture
def engine() -> StepEngine:
    return StepEngine()


@pytest.fixture
def device(engine: StepEngine) -> Iterator[Device]:
    device = Device(engine, step_limit_s=30, die=lambda reason: None)
    device.start()
    yield device
    device.stop()


@pytest.fixture
def threads(device: Device) -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool
        device.drain()


def request(prompt: str = "a", steps: int = 1) -> ImageRequest:
    return ImageRequest(prompt=prompt, steps=steps, seed=1)


def test_many_threads_get_their_images_and_the_engine_is_never_overfilled(
    device: Device, engine: StepEngine, threads: ThreadPoolExecutor
) -> None:
    drawn = list(threads.map(lambda key: device.draw(key, request(steps=3)), range(8)))
    assert [image.steps for image in drawn] == [3] * 8
    assert engine.largest <= engine.capacity


def test_an_image_that_breaks_fails_alone(device: Device, threads: ThreadPoolExecutor) -> None:
    good = threads.submit(device.draw, "good", request(steps=100))
    bad = threads.submit(device.draw, "bad", request("broken"))
    with pytest.raises(BrokenImage):
        bad.result(5)
    assert good.result(5).steps == 100


def test_a_request_that_the_engine_refuses_raises_in_its_own_thread(device: Device) -> None:
    with pytest.raises(InvalidRequest, match="refused"):
        device.draw("x", request("refused"))


def test_a_cancelled_image_leaves_between_two_steps_and_frees_its_place(
    device: Device, engine: StepEngine, threads: ThreadPoolExecutor
) -> None:
    images = [threads.submit(device.draw, key, request("endless")) for key in ("first", "second")]
    until(lambda: len(engine.inside) == 2)
    waiting = threads.submit(device.draw, "third", request())
    device.cancel("first")
    with pytest.raises(Cancelled):
        images[0].result(5)
    assert waiting.result(5).steps == 1
    device.cancel("second")
    with pytest.raises(Cancelled):
        images[1].result(5)


def test_the_engine_is_told_who_is_urgent_and_of_those_that_wait_the_urgent_one_is_let_in_first(
    device: Device, engine: StepEngine, threads: ThreadPoolExecutor
) -> None:
    inside = [threads.submit(device.draw, key, request("endless"), priority=2) for key in ("first", "second")]
    until(lambda: len(engine.inside) == 2)
    waiting = [
        threads.submit(device.draw, key, request(steps=100), priority=priority)
        for key, priority in (("bulk", 2), ("urgent", 0), ("standard", 1))
    ]
    until(lambda: len(device._waiting) == 3)
    device.cancel("first")
    assert waiting[1].result(5).steps == 100
    assert waiting[2].result(5).steps == 100
    assert waiting[0].result(5).steps == 100
    assert engine.priorities == [2, 2, 0, 1, 2]
    device.cancel("second")
    for image in inside:
        with pytest.raises(Cancelled):
            image.result(5)


def test_a_request_that_still_waits_can_be_cancelled(
    device: Device, engine: StepEngine, threads: ThreadPoolExecutor
) -> None:
    for key in ("first", "second"):
        threads.submit(device.draw, key, request("endless"))
    until(lambda: len(engine.inside) == 2)
    third = threads.submit(device.draw, "third", request())
    until(lambda: len(device._waiting) == 1)
    device.cancel("third")
    with pytest.raises(Cancelled):
        third.result(5)


def test_progress_says_how_far_each_request_is(device: Device, threads: ThreadPoolExecutor) -> None:
    threads.submit(device.draw, "it", request("endless", steps=4))
    until(lambda: device.progress().get("it", Progress(0, 0)).done >= 3)
    assert device.progress()["it"].of == 4


def test_a_drain_gives_back_what_is_unfinished_and_takes_no_more(
    device: Device, engine: StepEngine, threads: ThreadPoolExecutor
) -> None:
    images = [threads.submit(device.draw, key, request("endless")) for key in range(5)]
    until(lambda: len(engine.inside) == 2)
    device.drain()
    for image in images:
        with pytest.raises(Drained):
            image.result(5)
    with pytest.raises(Drained):
        device.draw("late", request())


def test_an_error_of_the_engine_itself_ends_the_process(engine: StepEngine) -> None:
    reasons: list[str] = []
    died = threading.Event()

    def die(reason: str) -> None:
        reasons.append(reason)
        died.set()

    engine.failing = RuntimeError("a bug")
    device = Device(engine, step_limit_s=30, die=die)
    device.start()
    waiting = threading.Thread(target=lambda: device.draw("it", request()), daemon=True)
    waiting.start()
    assert died.wait(5)
    assert reasons == ["RuntimeError: a bug"]
    device.stop()


def test_a_step_that_hangs_ends_the_process(engine: StepEngine) -> None:
    died = threading.Event()
    device = Device(engine, step_limit_s=0.1, die=lambda reason: died.set())
    device.start()
    waiting = threading.Thread(target=lambda: device.draw("it", request("hangs")))
    waiting.start()
    assert died.wait(5)
    engine.go_on.set()
    waiting.join(5)
    device.stop()
