"""How a farm on one machine finds its own API, and when it starts a worker again."""

import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

import pytest

from producer.api.server import listen
from producer.cli.running_farm import Restarts, RunningFarm, with_own_address
from producer.jobs.errors import PortTaken, SettingsError
from producer.jobs.local import Ended, Processes
from producer.jobs.settings import Settings


class Clock:
    """Time that goes on by hand."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class RecordedProcesses(Processes):
    """Processes that are noted instead of started."""

    def __init__(self) -> None:
        self.started: list[tuple[str, dict[str, str]]] = []
        self.ended: list[Ended] = []

    def start(
        self,
        name: str,
        command: Sequence[str | Path],
        env: Mapping[str, str] | None = None,
        *,
        stop_signal: int = 15,
        grace_s: float = 10,
    ) -> int:
        assert command[0] == sys.executable
        self.started.append((name, dict(env or {})))
        return 1

    def poll(self) -> list[Ended]:
        ended, self.ended = self.ended, []
        return ended


def test_a_worker_that_ends_at_once_is_started_later_each_time() -> None:
    clock = Clock()
    restarts = Restarts(clock)
    pauses = []
    for _ in range(7):
        restarts.started("worker-0")
        pauses.append(restarts.ended("worker-0"))
        assert restarts.due() == []
        clock.now_s += pauses[-1]
        assert restarts.due() == ["worker-0"]
    assert pauses == [1, 2, 4, 8, 16, 30, 30]


def test_a_worker_that_lived_a_while_is_started_soon_again() -> None:
    clock = Clock()
    restarts = Restarts(clock)
    for _ in range(4):
        restarts.started("worker-0")
        restarts.ended("worker-0")
    restarts.started("worker-0")
    clock.now_s += 60
    assert restarts.ended("worker-0") == 1


def test_a_worker_is_due_until_it_is_started() -> None:
    clock = Clock()
    restarts = Restarts(clock)
    restarts.ended("worker-0")
    clock.now_s += 1
    assert restarts.due() == ["worker-0"]
    restarts.started("worker-0")
    assert restarts.due() == []


@pytest.mark.parametrize(
    ("returncode", "how"),
    [
        (3, "ended with exit code 3 (Redis: away)"),
        (75, "ended with exit code 75 (Redis: away)"),
        (-9, "was ended by SIGKILL"),
    ],
)
def test_a_worker_that_ended_with_a_server_away_or_by_a_signal_does_not_end_the_farm(returncode: int, how: str) -> None:
    processes, said = RecordedProcesses(), list[str]()
    farm = RunningFarm(Settings(), processes, said.append)
    processes.ended = [Ended("worker-0", returncode, "first\nRedis: away")]
    farm.look_after()
    assert said == [f"worker-0 {how}: starts again in 1 s"]


@pytest.mark.parametrize(("name", "returncode"), [("worker-0", 2), ("api", 3), ("redis", 0)])
def test_a_part_that_can_never_start_again_ends_the_farm_with_its_log(name: str, returncode: int) -> None:
    processes = RecordedProcesses()
    processes.ended = [Ended(name, returncode, "what it said last")]
    with pytest.raises(SettingsError, match="what it said last"):
        RunningFarm(Settings(), processes, print).look_after()


def test_a_farm_has_its_own_address_though_another_is_set_and_its_children_too() -> None:
    own = with_own_address(Settings(api_url="http://elsewhere:1", api_port=0))
    assert own.api_port
    assert own.base_url == f"http://127.0.0.1:{own.api_port}"
    processes = RecordedProcesses()
    RunningFarm(own, processes, print).start_api()
    [(_, environment)] = processes.started
    assert (environment["OVIS_API_URL"], environment["OVIS_API_PORT"]) == ("", str(own.api_port))


def test_a_farm_whose_port_is_taken_does_not_start() -> None:
    with closing(listen("127.0.0.1", 0)) as first, pytest.raises(PortTaken, match="OVIS_API_PORT"):
        with_own_address(Settings(api_port=first.getsockname()[1]))
