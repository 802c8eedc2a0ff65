"""The end of a worker process: who asks for it, and the time by which it comes, whatever hangs.

A signal's handler interrupts its thread anywhere, perhaps while that holds the lock of a log or of threading. So it
waits for nothing and writes nothing: it wakes a thread that has been there from the start. That thread does nothing
but wait, too: what might hang (a disk, Postgres, an error output that nobody reads) is done by others beside it.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from queue import Empty, SimpleQueue
from typing import NoReturn

log = logging.getLogger(__name__)

EXIT_DEADLINE = 75
EXIT_INTERRUPTED = 130
LAST_ACTS_S = 2.0
"""For what is done in a process that does not wait any longer."""
ECHO_S = 1.0
"""Terminal, make and shell may each pass the same Ctrl-C on."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopping:
    """Stops a worker once. ``stop_consuming`` is called by signals' handlers, and may only set a flag.

    ``drain`` runs on a thread of its own, from the first signal on. If the process has not ended ``deadline_s`` after
    it, or at another Ctrl-C, it ends when ``last_acts`` are done, or after ``LAST_ACTS_S``. Any further SIGTERM or
    SIGHUP is nothing.
    """

    def __init__(
        self,
        *,
        deadline_s: float,
        stop_consuming: Callable[[], None],
        drain: Callable[[], None],
        last_acts: Sequence[Callable[[], None]],
    ) -> None:
        self._deadline_s = deadline_s
        self._stop_consuming = stop_consuming
        self._drain = drain
        self._last_acts = last_acts
        self._told: SimpleQueue[int] = SimpleQueue()  # the one queue that a signal's handler may use

    def listen(self) -> None:
        """From now on signals drain. In the main thread, which alone may say so."""
        threading.Thread(target=self._wait, name="stopping", daemon=True).start()
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def begin(self) -> None:
        """As at SIGTERM: whoever stops consuming, for whatever reason, must let go in time."""
        self._told.put(signal.SIGTERM)

    def _on_signal(self, number: int, _frame: object) -> None:
        self._stop_consuming()
        self._told.put(number)

    def _wait(self) -> None:
        self._told.get()
        told_at = time.monotonic()
        threading.Thread(target=self._drain, name="draining", daemon=True).start()
        while (left_s := told_at + self._deadline_s - time.monotonic()) > 0:
            try:
                number = self._told.get(timeout=left_s)
            except Empty:
                break
            if number == signal.SIGINT and time.monotonic() - told_at > ECHO_S:
                self._end(EXIT_INTERRUPTED, "another Ctrl-C")
        self._end(EXIT_DEADLINE, "its time is over, and something hangs")

    def _end(self, code: int, reason: str) -> NoReturn:
        over_at = time.monotonic() + LAST_ACTS_S
        acts: list[Callable[[], None]] = [*self._last_acts, partial(log.critical, "the process ends: %s", reason)]
        threads = [threading.Thread(target=act, name="last act", daemon=True) for act in acts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, over_at - time.monotonic()))
        os._exit(code)
