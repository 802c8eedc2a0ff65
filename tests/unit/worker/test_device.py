import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.engine import DrawnImage, Finished, Progress
from pipeline.errors import BrokenImage, Cancelled, Drained, Exhausted, InvalidRequest, UnusableLatents
from pipeline.request import ImageRequest
from tests.waiting import until
from worker.device import Device, preview_steps
from worker.held import Latents

ROOT = Path(__file__).parents[3]
PIXELS = np.zeros((64, 64, 3), dtype=np.uint8)


class StepEngine:
    """Takes a millisecond for a step; an image whose prompt is "endless" is never done, one that "hangs" stops all."""

    capacity = 2

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.inside: dict[int, tuple[ImageRequest, int]] = {}
        self.largest = 0
        self.tickets = 0
        self.checkpoints = 0
        self.steps = 0
        self.priorities: list[int] = []
        self.failing: Exception | None = None
        self.hangs_at_checkpoints = False
        self.drained_at: list[int] = []

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

    def resume(self, checkpoint: bytes, *, priority: int = 0) -> int:
        if checkpoint == b"spoilt":
            raise UnusableLatents("spoilt")
        if checkpoint == b"a riddle":
            raise AttributeError("'NoneType' object has no attribute 'keys'")
        prompt, steps, step = checkpoint.decode().split()
        ticket = self.submit(request(prompt, int(steps)), priority=priority)
        self.inside[ticket] = (self.inside[ticket][0], int(step))
        return ticket

    def checkpoint(self, ticket: int) -> bytes:
        drawn, step = self.inside[ticket]
        if drawn.prompt == "uncopyable":
            raise Exhausted(64, 64, "no room for a copy")
        if self.hangs_at_checkpoints:
            self.go_on.wait()
        self.checkpoints += 1
        return f"{drawn.prompt} {drawn.steps} {step}".encode()

    def preview(self, ticket: int) -> NDArray[np.uint8] | None:
        drawn, step = self.inside[ticket]
        if drawn.prompt == "unshowable":
            raise Exhausted(64, 64, "no room for a preview")
        return np.full((1, 1, 3), step, dtype=np.uint8)

    def step(self) -> list[Finished]:
        if self.failing:
            raise self.failing
        time.sleep(0.001)
        self.steps += 1
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

    def request(self, ticket: int) -> ImageRequest:
        return self.inside[ticket][0]

    def cancel(self, ticket: int) -> bool:
        return self.inside.pop(ticket, None) is not None

    def drain(self) -> list[int]:
        tickets = sorted(self.inside)
        self.drained_at = [step for _, step in self.inside.values()]
        self.inside.clear()
        return tickets

    def progress(self) -> dict[int, Progress]:
        return {ticket: Progress(step, request.steps) for ticket, (request, step) in self.inside.items()}


@pytest.fixture
def engine() -> StepEngine:
    return StepEngine()


@pytest.fixture
def taken() -> dict[str, list[Latents]]:
    """The checkpoints that the device handed on, by the key of their image."""
    return {}


@pytest.fixture
def device(engine: StepEngine, taken: dict[str, list[Latents]]) -> Iterator[Device]:
    device = Device(
        engine,
        step_limit_s=30,
        checkpoint_steps=10,
        on_checkpoint=lambda key, latents: taken.setdefault(key, []).append(latents),
        die=lambda reason: None,
    )
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


def test_a_checkpoint_of_each_image_is_handed_on_every_so_many_of_its_steps_but_none_of_one_that_ends(
    device: Device, taken: dict[str, list[Latents]], threads: ThreadPoolExecutor
) -> None:
    images = [threads.submit(device.draw, key, request(key, steps)) for key, steps in (("long", 35), ("short", 10))]
    for image in images:
        image.result(5)
    assert taken == {"long": [Latents(step, f"long 35 {step}".encode()) for step in (10, 20, 30)]}


def test_an_image_goes_on_from_its_checkpoint_and_its_next_one_comes_as_many_steps_later(
    device: Device, engine: StepEngine, taken: dict[str, list[Latents]]
) -> None:
    device.draw("it", request("it", 35), unfinished=b"it 35 15")
    assert engine.steps == 20
    assert [latents.step for latents in taken["it"]] == [15, 25], "the one that it went on from is its newest at first"


@pytest.mark.parametrize("checkpoint", [b"spoilt", b"a riddle", b"other 35 15", b"a 2 1"])
def test_a_checkpoint_that_cannot_be_used_or_is_another_images_raises_and_takes_no_place(
    device: Device, engine: StepEngine, checkpoint: bytes
) -> None:
    with pytest.raises(UnusableLatents):
        device.draw("it", request(), unfinished=checkpoint)
    assert engine.idle
    assert device.draw("it", request()).steps == 1


def test_a_checkpoint_of_everybody_is_taken_between_two_steps_and_drawing_goes_on(
    device: Device, taken: dict[str, list[Latents]], threads: ThreadPoolExecutor
) -> None:
    for key in ("first", "second"):
        threads.submit(device.draw, key, request("endless"))
    until(lambda: len(device.progress()) == 2)
    until(lambda: device.progress()["first"].done % 10 in (1, 2))
    device.checkpoint()
    until(lambda: any(latents.step % 10 for key in taken for latents in taken[key]))
    assert taken.keys() == {"first", "second"}
    before = device.progress()["first"].done
    until(lambda: device.progress()["first"].done > before)


def test_what_is_given_back_at_a_drain_has_handed_on_the_step_that_it_ends_at(
    device: Device, engine: StepEngine, taken: dict[str, list[Latents]], threads: ThreadPoolExecutor
) -> None:
    image = threads.submit(device.draw, "it", request("endless"))
    until(lambda: device.progress().get("it", Progress(0, 0)).done >= 3)
    device.drain()
    with pytest.raises(Drained):
        image.result(5)
    assert [taken["it"][-1].step] == engine.drained_at


def test_one_that_has_not_moved_gets_no_checkpoint(
    device: Device, engine: StepEngine, taken: dict[str, list[Latents]], threads: ThreadPoolExecutor
) -> None:
    images = [threads.submit(device.draw, key, request("endless")) for key in ("first", "second", "third")]
    until(lambda: len(engine.inside) == 2 and len(device._waiting) == 1)
    device.drain()
    for image in images:
        with pytest.raises(Drained):
            image.result(5)
    assert len(taken) <= 2
    with pytest.raises(Drained):
        device.draw("late", request(), unfinished=b"late 35 15")


def test_an_image_that_no_checkpoint_can_be_taken_of_is_drawn_all_the_same(
    device: Device, taken: dict[str, list[Latents]]
) -> None:
    assert device.draw("it", request("uncopyable", 25)).steps == 25
    assert not taken


def test_what_is_inside_a_long_step_is_given_back_without_waiting_for_it(engine: StepEngine) -> None:
    device = Device(engine, step_limit_s=30, die=lambda reason: None)
    device.start()
    with ThreadPoolExecutor() as threads:
        image = threads.submit(device.draw, "it", request("hangs"))
        until(lambda: engine.steps == 1)
        device.drain()
        device.abandon()
        with pytest.raises(Drained):
            image.result(5)
        assert not device.stop(timeout_s=0.05), "the step is still being taken"
        engine.go_on.set()
        assert device.stop(timeout_s=5)


def test_a_device_that_hangs_at_a_checkpoint_keeps_nobody_from_cancelling_or_abandoning(engine: StepEngine) -> None:
    engine.hangs_at_checkpoints = True
    device = Device(engine, step_limit_s=30, die=lambda reason: None)
    device.start()
    with ThreadPoolExecutor() as threads:
        image = threads.submit(device.draw, "it", request("endless"))
        until(lambda: engine.steps >= 3)
        device.drain()
        time.sleep(0.1)  # it is at the checkpoint of its last step
        asked = [threads.submit(act) for act in (partial(device.cancel, "it"), device.abandon)]
        for act in asked:
            act.result(5)
        with pytest.raises(Drained):
            image.result(5)
        engine.go_on.set()
        assert device.stop(timeout_s=5)


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


HANGING = """
import ctypes, sys, threading, time
from pipeline.request import ImageRequest
from tests.blank_worker import BlankEngine
from worker.device import Device, preview_steps

def hold_the_gil():
    ctypes.PyDLL(None).sleep(600)

def hang(self, *arguments, **named):
    hold_the_gil() if sys.argv[2] == "holds" else time.sleep(600)

if sys.argv[1] != "nothing":
    setattr(BlankEngine, sys.argv[1], hang)
device = Device(BlankEngine(0.02), step_limit_s=0.6, checkpoint_steps=1)
device.start()
time.sleep(2)
device.draw("it", ImageRequest(prompt="a", steps=100, seed=1))
device.stop()
sys.exit(17)
"""


@pytest.mark.parametrize(
    ("work", "gil"), [("step", "leaves"), ("step", "holds"), ("submit", "holds"), ("checkpoint", "holds")]
)
def test_work_on_the_device_that_hangs_ends_the_process_with_a_traceback_though_it_may_hold_the_gil(
    work: str, gil: str
) -> None:
    ended = run_hanging(work, gil)
    assert ended.returncode == 1
    assert "Timeout (0:00:00" in ended.stderr
    assert "in hold_the_gil" in ended.stderr or "in hang" in ended.stderr
    assert "in _run" in ended.stderr


def test_a_device_without_work_and_one_with_much_of_it_lives_on() -> None:
    ended = run_hanging("nothing", "leaves")
    assert (ended.returncode, ended.stderr) == (17, "")


def test_work_that_hangs_ends_the_process_though_nobody_reads_its_words() -> None:
    full = (
        "import os\nos.set_blocking(2, False)\ntry:\n    while True: os.write(2, bytes(4096))\n"
        "except BlockingIOError: os.set_blocking(2, True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", full + HANGING, "step", "holds"], cwd=ROOT, stderr=subprocess.PIPE
    )
    try:
        assert process.wait(300) == 1
    finally:
        process.kill()
        process.communicate()


def run_hanging(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", HANGING, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)  # it would hang for 600


def test_an_image_that_gives_way_leaves_with_a_checkpoint_and_its_neighbour_goes_on(
    engine: StepEngine, threads: ThreadPoolExecutor
) -> None:
    saved: list[tuple[object, Latents]] = []
    device = Device(engine, step_limit_s=60, on_checkpoint=lambda key, latents: saved.append((key, latents)))
    device.start()
    leaving, staying = (threads.submit(device.draw, key, request("endless")) for key in ("leaving", "staying"))
    until(lambda: all(device.progress().get(key, Progress(0, 0)).done > 2 for key in ("leaving", "staying")))
    device.give_way("nobody")
    device.give_way("leaving")
    with pytest.raises(Drained, match="urgent"):
        leaving.result(5)
    assert [key for key, _ in saved] == ["leaving"]
    assert saved[0][1].step > 2
    assert not staying.done()
    device.drain()
    with pytest.raises(Drained):
        staying.result(5)
    assert device.stop(timeout_s=10)


@pytest.mark.parametrize(
    ("steps", "previews", "after"),
    [(28, 0, []), (28, 1, [14]), (28, 3, [7, 14, 21]), (4, 3, [1, 2, 3]), (2, 3, [1]), (1, 3, [])],
)
def test_previews_are_spread_over_the_steps(steps: int, previews: int, after: list[int]) -> None:
    assert preview_steps(steps, previews) == after


@pytest.fixture
def shown(engine: StepEngine) -> Iterator[tuple[Device, list[tuple[object, int, int]]]]:
    """A device, and what it shows: key, step, the colour of the picture."""
    previews: list[tuple[object, int, int]] = []
    device = Device(
        engine,
        step_limit_s=30,
        on_preview=lambda key, step, pixels: previews.append((key, step, int(pixels[0, 0, 0]))),
        die=lambda reason: None,
    )
    device.start()
    yield device, previews
    device.stop()


def test_an_image_is_shown_as_often_as_was_asked_for_and_others_never(
    shown: tuple[Device, list[tuple[object, int, int]]], threads: ThreadPoolExecutor
) -> None:
    device, previews = shown
    other = threads.submit(device.draw, "other", request(steps=40))
    device.draw("shown", request(steps=40), previews=3)
    other.result(5)
    assert previews == [("shown", step, step) for step in (10, 20, 30)]


def test_an_image_that_goes_on_is_not_shown_as_it_was_before(
    shown: tuple[Device, list[tuple[object, int, int]]],
) -> None:
    device, previews = shown
    device.draw("resumed", request(steps=40), unfinished=b"a 40 20", previews=3)
    assert [step for _, step, _ in previews] == [30]


def test_an_image_that_cannot_be_shown_is_drawn_all_the_same(
    shown: tuple[Device, list[tuple[object, int, int]]], caplog: pytest.LogCaptureFixture
) -> None:
    device, previews = shown
    assert device.draw("a", request("unshowable", steps=8), previews=1).steps == 8
    assert previews == []
    assert "no preview at step 4" in caplog.text
