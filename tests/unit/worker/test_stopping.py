"""How a process ends that was told to stop. Each is a real one, whose error output is a pipe that is full."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from worker.stopping import ECHO_S

ROOT = Path(__file__).parents[3]
SCRIPT = """
import logging, os, sys, threading, time
from worker.stopping import Stopping
logging.basicConfig()
os.set_blocking(2, False)
try:
    while True: os.write(2, bytes(4096))
except BlockingIOError:
    os.set_blocking(2, True)

def say(what):
    print(what, flush=True)

def hang():
    logging.critical("nobody reads this")

Stopping(
    deadline_s=float(sys.argv[1]), stop_consuming=lambda: None,
    drain=lambda: say("drains"), last_acts=[hang, lambda: say("gives back"), lambda: 1 / 0],
).listen()
say("listens")
while True: time.sleep(60)
"""


class Stopped:
    """The script's process."""

    def __init__(self, deadline_s: float) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(deadline_s)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"listens\n"

    def ended(self) -> tuple[int, list[bytes]]:
        """Its exit code, and what it did."""
        code = self.process.wait(20)
        assert self.process.stdout is not None
        return code, self.process.stdout.read().split(b"\n")[:-1]

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def in_haste() -> Iterator[Stopped]:
    stopped = Stopped(deadline_s=0.3)
    yield stopped
    stopped.close()


@pytest.fixture
def at_leisure() -> Iterator[Stopped]:
    stopped = Stopped(deadline_s=600)
    yield stopped
    stopped.close()


def test_one_that_hangs_does_its_last_acts_and_ends_at_its_deadline_though_one_of_them_hangs(in_haste: Stopped) -> None:
    in_haste.process.send_signal(signal.SIGTERM)
    assert in_haste.ended() == (75, [b"drains", b"gives back"])


def test_further_signals_are_nothing_but_another_ctrl_c_ends_it(at_leisure: Stopped) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        at_leisure.process.send_signal(number)
    time.sleep(ECHO_S + 0.3)
    at_leisure.process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert at_leisure.process.poll() is None
    for _ in range(200):  # on a busy machine the first signal may be late, and this one its echo
        at_leisure.process.send_signal(signal.SIGINT)
        time.sleep(0.1)
        if at_leisure.process.poll() is not None:
            break
    assert at_leisure.ended() == (130, [b"drains", b"gives back"])
