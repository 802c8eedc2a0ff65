import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from pipeline.request import ImageFormat
from producer.cli.running_farm import RunningFarm
from producer.jobs.contract import Submission
from producer.jobs.local import Processes
from producer.jobs.settings import Settings
from producer.jobs.storage import Storage, object_key
from producer.jobs.store import Store
from tests.farm import Farmhand, environment, free_port
from tests.waiting import until


def test_a_dispatcher_of_its_own_publishes_sweeps_tells_prometheus_and_ends_in_order(
    settings: Settings, store: Store, storage: Storage
) -> None:
    cancelled = store.submit(Submission(prompt="a"), max_failures=3)
    farmhand = Farmhand(settings)
    lost = farmhand.claim(cancelled)
    storage.put(object_key(None, lost.job_id, lost.claim, ImageFormat.PNG), b"left behind", "image/png")
    store.cancel(cancelled.id)
    farmhand.close()
    port = free_port()
    dispatcher = subprocess.Popen(
        [sys.executable, "-m", "producer.cli", "dispatcher"],
        env=environment(settings) | {"OVIS_METRICS_PORT": str(port)},
    )
    try:
        store.submit(Submission(prompt="a"), max_failures=3)
        until(lambda: sum(store.window(lease_s=60).published.values()) == 1)
        until(lambda: list(storage.pages("")) == [])
        numbers = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    finally:
        dispatcher.send_signal(signal.SIGTERM)
        assert dispatcher.wait(30) == 0
    assert "ovis_dispatcher_leads 1.0" in numbers
    assert "ovis_dispatcher_published_total 1.0" in numbers
    assert "ovis_swept_objects_total 1.0" in numbers


def test_a_farm_says_which_of_its_workers_ended_and_that_it_starts_again(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment(settings).items():
        monkeypatch.setenv(name, value)
    processes, said = Processes(tmp_path / "registry.json", tmp_path), list[str]()
    farm = RunningFarm(settings, processes, said.append)

    def heard() -> list[str]:
        farm.look_after()
        return said

    try:
        supervisor = psutil.Process(farm.start_workers(1))
        until(supervisor.children)
        [killed] = supervisor.children()
        killed.kill()
        until(heard)
        assert said == ["worker-0 was ended by SIGKILL: starts again in 1 s"]
        until(lambda: supervisor.children() not in ([], [killed]))
    finally:
        processes.stop_all()


def test_workers_without_the_gpu_that_was_asked_for_end_at_once_and_say_so(settings: Settings) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "producer.cli", "workers", "--device", "cuda"],
        env=environment(settings) | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 2
    assert re.fullmatch("ovis-batch workers: .* no GPU.*\n", ended.stderr)
