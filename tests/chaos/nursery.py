"""Starts the farm's processes by forking one that has imported everything: a worker then starts in a second, not ten.

Each is a process of its own, with its own environment, session and log, and is killed with a real SIGKILL. The one
that is forked (multiprocessing's fork server) has run no torch, holds no connection and no thread of ours, so what
comes of it behaves as one that was started by command. Cell 13 starts its members instead, and asks the same of them.
"""

import importlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.forkserver import _forkserver  # type: ignore[attr-defined]
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

from tests.chaos import strange_clock
from tests.waiting import until

PRELOADED = ["tests.chaos.preloaded"]
END_S = 60.0


@dataclass(frozen=True)
class Member:
    """A process of the farm."""

    role: str
    process: BaseProcess
    log_path: Path

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.exitcode is None

    @property
    def exit_code(self) -> int | None:
        """Negative: the signal that ended it; None: it runs."""
        return self.process.exitcode

    def signal(self, number: signal.Signals) -> None:
        """Nothing, if it has ended."""
        if self.alive:
            os.kill(self.pid, number)

    def kill(self) -> bool:
        """SIGKILL; whether it was still alive to be killed."""
        was_alive = self.alive
        self.process.kill()
        self.process.join(END_S)
        return was_alive

    def freeze(self) -> None:
        """SIGSTOP, and return once it stands still."""
        self.signal(signal.SIGSTOP)
        until(self.is_frozen, timeout_s=END_S)

    def is_frozen(self) -> bool:
        return psutil.Process(self.pid).status() == psutil.STATUS_STOPPED

    def wake(self) -> None:
        self.signal(signal.SIGCONT)

    def ended(self, timeout_s: float = END_S) -> int:
        """Wait for its end; returns its exit code."""
        self.process.join(timeout_s)
        assert self.process.exitcode is not None, f"{self.role} did not end; its log is {self.log_path}"
        return self.process.exitcode

    def takes_jobs(self) -> bool:
        """Whether a worker has said so."""
        return " takes jobs" in self.log()

    def leads(self) -> bool:
        """Whether a dispatcher has said so."""
        return " leads" in self.log()

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")


class Nursery:
    """Forks members. One at a time in a process: multiprocessing has one fork server."""

    def __init__(self) -> None:
        # A fork server inherits this once: with it, it finds the tests from whatever folder the run was started.
        os.environ["PYTHONPATH"] = str(Path(__file__).parents[2])
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)

    def start(self, role: str, environment: Mapping[str, str], log_path: Path) -> Member:
        """Run ``tests.chaos.preloaded.<role>`` in a process with this environment; its words go to ``log_path``."""
        process = self._context.Process(target=begin, args=(role, dict(environment), str(log_path)))
        process.start()
        return Member(role, process, log_path)

    def start_with_clock(self, role: str, environment: Mapping[str, str], log_path: Path, ahead_s: float) -> Member:
        """The same, of a process that is started, not forked, on a host whose clock is off by so much."""
        context = multiprocessing.get_context("spawn")
        process = context.Process(target=strange_clock.begin, args=(ahead_s, role, dict(environment), str(log_path)))
        process.start()
        return Member(role, process, log_path)

    def stop(self) -> None:
        _forkserver._stop()  # nothing public ends it before the interpreter does


def begin(role: str, environment: dict[str, str], log_path: str) -> None:
    """In the new process: become it."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    threading.Thread(target=_follow_parent, name="orphanage", daemon=True).start()
    sys.exit(getattr(importlib.import_module(PRELOADED[0]), role)())


def _follow_parent() -> None:
    """A run that is killed leaves nothing behind."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
