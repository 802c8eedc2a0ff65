"""How a farm on one machine finds its own API, and what it says of its parts."""

import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

import pytest

from producer.api.server import listen
from producer.cli.running_farm import RunningFarm, with_own_address
from producer.jobs.errors import PortTaken, SettingsError
from producer.jobs.local import Ended, Processes
from producer.jobs.settings import Settings
from tests.waiting import until


class RecordedProcesses(Processes):
    """Processes that are noted instead of started."""

    def __init__(self, logs_dir: Path) -> None:
        super().__init__(logs_dir / "registry.json", logs_dir)
        self.started: list[tuple[str, dict[str, str]]] = []
        self.graces_s: list[float] = []
        self.ended: list[Ended] = []
        self.again: list[str] = []

    def start_again(self, name: str) -> int:
        self.again.append(name)
        return 1

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
        self.graces_s.append(grace_s)
        return 1

    def running(self) -> list[str]:
        return [name for name, _ in self.started]

    def poll(self) -> list[Ended]:
        ended, self.ended = self.ended, []
        return ended


def test_what_the_supervisor_says_of_its_workers_is_passed_on_once_and_line_by_line(tmp_path: Path) -> None:
    processes, said = RecordedProcesses(tmp_path), list[str]()
    farm = RunningFarm(Settings(), processes, said.append)
    farm.look_after()
    farm.start_workers(2)
    farm.look_after()
    told = "worker-0 was ended by SIGKILL: starts again in 1 s"
    line = f"2026-01-01 10:00:00,123 ERROR supervisor: {told}\n"
    log = processes.log_path("workers")
    log.write_text(f"worker-1: 2026-01-01 10:00:00,100 ERROR worker: 春\nworker-1: {line}{line}{line[:40]}")
    farm.look_after()
    farm.look_after()
    assert said == [told]
    with log.open("a") as more:
        more.write(line[40:])
    farm.look_after()
    assert said == [told, told]


def test_the_supervisor_has_longer_to_end_than_it_gives_its_workers(tmp_path: Path) -> None:
    processes = RecordedProcesses(tmp_path)
    settings = Settings(grace_s=600)
    RunningFarm(settings, processes, print).start_workers(2)
    assert processes.graces_s == [pytest.approx(settings.kill_after_s + 5)]


@pytest.mark.parametrize("name", ["workers", "api"])
def test_a_part_that_a_person_must_help_ends_the_farm_with_its_log(tmp_path: Path, name: str) -> None:
    processes = RecordedProcesses(tmp_path)
    processes.ended = [Ended(name, 2, "what it said last")]
    with pytest.raises(SettingsError, match="what it said last"):
        RunningFarm(Settings(), processes, print).look_after()


@pytest.mark.parametrize(
    ("name", "returncode", "how"),
    [
        ("redis", -9, "was ended by SIGKILL"),
        ("api", 3, "ended with exit code 3 (its last words)"),
        ("workers", 0, "ended with exit code 0 (its last words)"),
    ],
)
def test_every_other_part_that_ends_is_told_and_started_again(
    tmp_path: Path, name: str, returncode: int, how: str
) -> None:
    processes, said = RecordedProcesses(tmp_path), list[str]()
    farm = RunningFarm(Settings(), processes, said.append)
    processes.ended = [Ended(name, returncode, "before\nits last words")]
    farm.look_after()
    assert said == [f"{name} {how}: starts again in 1 s"]
    until(lambda: farm.look_after() or processes.again)
    farm.look_after()
    assert processes.again == [name]


def test_a_farm_has_its_own_address_though_another_is_set_and_its_children_too(tmp_path: Path) -> None:
    own = with_own_address(Settings(api_url="http://elsewhere:1", api_port=0))
    assert own.api_port
    assert own.base_url == f"http://127.0.0.1:{own.api_port}"
    processes = RecordedProcesses(tmp_path)
    RunningFarm(own, processes, print).start_api()
    [(_, environment)] = processes.started
    assert (environment["OVIS_API_URL"], environment["OVIS_API_PORT"]) == ("", str(own.api_port))


def test_a_farm_whose_port_is_taken_does_not_start() -> None:
    with closing(listen("127.0.0.1", 0)) as first, pytest.raises(PortTaken, match="OVIS_API_PORT"):
        with_own_address(Settings(api_port=first.getsockname()[1]))
