"""``ovis-batch submit`` against the real API, stopped by Ctrl-C: it says what became of the submission."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from producer.client import Client
from producer.jobs.settings import Settings
from tests.cut_connections import cutting
from tests.farm import serving

LIMIT_S = 120
SIZE = ("--width", "64", "--height", "64")


@pytest.fixture
def farm(settings: Settings) -> Iterator[Client]:
    with serving(settings) as url, Client(url) as client:
        yield client


def submitting(url: str, *words: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        (sys.executable, "-m", "producer.cli", "submit", *words),
        env=os.environ | {"OVIS_API_URL": url},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("kind", ["job", "batch"])
def test_ctrl_c_while_the_answer_is_on_its_way_tells_the_key_that_submits_it_no_second_time(
    farm: Client, tmp_path: Path, kind: str
) -> None:
    manifest = tmp_path / "boats.csv"
    manifest.write_text("prompt\na boat\n")
    words = (*SIZE, "a boat") if kind == "job" else (*SIZE, "--file", str(manifest))

    def interrupt() -> None:
        process.send_signal(signal.SIGINT)
        process.wait(LIMIT_S)

    with cutting(farm.base_url, cuts=1, before_cut=interrupt) as proxy:
        process = submitting(proxy.url, *words)
        _, told = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130, told
    assert farm.farm().counts["queued"] == 1
    key = re.findall(r"it may be submitted: .* --key (\S+) ", told)
    again = submitting(farm.base_url, *words, "--key", *key)
    assert "submitted" in again.communicate(timeout=LIMIT_S)[0]
    assert (again.returncode, farm.farm().counts["queued"]) == (0, 1)


def test_ctrl_c_while_rows_are_read_says_that_nothing_was_submitted(farm: Client, tmp_path: Path) -> None:
    manifest = tmp_path / "endless.csv"
    os.mkfifo(manifest)
    process = submitting(farm.base_url, "--file", str(manifest))
    with manifest.open("w") as rows:  # waits until the command has opened it too
        rows.write("prompt\na boat\n")
        rows.flush()
        process.send_signal(signal.SIGINT)
    # Ending the rows wakes the command where the signal came a moment before it began to wait for more of them.
    _, told = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, told.strip()) == (130, "nothing was submitted")
    assert farm.farm().counts["queued"] == 0


def test_an_empty_key_is_refused_and_not_replaced(farm: Client) -> None:
    process = submitting(farm.base_url, "a boat", "--key", "")
    _, told = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 2
    assert "Idempotency-Key: must be 1 to 255 visible ASCII characters" in told
    assert farm.farm().counts["queued"] == 0
