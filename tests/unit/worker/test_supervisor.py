"""Which workers a machine gets. Nothing is started."""

import pytest

from producer.jobs.errors import SettingsError
from producer.jobs.settings import Settings
from worker import supervisor
from worker.stopping import LAST_ACTS_S
from worker.supervisor import places


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "COUNT_GPUS", "print(2)")


def options(settings: Settings, *devices: str, count: int | None = None) -> list[list[str]]:
    return [list(place.options)[1:] for place in places(settings, devices, count)]


@pytest.mark.usefixtures("two_gpus")
def test_every_gpu_has_a_worker_unless_devices_are_named() -> None:
    both = [["--device", "cuda:0"], ["--device", "cuda:1"]]
    assert options(Settings()) == options(Settings(device="cuda")) == options(Settings(), "cuda") == both
    assert options(Settings(), count=3) == [*both, both[0]]
    assert options(Settings(device="cuda:1")) == [["--device", "cuda:1"]]
    assert options(Settings(device="cuda:1"), "cpu", "cuda:0") == [["--device", "cpu"], ["--device", "cuda:0"]]
    assert options(Settings(), "cpu", count=2) == [["--device", "cpu"]] * 2


def test_a_worker_alone_finds_its_device_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "COUNT_GPUS", "raise SystemExit('nobody should ask')")
    assert options(Settings(), count=1) == [[]]


def test_without_a_gpu_there_is_one_worker_on_the_cpu_unless_a_gpu_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervisor, "COUNT_GPUS", "print(0)")
    assert options(Settings()) == [["--device", "cpu"]]
    assert options(Settings(), count=2) == [["--device", "cpu"]] * 2
    with pytest.raises(SettingsError, match="no GPU"):
        options(Settings(device="cuda"))


def test_gpus_that_cannot_be_counted_are_told_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "COUNT_GPUS", "import no_torch_here")
    with pytest.raises(SettingsError, match="No module named 'no_torch_here'"):
        places(Settings(), [], None)


@pytest.mark.parametrize(("first", "ports"), [(9100, ["9100", "9101"]), (0, ["0", "0"]), (None, [None, None])])
def test_every_worker_has_a_port_of_its_own_for_its_metrics(first: int | None, ports: list[str | None]) -> None:
    found = places(Settings(metrics_port=first), ["cpu", "cpu"], None)
    assert [place.environment.get("OVIS_METRICS_PORT") for place in found] == ports


def test_more_ports_than_there_are_is_told() -> None:
    with pytest.raises(SettingsError, match="OVIS_METRICS_PORT"):
        places(Settings(metrics_port=65535), ["cpu", "cpu"], None)


def test_a_stop_has_its_times_in_order_and_a_supervisor_waits_for_the_deadlines_last_acts() -> None:
    for settings in (Settings(), Settings(grace_s=600), Settings(time_scale=0.01)):
        assert settings.stop_grace_s + settings.give_back_s < settings.deadline_s
        assert settings.deadline_s + LAST_ACTS_S < settings.kill_after_s
