"""Who draws side by side in ``engine.py``: the engine, and diffusers' own pipeline, one by one or in static batches.

All use the same loaded weights and one thread, are handed the same requests at the same moments, and end an image as
the same thing: uint8 pixels in the host's memory, cropped to what the request asked.

Invariant: a contestant knows of a request only once it has come; nobody looks ahead.
"""

import math
import time
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from diffusers import OvisImagePipeline
from numpy.typing import NDArray
from PIL import Image

from pipeline.engine import Engine, Finished
from pipeline.errors import PipelineError
from pipeline.model import Model
from pipeline.request import ImageRequest
from pipeline.selftest import _reference as pipeline_of
from tests.benchmarks.banner_trace import Arrival

Pixels = NDArray[np.uint8]


class Contestant(Protocol):
    """Anything that draws. ``work`` is one piece that cannot be interrupted: a step, a call of a pipeline."""

    def take(self, arrival: Arrival) -> None:
        """A request has come."""
        ...

    def due_s(self) -> float:
        """From when on, on the clock of ``play``, it wants to work; infinite while it has nothing to do."""
        ...

    def work(self) -> dict[int, Pixels]:
        """Work now; returns the images that this finished, by the numbers of their arrivals."""
        ...


@dataclass(frozen=True)
class Played:
    """What came of one play, in the order of the arrivals."""

    waits_s: list[float]  # from each request's arrival to its image
    pictures: list[Pixels]
    wall_s: float
    cpu_s: float  # of all threads of this process; waiting for an arrival costs none


def play(contestant: Contestant, arrivals: Sequence[Arrival]) -> Played:
    """Hand every request over when it comes, in real time, and let the contestant work whenever it wants to."""
    coming, pictures, waits_s = deque(arrivals), dict[int, Pixels](), dict[int, float]()
    cpu_began_s, began_s = time.process_time(), time.perf_counter()
    while len(pictures) < len(arrivals):
        now_s = time.perf_counter() - began_s
        while coming and coming[0].at_s <= now_s:
            contestant.take(coming.popleft())
        due_s = contestant.due_s()
        if due_s > now_s:
            time.sleep(min(due_s, coming[0].at_s if coming else math.inf) - now_s)
            continue
        drawn = contestant.work()
        now_s = time.perf_counter() - began_s
        pictures.update(drawn)
        waits_s.update((number, now_s - arrivals[number].at_s) for number in drawn)
    cpu_s, wall_s = time.process_time() - cpu_began_s, time.perf_counter() - began_s
    return Played([waits_s[a.number] for a in arrivals], [pictures[a.number] for a in arrivals], wall_s, cpu_s)


class PackedSteps:
    """The engine. Requests beyond its capacity wait outside, in order, as they do in front of a worker's."""

    def __init__(self, model: Model, capacity: int) -> None:
        self._engine = Engine(model, capacity=capacity)
        self._waiting: deque[Arrival] = deque()
        self._inside: dict[int, int] = {}  # ticket to number

    def take(self, arrival: Arrival) -> None:
        self._waiting.append(arrival)

    def due_s(self) -> float:
        return 0.0 if self._waiting or self._inside else math.inf

    def work(self) -> dict[int, Pixels]:
        while self._waiting and len(self._inside) < self._engine.capacity:
            arrival = self._waiting.popleft()
            self._inside[self._engine.submit(arrival.request)] = arrival.number
        return {self._inside.pop(finished.ticket): _pixels(finished) for finished in self._engine.step()}


class BatchQueue:
    """Puts static batches together: the oldest request and those that wait and are equal to it, up to ``largest``.

    A batch that is not full waits ``wait_s`` after its oldest request came, in the hope of more; a full one does not.
    """

    def __init__(self, largest: int, wait_s: float) -> None:
        self._largest = largest
        self._wait_s = wait_s
        self._waiting: list[Arrival] = []

    def add(self, arrival: Arrival) -> None:
        self._waiting.append(arrival)

    def due_s(self) -> float:
        """When the next batch may start; infinite if nothing waits."""
        if not self._waiting:
            return math.inf
        full = len(self._next()) == self._largest
        return self._waiting[0].at_s + (0.0 if full else self._wait_s)

    def pop(self) -> list[Arrival]:
        """The next batch, full or not."""
        batch = self._next()
        self._waiting = [arrival for arrival in self._waiting if arrival not in batch]
        return batch

    def _next(self) -> list[Arrival]:
        kind = _kind(self._waiting[0].request)
        return [arrival for arrival in self._waiting if _kind(arrival.request) == kind][: self._largest]


class StaticBatches:
    """diffusers' pipeline, one call for each batch of ``BatchQueue``. With ``largest`` 1 that is the plain loop."""

    def __init__(self, model: Model, largest: int, wait_s: float = 0.0) -> None:
        self._pipeline = pipeline_of(model)
        self._queue = BatchQueue(largest, wait_s)

    def take(self, arrival: Arrival) -> None:
        self._queue.add(arrival)

    def due_s(self) -> float:
        return self._queue.due_s()

    def work(self) -> dict[int, Pixels]:
        batch = self._queue.pop()
        pictures = _draw_together(self._pipeline, [arrival.request for arrival in batch])
        return {arrival.number: picture for arrival, picture in zip(batch, pictures, strict=True)}


def _kind(request: ImageRequest) -> Hashable:
    """What one call of the pipeline takes once for all its prompts."""
    return request.drawn_size, request.steps, request.guidance


def _draw_together(pipeline: OvisImagePipeline, requests: Sequence[ImageRequest]) -> list[Pixels]:
    """One call for requests of one kind. Each has its own generator, so that its noise is what it has alone."""
    width_px, height_px = requests[0].drawn_size
    images: list[Image.Image] = pipeline(
        [request.prompt for request in requests],
        negative_prompt=[request.negative_prompt for request in requests],
        guidance_scale=requests[0].guidance,
        width=width_px,
        height=height_px,
        num_inference_steps=requests[0].steps,
        generator=[torch.Generator("cpu").manual_seed(request.seed or 0) for request in requests],
    ).images
    return [_cropped(image, request) for image, request in zip(images, requests, strict=True)]


def _cropped(image: Image.Image, request: ImageRequest) -> Pixels:
    """The centre, as the engine crops it."""
    left, top = (image.width - request.width) // 2, (image.height - request.height) // 2
    return np.asarray(image.crop((left, top, left + request.width, top + request.height)))


def _pixels(finished: Finished) -> Pixels:
    if finished.image is None:
        raise finished.error or PipelineError("an image ended without a picture")
    return finished.image.pixels
