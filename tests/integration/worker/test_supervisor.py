"""A real supervisor over real processes: scripts of one purpose each, and at the end the product's own worker."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from producer.jobs.settings import Settings
from producer.jobs.store import Store
from tests.farm import environment, free_port
from tests.waiting import until
from worker.stopping import ECHO_S

ROOT = Path(__file__).parents[3]
SUPERVISE = """
import logging, sys
from worker import supervisor
voice = supervisor.Voice()
logging.basicConfig(level="INFO", format="%(levelname)s %(name)s: %(message)s", stream=voice)
places = [supervisor.Place(f"worker-{n}", [], {"NUMBER": str(n)}) for n in range(int(sys.argv[2]))]
command = [sys.executable, "-c", sys.argv[1]]
sys.exit(supervisor.Supervisor(places, voice, kill_after_s=float(sys.argv[3]), command=command).run())
"""
OBEDIENT = """
import os, signal, time
from worker.supervisor import end_with_supervisor
def drain(*_):
    print("drained", flush=True)
    os._exit(0)
signal.signal(signal.SIGTERM, drain)
end_with_supervisor(0)
print("at work", os.getpid(), flush=True)
while True: time.sleep(60)
"""
DEAF = OBEDIENT.replace('print("drained", flush=True)\n    os._exit(0)', 'print("will not", flush=True)')
ENDS_AT_ONCE = "import sys; print('Redis: away'); sys.exit(3)"
WRONG_SETTINGS_IF_FIRST = (
    "import os\nif os.environ['NUMBER'] == '0': print('no such GPU'); raise SystemExit(2)\n" + OBEDIENT
)
WRONG_SETTINGS = "print('no such model'); raise SystemExit(2)"
FLOOD = "import os\nfor n in range(20000): print('x' * 80)\n" + OBEDIENT


class Supervised:
    """A supervisor as a process of its own, and what it and its workers say."""

    def __init__(self, command: list[str], env: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in lines:
                self.lines.append(line.rstrip())

    def said(self, pattern: str) -> list[str]:
        return [line for line in self.lines if re.search(pattern, line)]

    def at_work(self) -> list[psutil.Process]:
        """The workers that run and have said that they are at work."""
        pids = [int(line.split()[-1]) for line in self.said("at work")]
        return [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]

    def wait(self) -> int:
        returncode = self.process.wait(30)
        self._reader.join(30)
        return returncode

    def end(self) -> None:
        if self.process.poll() is None:
            for worker in psutil.Process(self.process.pid).children():
                worker.kill()
            self.process.kill()
        self.wait()


Start = Callable[..., Supervised]


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[Supervised] = []

    def supervise(script: str, *, workers: int = 1, kill_after_s: float = 20) -> Supervised:
        started.append(Supervised([sys.executable, "-c", SUPERVISE, script, str(workers), str(kill_after_s)]))
        return started[-1]

    yield supervise
    for supervised in started:
        supervised.end()


def test_a_killed_worker_is_started_again_and_its_neighbour_left_alone(start: Start) -> None:
    supervised = start(OBEDIENT, workers=2)
    until(lambda: len(supervised.said("at work")) == 2)
    first, second = (next(p for p in supervised.at_work() if p.environ()["NUMBER"] == n) for n in "01")
    os.kill(first.pid, signal.SIGKILL)
    until(lambda: len(supervised.said("^worker-0: at work")) == 2)
    assert supervised.said("ERROR supervisor: worker-0 was ended by SIGKILL: starts again in 1 s")
    assert second.is_running()
    assert len(supervised.said("^worker-1: at work")) == 1


def test_a_worker_that_ends_at_once_is_started_later_each_time_and_it_is_said_why(start: Start) -> None:
    supervised = start(ENDS_AT_ONCE)
    until(lambda: len(supervised.said("starts again")) == 3)
    told = [re.sub(r".*supervisor: ", "", line) for line in supervised.said("starts again")]
    assert told == [f"worker-0 ended with exit code 3 (Redis: away): starts again in {s} s" for s in (1, 2, 4)]
    supervised.process.terminate()  # in the middle of a pause
    assert supervised.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_reaches_every_worker_and_is_waited_for(start: Start, number: signal.Signals) -> None:
    supervised = start(OBEDIENT, workers=3)
    until(lambda: len(supervised.said("at work")) == 3)
    supervised.process.send_signal(number)
    assert supervised.wait() == 0
    assert sorted(supervised.said("drained")) == [f"worker-{n}: drained" for n in range(3)]


def test_a_terminals_ctrl_c_which_everyone_gets_twice_drains_once(start: Start) -> None:
    supervised = start(OBEDIENT)
    until(lambda: supervised.said("at work"))
    os.killpg(supervised.process.pid, signal.SIGINT)
    os.killpg(supervised.process.pid, signal.SIGINT)
    assert supervised.wait() == 0
    assert supervised.said("drained")
    assert not supervised.said("KeyboardInterrupt")


def test_a_worker_that_does_not_end_is_killed_after_its_time(start: Start) -> None:
    supervised = start(DEAF, kill_after_s=1)
    until(lambda: supervised.said("at work"))
    supervised.process.terminate()
    assert supervised.wait() == 75
    assert supervised.said("worker-0: will not")
    assert supervised.said("worker-0 has not ended: killed")


def test_a_second_ctrl_c_kills_at_once(start: Start) -> None:
    supervised = start(DEAF, kill_after_s=1000)
    until(lambda: supervised.said("at work"))
    [worker] = supervised.at_work()
    supervised.process.send_signal(signal.SIGINT)
    until(lambda: supervised.said("will not"))
    time.sleep(ECHO_S + 0.5)
    supervised.process.send_signal(signal.SIGINT)
    assert supervised.wait() == 75
    assert not worker.is_running()


def test_a_worker_whose_settings_are_wrong_is_given_up_and_the_others_go_on(start: Start) -> None:
    supervised = start(WRONG_SETTINGS_IF_FIRST, workers=2)
    until(lambda: supervised.said("given up") and supervised.said("at work"))
    assert len(supervised.said("starts again")) == 2, "what is away for a moment looks alike"
    assert supervised.said(r"worker-0 ended with exit code 2 \(no such GPU\): given up")
    supervised.process.terminate()
    assert supervised.wait() == 0


def test_if_no_worker_can_ever_run_the_supervisor_ends_with_2(start: Start) -> None:
    supervised = start(WRONG_SETTINGS, workers=2)
    assert supervised.wait() == 2
    assert sorted(supervised.said("given up"))[0].endswith("worker-0 ended with exit code 2 (no such model): given up")


def test_workers_whose_supervisor_was_killed_drain_by_themselves(start: Start) -> None:
    supervised = start(OBEDIENT, workers=2)
    until(lambda: len(supervised.said("at work")) == 2)
    workers = supervised.at_work()
    supervised.process.kill()
    gone, alive = psutil.wait_procs(workers, timeout=20)
    assert (len(gone), alive) == (2, [])


def test_a_worker_that_says_much_is_neither_held_up_nor_cut_short(start: Start) -> None:
    supervised = start(FLOOD)
    until(lambda: supervised.said("at work"))
    assert len(supervised.said("^worker-0: x{80}$")) == 20000


def test_a_supervisor_whose_words_nobody_reads_still_starts_workers_again_and_stops_them() -> None:
    command = [sys.executable, "-c", SUPERVISE, FLOOD, "2", "20"]
    supervisor = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
    try:
        until(lambda: len(asleep(supervisor)) == 2)  # their floods are over
        first = asleep(supervisor)
        first[0].kill()
        until(lambda: len(asleep(supervisor)) == 2 and asleep(supervisor) != first)
        supervisor.terminate()
        assert supervisor.wait(20) == 0
    finally:
        supervisor.kill()
        supervisor.communicate()


def asleep(supervisor: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    """The workers that have come as far as to wait for their supervisor's end."""
    workers = psutil.Process(supervisor.pid).children()
    return [worker for worker in workers if worker.status() == psutil.STATUS_SLEEPING and worker.num_threads() == 2]


def supervise(settings: Settings, *options: str, **changes: str) -> Supervised:
    env = environment(settings) | {"OVIS_MODEL": "tiny"} | changes
    return Supervised([sys.executable, "-m", "worker", *options], env)


def live(store: Store) -> dict[int, str]:
    """The device of each live worker, by its pid."""
    return {worker.pid: worker.device for worker in store.farm(lease_s=60).workers if worker.live}


def test_real_workers_tell_their_metrics_apart_and_drain_when_their_supervisor_is_killed(
    settings: Settings, store: Store
) -> None:
    port = free_port()
    supervised = supervise(settings, "--device", "cpu", "--count", "2", OVIS_METRICS_PORT=str(port))
    try:
        until(lambda: len(live(store)) == 2, timeout_s=180)  # two imports of torch
        assert [httpx.get(f"http://127.0.0.1:{port + n}/metrics").status_code for n in range(2)] == [200, 200]
        until(lambda: len(supervised.said("takes jobs")) == 2)
        time.sleep(1)  # it says so a moment before it can be told to stop
        workers = [psutil.Process(pid) for pid in live(store)]
        supervised.process.kill()
        _, alive = psutil.wait_procs(workers, timeout=30)
        assert (len(workers), alive) == (2, [])
        assert not live(store), "they did not say farewell"
    finally:
        supervised.end()


def test_wrong_settings_end_the_supervisor_with_what_is_wrong(settings: Settings) -> None:
    supervised = supervise(settings, OVIS_UPLOAD_SLOTS="many")
    assert supervised.wait() == 2
    assert "OVIS_UPLOAD_SLOTS" in supervised.lines[-1]


@pytest.mark.parametrize(("options", "told"), [(("--count", "0"), "--count"), (("--device", "cuda"), "no GPU")])
def test_a_place_that_cannot_be_is_told(settings: Settings, options: tuple[str, ...], told: str) -> None:
    supervised = supervise(settings, *options, CUDA_VISIBLE_DEVICES="")
    assert supervised.wait() == 2
    assert told in supervised.lines[-1]
