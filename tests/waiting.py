"""Waiting for what another thread or process does, without guessing how long it takes."""

import time
from collections.abc import Callable


def until(condition: Callable[[], object], *, timeout_s: float = 60, pause_s: float = 0.01) -> None:
    """Return once ``condition`` is true; fail the test if it is not within ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(pause_s)
