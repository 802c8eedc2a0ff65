"""Owns the engine's thread: the one thread that touches the device.

Task threads hand a request in and wait for its image; between two steps the engine's thread takes in what waits,
drops what was cancelled, and takes the next step. So uploads overlap the drawing of the next images.

A dead device, an error that the engine could not give to one image, or a step that hangs ends the process at once:
nothing it reported from then on could be trusted. Its leases lapse, and a supervisor starts it again.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

from pipeline.engine import DrawnImage, Finished, Progress
from pipeline.errors import Cancelled, Drained, PipelineError
from pipeline.request import ImageRequest

log = logging.getLogger(__name__)

EXIT_FATAL = 70


class DrawingEngine(Protocol):
    """What the device needs of ``pipeline.engine.Engine``; benchmarks and tests bring one that draws for nothing."""

    @property
    def capacity(self) -> int: ...
    def submit(self, request: ImageRequest, *, priority: int = 0) -> int: ...
    def step(self) -> list[Finished]: ...
    def cancel(self, ticket: int) -> bool: ...
    def drain(self) -> list[int]: ...
    def progress(self) -> dict[int, Progress]: ...


@dataclass(eq=False)
class _Order:
    """One request on its way through the device; ``key`` is the caller's name for it."""

    key: Hashable
    request: ImageRequest
    priority: int
    image: "Future[DrawnImage]" = field(default_factory=Future)


class Device:
    """Draws requests of many threads on one engine. ``key`` names a request for ``cancel`` and ``progress``."""

    def __init__(self, engine: DrawingEngine, *, step_limit_s: float, die: Callable[[str], None] | None = None) -> None:
        self._engine = engine
        self._step_limit_s = step_limit_s
        self._die = die or _exit
        self._changed = threading.Condition()
        self._waiting: list[_Order] = []  # the oldest first
        self._inside: dict[int, _Order] = {}
        self._cancelled: set[Hashable] = set()
        self._draining = False
        self._stopped = False
        self._progress: dict[Hashable, Progress] = {}
        self._step_began: float | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._watchdog = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    @property
    def capacity(self) -> int:
        """Images that the engine holds at most."""
        return self._engine.capacity

    def start(self) -> None:
        self._thread.start()
        self._watchdog.start()

    def draw(self, key: Hashable, request: ImageRequest, *, priority: int = 0) -> DrawnImage:
        """Wait for the request's image; a smaller ``priority`` is drawn first.

        Raises what ended it: a PipelineError, Cancelled and Drained among them.
        """
        order = _Order(key, request, priority)
        with self._changed:
            if self._draining:
                raise Drained("the worker stops")
            self._waiting.append(order)
            self._changed.notify()
        return order.image.result()

    def cancel(self, key: Hashable) -> None:
        """Drop the request between two steps; its ``draw`` raises Cancelled. Unknown keys are nothing."""
        with self._changed:
            self._cancelled.add(key)
            self._changed.notify()

    def drain(self) -> None:
        """Take nothing more, and give back what is unfinished between two steps: each ``draw`` raises Drained."""
        with self._changed:
            self._draining = True
            self._changed.notify()

    def stop(self) -> None:
        """Drain, and end the engine's thread."""
        with self._changed:
            self._draining = self._stopped = True
            self._changed.notify()
        self._ended.set()
        self._thread.join()
        self._watchdog.join()

    def progress(self) -> dict[Hashable, Progress]:
        """How far each request inside the engine is, as of the last step."""
        return self._progress

    def _run(self) -> None:
        try:
            while self._take_orders():
                self._step_began = time.monotonic()
                finished = self._engine.step()
                self._step_began = None
                self._hand_out(finished)
        except BaseException as error:  # a panic in a library's native code is no Exception
            log.critical("the engine cannot go on", exc_info=True)
            self._die(f"{type(error).__name__}: {error}")

    def _take_orders(self) -> bool:
        """Between two steps: wait for something to do, then drop, give back and admit. False when all is over."""
        with self._changed:
            self._changed.wait_for(self._something_to_do)
            self._drop_cancelled()
            if self._draining:
                self._give_back()
            while self._waiting and len(self._inside) < self._engine.capacity:
                self._admit(min(self._waiting, key=lambda order: order.priority))
            return not self._stopped

    def _something_to_do(self) -> bool:
        return bool(self._waiting or self._cancelled or self._inside or self._stopped)

    def _admit(self, order: _Order) -> None:
        self._waiting.remove(order)
        try:
            self._inside[self._engine.submit(order.request, priority=order.priority)] = order
        except PipelineError as error:
            order.image.set_exception(error)

    def _drop_cancelled(self) -> None:
        for ticket, order in list(self._inside.items()):
            if order.key in self._cancelled:
                self._engine.cancel(ticket)
                self._inside.pop(ticket).image.set_exception(Cancelled("taken out between two steps"))
        for order in [order for order in self._waiting if order.key in self._cancelled]:
            self._waiting.remove(order)
            order.image.set_exception(Cancelled("taken out before its first step"))
        self._cancelled.clear()

    def _give_back(self) -> None:
        for ticket in self._engine.drain():
            self._inside.pop(ticket).image.set_exception(Drained("given back unfinished"))
        while self._waiting:
            self._waiting.pop().image.set_exception(Drained("given back before its first step"))

    def _hand_out(self, finished: list[Finished]) -> None:
        for end in finished:
            order = self._inside.pop(end.ticket)
            if end.image is not None:
                order.image.set_result(end.image)
            else:
                order.image.set_exception(end.error or PipelineError("ended with neither image nor error"))
        done = self._engine.progress()
        self._progress = {order.key: done[ticket] for ticket, order in self._inside.items()}

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self._step_limit_s / 4)):
            began = self._step_began
            if began is not None and time.monotonic() - began > self._step_limit_s:
                log.critical("a step took longer than %.0f s", self._step_limit_s)
                self._die("a step hangs")
                return


def _exit(reason: str) -> None:
    log.critical("the process ends: %s", reason)
    logging.shutdown()
    os._exit(EXIT_FATAL)
