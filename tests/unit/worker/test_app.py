"""How a worker process that cannot start ends."""

import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from producer.jobs.errors import PortTaken, SettingsError, Unavailable
from producer.jobs.settings import Settings
from worker import app

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (SettingsError("set it"), 2, "set it"),
        (Unavailable("S3", "503 on HeadBucket"), 3, "check OVIS_S3_ENDPOINT_URL"),
    ],
)
def test_a_worker_that_cannot_start_ends_with_the_exit_code_of_its_reason(
    error: Exception, code: int, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(settings: Settings) -> int:
        raise error

    monkeypatch.setattr(app, "run", fail)
    assert app.main([]) == code
    assert told in capsys.readouterr().err


def test_a_taken_port_of_the_metrics_is_told_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(settings: Settings) -> app.Drawer:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(app.schema, "check", lambda url: None)
    bucket = SimpleNamespace(ensure_bucket=lambda: None, close=lambda: None)
    with socket.create_server(("127.0.0.1", 0)) as first:
        port = first.getsockname()[1]
        settings = Settings.model_validate({"database_url": "postgresql://nowhere/db", "metrics_port": port})
        with pytest.raises(PortTaken, match="OVIS_METRICS_PORT"):
            app.run(settings, load, lambda _: bucket)  # type: ignore[arg-type, return-value]


HANGING_LOAD = """
import sys, time
from types import SimpleNamespace
from producer.jobs.settings import Settings
from worker import app
app.schema.check = lambda url: None
app.LOAD_LIMIT_S = 0.4
bucket = SimpleNamespace(ensure_bucket=lambda: None, close=lambda: None)
app.run(Settings(database_url="postgresql://nowhere/db"), lambda settings: time.sleep(600), lambda settings: bucket)
"""


def test_a_device_that_hangs_while_the_model_is_loaded_ends_the_process_with_a_traceback() -> None:
    command = [sys.executable, "-c", HANGING_LOAD]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1
    assert "Timeout (0:00:00" in ended.stderr
