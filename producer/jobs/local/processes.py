"""The processes that one supervisor runs on this machine, and the file that tells a later one about them.

Each runs in a session of its own, so that Ctrl-C in the terminal reaches the supervisor alone, which then stops
them in the reverse of the order in which they were started.

Invariants: a process is written to the registry before it runs its command, so a supervisor killed at any
instruction leaves none that its successor does not know; a process is only ever signalled while both its pid and
its time of creation are the recorded ones, so a recycled pid is never touched; what is left of a process group
ends with its leader.
"""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from producer.jobs.errors import SettingsError
from producer.jobs.local.folder import read_json, write_private
from producer.jobs.settings import OWNER_VARIABLE

GRACE_S = 10.0
POLL_S = 0.02
TAIL_LINES = 20
# psutil derives a process's creation from the boot time, which moves by as much as the clock is corrected.
CLOCK_STEP_S = 2.0
# Waits for a line before it becomes the command; ends if the supervisor dies before having sent it.
GATE = 'read -r go && exec "$@" </dev/null'


@dataclass(frozen=True)
class Record:
    """What a later supervisor must know to stop a process."""

    name: str
    pid: int
    created_s: float
    stop_signal: int
    grace_s: float


@dataclass(frozen=True)
class Ended:
    """A process that ended without having been told to."""

    name: str
    returncode: int
    log_tail: str


class Processes:
    """Starts, watches and stops processes; not for use from several threads at once.

    Args:
        registry: where the running processes are recorded.
        logs_dir: an existing folder; each process writes to ``NAME.log`` there, the run before to
            ``NAME.previous.log``.
    """

    def __init__(self, registry: Path, logs_dir: Path) -> None:
        self._registry = registry
        self._logs_dir = logs_dir
        self._running: dict[str, tuple[Record, subprocess.Popen[bytes]]] = {}
        self._starts: dict[str, Callable[[], int]] = {}  # as they were first started, in that order

    def start(
        self,
        name: str,
        command: Sequence[str | Path],
        env: Mapping[str, str] | None = None,
        *,
        stop_signal: int = signal.SIGTERM,
        grace_s: float = GRACE_S,
    ) -> int:
        """Runs a command under a name that no running process has, and returns its pid.

        Its environment is this process's, with ``env`` on top. A command that cannot be run shows as ended in
        ``poll``, with the reason in its log. When stopped it gets ``stop_signal``, and SIGKILL after ``grace_s``.
        """
        if name in self._running:
            raise ValueError(f"a process {name} already runs")
        child = self._spawn(name, command, env or {})
        record = Record(name, child.pid, psutil.Process(child.pid).create_time(), stop_signal, grace_s)
        self._running[name] = (record, child)
        self._starts.setdefault(name, lambda: self.start(name, command, env, stop_signal=stop_signal, grace_s=grace_s))
        self._write_registry()
        self._open_gate(child)
        return child.pid

    def start_again(self, name: str) -> int:
        """Runs a process that has ended as it was run before, and returns its pid."""
        return self._starts[name]()

    def _spawn(self, name: str, command: Sequence[str | Path], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        with self._fresh_log(name).open("wb") as log:
            return subprocess.Popen(
                ["/bin/sh", "-c", GATE, name, *map(str, command)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | env | {OWNER_VARIABLE: str(self._registry.absolute())},
                start_new_session=True,
            )

    def _fresh_log(self, name: str) -> Path:
        path = self.log_path(name)
        with contextlib.suppress(FileNotFoundError):
            path.replace(path.with_name(f"{name}.previous.log"))
        return path

    @staticmethod
    def _open_gate(child: subprocess.Popen[bytes]) -> None:
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError), child.stdin:
            child.stdin.write(b"go\n")

    def log_path(self, name: str) -> Path:
        return self._logs_dir / f"{name}.log"

    def log_tail(self, name: str) -> str:
        """The last lines that a process wrote, or an empty string."""
        try:
            lines = self.log_path(name).read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return ""
        return "\n".join(lines[-TAIL_LINES:])

    def running(self) -> list[str]:
        """The names of the processes in the order they were first started, ended ones included until ``poll`` tells."""
        return [name for name in self._starts if name in self._running]

    def poll(self) -> list[Ended]:
        """The processes that ended since the last call; what was left of their groups is killed."""
        ended = []
        for name, (record, child) in list(self._running.items()):
            returncode = child.poll()
            if returncode is not None:
                _kill_group(record.pid)
                del self._running[name]
                ended.append(Ended(name, returncode, self.log_tail(name)))
        if ended:
            self._forget()
        return ended

    def stop(self, name: str) -> None:
        """Stops one process and waits for its end; one that does not run is no error."""
        if name not in self._running:
            return
        record, child = self._running[name]
        if child.poll() is None:
            child.send_signal(record.stop_signal)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(record.grace_s)
        self._kill(name)

    def stop_all(self) -> None:
        """Stops every process, the last started first.

        An exception meanwhile (a second Ctrl-C) kills what still runs, and goes on.
        """
        try:
            for name in reversed(self.running()):
                self.stop(name)
        except BaseException:
            for name in reversed(self.running()):
                self._kill(name)
            raise

    def _kill(self, name: str) -> None:
        record, child = self._running[name]
        # At once after the leader's end, before its pid, the group's number, can come round again.
        _kill_group(record.pid)
        child.wait()
        del self._running[name]
        self._forget()

    def _forget(self) -> None:
        """Drops ended processes from the registry; a full disk keeps none from being stopped, for a record of one
        that is no more does no harm."""
        with contextlib.suppress(OSError):
            self._write_registry()

    def _write_registry(self) -> None:
        records = [asdict(record) for record, _ in self._running.values()]
        write_private(self._registry, json.dumps(records, indent=1))

    def stop_leftovers(self) -> list[str]:
        """Stops what a killed supervisor left, the last started first, and returns the names of what still ran.

        Only for the holder of the folder's lock.
        """
        stopped = [record.name for record in reversed(self._recorded()) if _stop_leftover(record, self._registry)]
        self._registry.unlink(missing_ok=True)
        return stopped

    def _recorded(self) -> list[Record]:
        content = read_json(self._registry)
        try:
            return [Record(**record) for record in content or []]
        except TypeError as error:
            raise SettingsError(f"{self._registry} cannot be read ({error}): remove it and start again") from error


def _stop_leftover(record: Record, registry: Path) -> bool:
    process = _identified(record)
    if process is not None:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(record.stop_signal)
        if not wait_gone(process, record.grace_s):
            _kill_group(record.pid)
            wait_gone(process, GRACE_S)
    orphans = list(_orphans(record, registry))
    for orphan in orphans:
        with contextlib.suppress(psutil.NoSuchProcess):
            orphan.kill()
    return process is not None or bool(orphans)


def _identified(record: Record) -> psutil.Process | None:
    """The recorded process itself, if it still runs."""
    try:
        process = psutil.Process(record.pid)
        same = abs(process.create_time() - record.created_s) < CLOCK_STEP_S
        return process if same and not _is_gone(process) else None
    except psutil.NoSuchProcess:
        return None


def _orphans(record: Record, registry: Path) -> Iterator[psutil.Process]:
    """What is left of the session of a recorded process that is gone itself.

    A number alone could be another's by now, so each must also carry this folder's mark in its environment.
    """
    if psutil.pid_exists(record.pid) and not _is_gone(psutil.Process(record.pid)):
        return
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getsid(process.pid) == record.pid and _owner(process) == str(registry.absolute()):
                yield process


def _owner(process: psutil.Process) -> str | None:
    return process.environ().get(OWNER_VARIABLE)


def wait_gone(process: psutil.Process, timeout_s: float) -> bool:
    """Waits until a process that is nobody's child here has ended; False if it had not in time."""
    deadline = time.monotonic() + timeout_s
    while not _is_gone(process):
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


def _is_gone(process: psutil.Process) -> bool:
    """True once a process has ended, even if nobody has waited for it yet."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _kill_group(pid: int) -> None:
    # macOS answers EPERM where only unreaped members are left.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
