"""Owns the engine's thread: the one thread that touches the device.

Task threads hand a request in and wait for its image; between two steps the engine's thread takes in what waits,
drops what was cancelled, takes the next step and hands checkpoints and previews on. So uploads overlap the drawing of
the next images.

A dead device, an error that the engine could not give to one image, or work on the device that hangs ends the process
at once: nothing it reported from then on could be trusted. Its leases lapse, and a supervisor starts it again.
"""

import faulthandler
import logging
import os
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.engine import DrawnImage, Finished, Progress
from pipeline.errors import Cancelled, Drained, Fatal, PipelineError, UnusableLatents
from pipeline.request import ImageRequest
from worker.held import Latents
from worker.speed import Speed

log = logging.getLogger(__name__)

EXIT_FATAL = 70
STDERR = 2  # not sys.stderr, which others replace
OWN_STDERR = "/proc/self/fd/2"


class DrawingEngine(Protocol):
    """What the device needs of ``pipeline.engine.Engine``; benchmarks and tests bring one that draws for nothing."""

    @property
    def capacity(self) -> int: ...
    def submit(self, request: ImageRequest, *, priority: int = 0) -> int: ...
    def resume(self, checkpoint: bytes, *, priority: int = 0) -> int: ...
    def step(self) -> list[Finished]: ...
    def checkpoint(self, ticket: int) -> bytes: ...
    def preview(self, ticket: int) -> NDArray[np.uint8] | None: ...
    def cancel(self, ticket: int) -> bool: ...
    def drain(self) -> list[int]: ...
    def progress(self) -> dict[int, Progress]: ...
    def request(self, ticket: int) -> ImageRequest: ...


@dataclass(eq=False)
class _Order:
    """One request on its way through the device; ``key`` is the caller's name for it."""

    key: Hashable
    request: ImageRequest
    priority: int
    unfinished: bytes | None
    previews: list[int]  # the steps after which one is still to come, the first of them first
    saved_step: int = 0  # of its newest checkpoint
    image: "Future[DrawnImage]" = field(default_factory=Future)

    def end(self, end: DrawnImage | PipelineError) -> None:
        """Once: the first end is the one that counts."""
        if self.image.done():
            return
        if isinstance(end, PipelineError):
            self.image.set_exception(end)
        else:
            self.image.set_result(end)


class Watchdog:
    """Ends the process, with the traceback of every thread, if the engine's thread does not say that it lives.

    By faulthandler's own clock, which needs no GIL: whatever library hangs, and whatever it holds, this ends it. There
    is one such clock in a process.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._output = _unblocking_stderr()
        self._wound: float | None = None

    def alive(self) -> None:
        """The process lives for another ``limit_s``, at most a quarter more.

        To wind the clock up starts a thread, which took 0.2 ms: so not at every step.
        """
        now = time.monotonic()
        if self._wound is None or now - self._wound > self.limit_s / 4:
            faulthandler.dump_traceback_later(1.25 * self.limit_s, exit=True, file=self._output)
            self._wound = now

    def stop(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._wound = None


def _unblocking_stderr() -> int:
    """The error output, opened once more so that a pipe that is full and that nobody reads takes no more words.

    What dies must not wait for a reader first. Where it cannot be opened (a socket, or no /proc) it is the common one.
    """
    try:
        return os.open(OWN_STDERR, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK)
    except OSError:
        return STDERR


class Device:
    """Draws requests of many threads on one engine. ``key`` names a request for ``cancel`` and ``progress``.

    ``on_checkpoint`` gets each image's checkpoint every ``checkpoint_steps`` of its steps (0: none without being asked
    for), ``on_preview`` the steps and small pixels [h, w, 3] of one that should be shown; both are called on the
    engine's thread and must not wait for anything.
    """

    def __init__(
        self,
        engine: DrawingEngine,
        *,
        step_limit_s: float,
        checkpoint_steps: int = 0,
        on_checkpoint: Callable[[Any, Latents], None] = lambda key, latents: None,
        on_preview: Callable[[Any, int, NDArray[np.uint8]], None] = lambda key, step, pixels: None,
        die: Callable[[str], None] | None = None,
    ) -> None:
        self._engine = engine
        self._watchdog = Watchdog(step_limit_s)
        self._checkpoint_steps = checkpoint_steps
        self._on_checkpoint = on_checkpoint
        self._on_preview = on_preview
        self._die = die or _exit
        self._changed = threading.Condition()
        self._waiting: list[_Order] = []  # the oldest first
        self._inside: dict[int, _Order] = {}
        self._cancelled: set[Hashable] = set()
        self._giving_way: set[Hashable] = set()
        self._all_due = False
        self._draining = False
        self._stopped = False
        self._progress: dict[Hashable, Progress] = {}
        self._speed = Speed()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        # The lock is for what other threads read and write too, and is never held while the engine works: a device
        # that hangs must keep nobody who cancels, drains or abandons.

    @property
    def capacity(self) -> int:
        """Images that the engine holds at most."""
        return self._engine.capacity

    def start(self) -> None:
        self._thread.start()

    def draw(
        self,
        key: Hashable,
        request: ImageRequest,
        *,
        priority: int = 0,
        unfinished: bytes | None = None,
        previews: int = 0,
    ) -> DrawnImage:
        """Wait for the request's image; a smaller ``priority`` is drawn first.

        ``unfinished`` is a checkpoint of this request, to go on from; so many ``previews`` are handed on on the way.
        Raises what ended it: a PipelineError; Cancelled, Drained and, of ``unfinished``, UnusableLatents among them.
        """
        order = _Order(key, request, priority, unfinished, preview_steps(request.steps, previews))
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

    def give_way(self, key: Hashable) -> None:
        """Give the request back between two steps, with a checkpoint; its ``draw`` raises Drained.

        Unknown keys are nothing.
        """
        with self._changed:
            self._giving_way.add(key)
            self._changed.notify()

    def checkpoint(self) -> None:
        """Between the next two steps, hand on a checkpoint of every image that has moved; and go on."""
        self._all_due = True

    def drain(self) -> None:
        """Take nothing more, and give back what is unfinished between two steps: each ``draw`` raises Drained.

        The last checkpoint of each has been handed on by then.
        """
        with self._changed:
            self._draining = True
            self._changed.notify()

    def abandon(self) -> None:
        """Do not wait for the step that is being taken: each ``draw`` that has not ended raises Drained now."""
        with self._changed:
            self._draining = True
            for order in [*self._waiting, *self._inside.values()]:
                order.end(Drained("given back in the middle of a step"))

    def stop(self, timeout_s: float | None = None) -> bool:
        """Drain, and end the engine's thread; whether it ended within ``timeout_s``."""
        with self._changed:
            self._draining = self._stopped = True
            self._changed.notify()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def progress(self) -> dict[Hashable, Progress]:
        """How far each request inside the engine is, as of the last step."""
        return self._progress

    def speed(self) -> float | None:
        """Megapixel-steps a second while it draws; None: nothing was drawn yet."""
        return self._speed.now

    def _run(self) -> None:
        try:
            while self._take_orders():
                began, before = time.monotonic(), self._engine.progress()
                finished = self._engine.step()
                drawn = self._drawn(before, finished)
                self._hand_out(finished)
                self._save()
                self._show()
                self._speed.note(drawn, time.monotonic() - began)
        except BaseException as error:  # a panic in a library's native code is no Exception
            log.critical("the engine cannot go on", exc_info=True)
            self._die(f"{type(error).__name__}: {error}")
        finally:
            self._watchdog.stop()

    def _take_orders(self) -> bool:
        """Between two steps: wait for something to do, then drop, give back and admit. False when all is over."""
        with self._changed:
            while not self._changed.wait_for(self._something_to_do, timeout=self._watchdog.limit_s / 4):
                self._watchdog.alive()
            cancelled, self._cancelled = self._cancelled, set()
            giving_way, self._giving_way = self._giving_way, set()
            draining, stopped = self._draining, self._stopped
        self._watchdog.alive()
        self._drop(cancelled)
        self._let_go(giving_way)
        if draining:
            self._give_back()
        while order := self._next():
            self._admit(order)
        return not stopped

    def _something_to_do(self) -> bool:
        return bool(self._waiting or self._cancelled or self._giving_way or self._inside or self._stopped)

    def _next(self) -> _Order | None:
        """The most urgent order that waits, if there is room for it. It waits on until the engine has it."""
        with self._changed:
            if self._draining or len(self._inside) >= self._engine.capacity:
                return None
            return min(self._waiting, key=lambda order: order.priority, default=None)

    def _admit(self, order: _Order) -> None:
        try:
            ticket = self._ticket(order)
        except PipelineError as error:
            self._refuse(order, error)
        else:
            with self._changed:
                self._waiting.remove(order)
                self._inside[ticket] = order

    def _ticket(self, order: _Order) -> int:
        """Raises: PipelineError, UnusableLatents among them."""
        if order.unfinished is None:
            return self._engine.submit(order.request, priority=order.priority)
        ticket = self._resumed(order, order.unfinished)
        if self._engine.request(ticket) != order.request:
            self._engine.cancel(ticket)
            raise UnusableLatents("they are of another request")
        order.saved_step = self._engine.progress()[ticket].done
        order.previews = [step for step in order.previews if step > order.saved_step]
        self._on_checkpoint(order.key, Latents(order.saved_step, order.unfinished))  # the row may know of none so far
        return ticket

    def _resumed(self, order: _Order, unfinished: bytes) -> int:
        """Bytes come from outside, and whatever a library makes of them ends no process: they cost a fresh start.

        A device that is dead shows at the next step.
        """
        try:
            return self._engine.resume(unfinished, priority=order.priority)
        except PipelineError:
            raise
        except Exception as error:
            raise UnusableLatents(f"reading them failed with {type(error).__name__}: {error}") from error

    def _drop(self, cancelled: set[Hashable]) -> None:
        for ticket, order in list(self._inside.items()):
            if order.key in cancelled:
                self._engine.cancel(ticket)
                self._leave(ticket, Cancelled("taken out between two steps"))
        for order in [order for order in self._waiting if order.key in cancelled]:
            self._refuse(order, Cancelled("taken out before its first step"))

    def _let_go(self, giving_way: set[Hashable]) -> None:
        for ticket, order in list(self._inside.items()):
            if order.key in giving_way:
                self._save_one(ticket, self._engine.progress()[ticket].done)
                self._engine.cancel(ticket)
                self._leave(ticket, Drained("gives way to a more urgent job"))

    def _give_back(self) -> None:
        for ticket, done in self._engine.progress().items():
            self._save_one(ticket, done.done)
        for ticket in self._engine.drain():
            self._leave(ticket, Drained("given back unfinished"))
        for order in list(self._waiting):
            self._refuse(order, Drained("given back before its first step"))

    def _leave(self, ticket: int, end: DrawnImage | PipelineError) -> None:
        """One that was inside ends."""
        with self._changed:
            self._inside.pop(ticket).end(end)

    def _refuse(self, order: _Order, error: PipelineError) -> None:
        """One that waited ends."""
        with self._changed:
            self._waiting.remove(order)
            order.end(error)

    def _drawn(self, before: dict[int, Progress], finished: list[Finished]) -> float:
        """The work of the step that was just taken, in megapixel-steps."""
        now = self._engine.progress()
        images = {end.ticket for end in finished if end.image}
        work = 0.0
        for ticket, was in before.items():
            done = was.of if ticket in images else now.get(ticket, was).done
            work += self._inside[ticket].request.work * (done - was.done) / was.of
        return work

    def _hand_out(self, finished: list[Finished]) -> None:
        for end in finished:
            ended = end.image or end.error or PipelineError("ended with neither image nor error")
            self._leave(end.ticket, ended)
        done = self._engine.progress()
        self._progress = {order.key: done[ticket] for ticket, order in self._inside.items()}

    def _save(self) -> None:
        """Hand on the checkpoints that are due. What only waits for its pixels needs none: it ends in a moment."""
        everyone, self._all_due = self._all_due, False
        for ticket, progress in self._engine.progress().items():
            moved = progress.done - self._inside[ticket].saved_step
            if everyone or (0 < self._checkpoint_steps <= moved and progress.done < progress.of):
                self._save_one(ticket, progress.done)

    def _save_one(self, ticket: int, step: int) -> None:
        """Nothing, if the image has not moved since its last one. Raises: Fatal."""
        order = self._inside[ticket]
        if step <= order.saved_step:
            return
        try:
            body = self._engine.checkpoint(ticket)
        except Fatal:
            raise
        except PipelineError as error:
            log.warning("no checkpoint at step %d of %s: %s", step, order.key, error)
        else:
            self._on_checkpoint(order.key, Latents(step, body))
        order.saved_step = step

    def _show(self) -> None:
        """Hand on the previews that are due. Raises: Fatal."""
        for ticket, progress in self._engine.progress().items():
            order = self._inside[ticket]
            if order.previews and progress.done >= order.previews[0]:
                order.previews = [step for step in order.previews if step > progress.done]
                self._show_one(ticket, progress.done)

    def _show_one(self, ticket: int, step: int) -> None:
        """The picture goes on without a preview that cannot be made. Raises: Fatal."""
        order = self._inside[ticket]
        try:
            pixels = self._engine.preview(ticket)
        except Fatal:
            raise
        except PipelineError as error:
            log.warning("no preview at step %d of %s: %s", step, order.key, error)
        else:
            if pixels is not None:
                self._on_preview(order.key, step, pixels)


def preview_steps(steps: int, previews: int) -> list[int]:
    """After which of its steps an image is shown so many times, spread evenly; never after the last, fewer if there
    are fewer."""
    return sorted({round(steps * number / (previews + 1)) for number in range(1, previews + 1)} - {0, steps})


def _exit(reason: str) -> None:
    log.critical("the process ends: %s", reason)
    logging.shutdown()
    os._exit(EXIT_FATAL)
