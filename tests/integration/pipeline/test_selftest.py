"""What somebody with real weights runs first."""

import json
from pathlib import Path

import pytest

from pipeline import selftest
from pipeline.model import Model
from pipeline.request import ImageRequest

SMALL = (
    ImageRequest(prompt="A fox", width=72, height=64, steps=2, seed=1),
    ImageRequest(prompt="狐狸", width=64, height=64, steps=1, guidance=1, seed=2),
)


@pytest.fixture(autouse=True)
def _small_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest.compare, "__defaults__", (SMALL,))


def test_it_ends_with_0_when_both_draw_the_same(
    tiny: Model, models_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert selftest.main(["--model", "tiny", "--models-dir", str(models_dir)]) == 0
    printed = capsys.readouterr().out
    assert "72×64" in printed
    assert "2 of 2 images are what diffusers draws, to 40 dB" in printed


def test_it_prints_json_when_a_program_reads(tiny: Model, models_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert selftest.main(["--model", "tiny", "--models-dir", str(models_dir), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["revision"] == tiny.revision
    assert [image["passed"] for image in report["images"]] == [True, True]


def test_it_ends_with_1_when_the_engine_draws_something_else(
    tiny: Model, models_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = selftest._by_engine
    monkeypatch.setattr(selftest, "_by_engine", lambda *given: [255 - pixels for pixels in real(*given)])
    assert selftest.main(["--model", "tiny", "--models-dir", str(models_dir)]) == 1
    assert "below 40 dB" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--model", "no-such-name"], ["--model", "tiny", "--device", "foo"]])
def test_it_ends_with_2_and_says_why(
    arguments: list[str], models_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert selftest.main([*arguments, "--models-dir", str(models_dir)]) == 2
    assert "selftest: there is no" in capsys.readouterr().err
