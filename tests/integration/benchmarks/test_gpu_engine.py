"""``gpu_engine.py`` from end to end, small and on the CPU: every row is measured by the lines that measure on a GPU.

Nothing is compiled: that takes minutes on a CPU.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import Fatal
from tests.benchmarks import gpu_engine
from tests.benchmarks.gpu_engine import Row, main, rows
from tests.benchmarks.gpu_measures import Facts, measure_ceiling
from tests.benchmarks.gpu_scene import SMALL_SCENE, Bench

SMALL = ("--small", "--no-compile", "--device", "cpu")


# From inside torch's own import of its compiler.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """So small an operation takes longer with two, and far longer if somebody else wants the second core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _written(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    facts, *written = map(json.loads, (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines())
    return facts, written


def test_every_row_is_measured_and_written_and_all_contestants_draw_the_same(tmp_path: Path) -> None:
    assert main([*SMALL, "--out", str(tmp_path)]) == 0
    facts, written = _written(tmp_path)
    assert facts["torch"] == torch.__version__
    names = [row.name.replace(" compiled", " not compiled") for row in rows(SMALL_SCENE)]
    assert [row["row"] for row in written] == names
    assert {row["status"] for row in written} == {"done"}
    assert all(row["seconds_an_image"] > 0 for row in written if "first_round_s" in row)
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert all(row["row"] in table for row in written)
    assert "engine compiled" not in table
    _check_parity({row["row"]: row for row in written})


def _check_parity(by_name: dict[str, dict[str, Any]]) -> None:
    """Uncompiled and on a CPU the packed forward is upstream's to the bit, or nearly; fp8's is not."""
    errors = {key: said for key, said in by_name["parity after a few steps"].items() if "signal to error" in key}
    assert len(errors) == 3
    assert all(_decibels(said) > 35 for said in errors.values()), errors
    assert 10 < _decibels(by_name["parity of fp8"]["signal to error"]) < 60


def _decibels(said: str) -> float:
    return float("inf") if said == "equal to the bit" else float(said.removesuffix(" dB"))


def test_a_row_that_fails_is_written_with_its_reason_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(bench: Bench) -> Facts:
        raise RuntimeError("no kernel for\nthis device")

    some = [Row("one", 1.0, fail), Row("two", 1.0, measure_ceiling)]
    monkeypatch.setattr(gpu_engine, "rows", lambda scene: some)
    assert main([*SMALL, "--out", str(tmp_path)]) == 1
    failed, done = _written(tmp_path)[1]
    assert (failed["status"], failed["reason"]) == ("failed", "RuntimeError: no kernel for this device")
    assert done["bf16_tflop_per_s"] > 0
    assert "no kernel for this device" in (tmp_path / "table.md").read_text(encoding="utf-8")


def test_a_dead_device_ends_the_run_and_what_was_not_measured_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(bench: Bench) -> Facts:
        raise Fatal("the device is dead: CUDA error: unspecified launch failure")

    monkeypatch.setattr(gpu_engine, "rows", lambda scene: [Row("one", 1.0, die), Row("two", 1.0, measure_ceiling)])
    assert main([*SMALL, "--out", str(tmp_path)]) == 1
    failed, skipped = _written(tmp_path)[1]
    assert (failed["status"], skipped["status"], skipped["reason"]) == ("failed", "skipped", "the device is dead")


def test_a_row_that_would_end_too_late_is_skipped_and_said_so(tmp_path: Path) -> None:
    assert main([*SMALL, "--minutes", "0.05", "--out", str(tmp_path)]) == 0
    written = _written(tmp_path)[1]
    assert {row["status"] for row in written} == {"skipped"}
    assert "3 s are the limit" in written[0]["reason"]
