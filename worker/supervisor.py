"""Keeps one worker process a device running: starts them, passes signals on, and starts again what ended.

It draws nothing and asks nobody, so that nothing but a signal ends it: no torch, no Postgres, no Redis. GPUs are
counted by a child process. What a worker writes is passed on line by line, behind its name.

Invariants: a worker that ends is started again after a pause, which grows while it ends soon each time; one that says
three times in a row that it cannot run before a person has changed something (exit code 2) is given up; no worker
outlives its supervisor by more than a worker's deadline, for its standard input ends with the supervisor, however that
one ended; nobody here waits for whoever reads what is written.
"""

import argparse
import contextlib
import itertools
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Empty, Full, Queue, SimpleQueue

from producer.jobs.errors import SettingsError
from producer.jobs.restarts import Restarts
from producer.jobs.settings import PORT_MAX, Settings, load_settings
from worker.stopping import ECHO_S, SIGNALS

log = logging.getLogger("supervisor")

EXIT_SETTINGS = 2
MOST_REFUSALS = 3
"""Starts in a row that end with exit code 2: a hub or a device's memory that is not there for a moment looks alike."""
EXIT_KILLED = 75
"""Workers had to be killed at the end; 75 is also what a worker ends with that is over its own deadline."""
LOOK_S = 0.1
MOST_LINES = 50_000
"""That wait for a reader of the error output; more are dropped."""
STDERR = 2
LAST_WORDS_S = 1.0
"""What a process that ended may have left in its pipe is read within this time."""
WORKER = (sys.executable, "-m", "worker.app")
COUNT_GPUS = "import torch; print(torch.cuda.device_count())"


@dataclass(frozen=True)
class Place:
    """A worker's name, and what is its own in its command line and environment."""

    name: str
    options: Sequence[str]
    environment: dict[str, str]


class Voice:
    """The error output as a file that is never waited for: while nobody reads it, lines are kept and then dropped."""

    def __init__(self) -> None:
        self._lines: Queue[str] = Queue(MOST_LINES)
        threading.Thread(target=self._speak, name="voice", daemon=True).start()

    def write(self, text: str) -> int:
        with contextlib.suppress(Full):
            self._lines.put_nowait(text)
        return len(text)

    def flush(self) -> None:
        """Nothing: see ``finish``."""

    def finish(self, timeout_s: float) -> None:
        """Wait until all is written, if somebody reads it."""
        over_at = time.monotonic() + timeout_s
        while self._lines.unfinished_tasks and time.monotonic() < over_at:
            time.sleep(0.01)

    def _speak(self) -> None:
        """By the file descriptor: ``sys.stderr`` has a lock, and a process that ends while it is held aborts."""
        while True:
            rest = self._lines.get().encode(errors="replace")
            with contextlib.suppress(OSError):
                while rest:
                    rest = rest[os.write(STDERR, rest) :]
            self._lines.task_done()


class Running:
    """The process that holds a place now, and a thread that passes on what it writes."""

    def __init__(self, place: Place, command: Sequence[str], voice: Voice) -> None:
        self.place = place
        self._voice = voice
        self.last_line = "it said nothing"
        with _interrupts_kept_back():
            self._process = subprocess.Popen(
                [*command, *place.options],
                env=os.environ | place.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
        self._reader = threading.Thread(target=self._pass_on, name=place.name, daemon=True)
        self._reader.start()

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    def reap(self) -> int:
        """Wait for its end and its last words; returns the exit code."""
        returncode = self._process.wait()
        self._reader.join(LAST_WORDS_S)
        if self._process.stdin:
            self._process.stdin.close()
        return returncode

    def _pass_on(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self.last_line = line.strip() or self.last_line
                self._voice.write(f"{self.place.name}: {line.rstrip()}\n")


class Supervisor:
    """The workers of one machine. ``run`` it in the main thread, which alone receives signals."""

    def __init__(
        self, places: Sequence[Place], voice: Voice, *, kill_after_s: float, command: Sequence[str] = WORKER
    ) -> None:
        self._voice = voice
        self._places = {place.name: place for place in places}
        self._running: dict[str, Running] = {}
        self._kill_after_s = kill_after_s
        self._command = command
        self._restarts = Restarts()
        self._refusals: Counter[str] = Counter()
        self._signals: SimpleQueue[int] = SimpleQueue()

    def run(self) -> int:
        """Keep the workers running until SIGTERM, SIGINT or SIGHUP; returns the exit code."""
        try:
            with self._listening():
                return self._keep_running()
        finally:
            self._voice.finish(LAST_WORDS_S)

    def _keep_running(self) -> int:
        for name in self._places:
            self._start(name)
        while not self._told_to_stop():
            for running in [running for running in self._running.values() if running.ended]:
                self._expect(running)
            if not self._places:
                log.critical("no worker is left")
                return EXIT_SETTINGS
            for name in self._restarts.due():
                self._start(name)
        return self._stop()

    def _start(self, name: str) -> None:
        self._restarts.started(name)
        try:
            self._running[name] = Running(self._places[name], self._command, self._voice)
        except OSError as error:  # no memory, or too many processes: for now
            log.error("%s cannot be started (%s): tried again in %.0f s", name, error, self._restarts.ended(name))

    def _expect(self, running: Running) -> None:
        """Note the end of a worker that nobody here had told to end."""
        name, returncode = running.place.name, running.reap()
        del self._running[name]
        self._refusals[name] = self._refusals[name] + 1 if returncode == EXIT_SETTINGS else 0
        if self._refusals[name] == MOST_REFUSALS:
            del self._places[name]
            log.error("%s %s: given up", name, _how(running, returncode))
        else:
            pause_s = self._restarts.ended(name)
            log.error("%s %s: starts again in %.0f s", name, _how(running, returncode), pause_s)

    def _stop(self) -> int:
        """Pass the signal on, and wait; a second one, or the end of the time, kills."""
        for running in self._running.values():
            running.terminate()
        told_at = time.monotonic()
        log.info("stopping: the workers have %.0f s", self._kill_after_s)
        while self._left() and time.monotonic() - told_at < self._kill_after_s:
            if self._told_to_stop() and time.monotonic() - told_at > ECHO_S:
                break
        left = self._left()
        for running in left:
            running.kill()
            log.critical("%s has not ended: killed", running.place.name)
        for running in self._running.values():
            running.reap()
        return EXIT_KILLED if left else 0

    def _left(self) -> list[Running]:
        return [running for running in self._running.values() if not running.ended]

    def _told_to_stop(self) -> bool:
        """Whether a signal comes within a moment."""
        try:
            self._signals.get(timeout=LOOK_S)
        except Empty:
            return False
        return True

    @contextmanager
    def _listening(self) -> Iterator[None]:
        def note(number: int, _frame: object) -> None:
            self._signals.put(number)  # the one queue that a signal's handler may use

        before = {number: signal.signal(number, note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def _interrupts_kept_back() -> Iterator[None]:
    """A process that is started here never sees SIGINT: a terminal gives Ctrl-C to all, and we alone pass it on."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _how(running: Running, returncode: int) -> str:
    """How a process ended; what it said last is a cause only if it ended by itself."""
    if returncode < 0:
        return f"was ended by {signal.Signals(-returncode).name}"
    return f"ended with exit code {returncode} ({running.last_line})"


def end_with_supervisor(stdin: int) -> None:
    """In a worker: drain as on SIGTERM once the supervisor is gone, which held the other end of ``stdin``."""

    def wait() -> None:
        while os.read(stdin, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="supervisor", daemon=True).start()


def places(settings: Settings, devices: Sequence[str], count: int | None) -> list[Place]:
    """A place for each worker: ``count`` of them, over all devices in turn; by default one a device.

    Raises:
        SettingsError: there is no GPU where one was asked for, or no port for the metrics of all.
    """
    wanted = list(devices) or [settings.device or ""]
    if count == 1 and wanted == [""]:
        found = [""]  # the worker finds its device itself: no need to import torch twice
    else:
        found = [device for name in wanted for device in ([name] if name not in {"", "cuda"} else _gpus(name))]
    chosen = list(itertools.islice(itertools.cycle(found), len(found) if count is None else count))
    port = settings.metrics_port
    if port and port + len(chosen) - 1 > PORT_MAX:
        raise SettingsError(
            f"OVIS_METRICS_PORT: {len(chosen)} workers need as many ports from {port} on: choose a lower one"
        )
    return [_place(number, device, port) for number, device in enumerate(chosen)]


def _place(number: int, device: str, port: int | None) -> Place:
    options = ["--supervised", *(["--device", device] if device else [])]
    environment = {} if port is None else {"OVIS_METRICS_PORT": str(port + number if port else 0)}
    return Place(f"worker-{number}", options, environment)


def _gpus(name: str) -> list[str]:
    """Every GPU that torch sees; the CPU where it sees none and none was asked for by ``name``."""
    counted = subprocess.run([sys.executable, "-c", COUNT_GPUS], capture_output=True, text=True, check=False)
    if counted.returncode:
        last = (counted.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise SettingsError(f"the GPUs cannot be counted ({last}): install ovis-batch[worker]")
    gpus = [f"cuda:{number}" for number in range(int(counted.stdout))]
    if not gpus and name:
        raise SettingsError("OVIS_DEVICE or --device is cuda, and torch sees no GPU: check the driver, or choose cpu")
    return gpus or ["cpu"]


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m worker [--device D ...] [--count N]``: exit code 0 after SIGTERM.

    2 if no worker can run before a person has changed something, 75 if workers had to be killed at the end.
    """
    parser = argparse.ArgumentParser(prog="python -m worker", description="One worker process a device, kept running.")
    parser.add_argument("--device", action="append", default=[], help="cpu, cuda (every GPU), cuda:1, …; repeatable")
    parser.add_argument("--count", type=int, help="workers, over the devices in turn; default: one a device")
    options = parser.parse_args(arguments)
    if options.count is not None and options.count < 1:
        parser.error("--count must be at least 1")
    try:
        settings = load_settings()
        voice = Voice()
        logging.basicConfig(
            level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=voice
        )
        chosen = places(settings, options.device, options.count)
        return Supervisor(chosen, voice, kill_after_s=settings.kill_after_s).run()
    except SettingsError as error:
        print(f"ovis-batch workers: {error}", file=sys.stderr)
        return EXIT_SETTINGS
