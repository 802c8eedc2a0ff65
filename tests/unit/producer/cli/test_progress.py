"""What is said of a batch while it is waited for."""

import io

import pytest
from rich.console import Console

from producer.cli import progress
from producer.cli.progress import BatchProgress
from producer.client import Batch


def batch(finished: int, jobs: int = 100) -> Batch:
    return Batch.model_construct(jobs=jobs, finished=finished, done=finished == jobs)


def said(monkeypatch: pytest.MonkeyPatch, looks: list[tuple[float, int]]) -> list[str]:
    """The lines where there is no terminal, of looks at (seconds since the start, images that are finished)."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    file = io.StringIO()
    with BatchProgress(Console(file=file, width=200), "boats", 100) as show:
        for seconds, finished in looks:
            now[0] = seconds
            show(batch(finished))
    return file.getvalue().splitlines()


def test_a_batch_that_had_ended_before_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert said(monkeypatch, [(0.01, 100)]) == ["boats: 100 of 100"]


def test_the_speed_is_of_what_was_drawn_while_somebody_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert said(monkeypatch, [(0.01, 50), (10, 70), (20, 100)]) == [
        "boats: 70 of 100, 2.0 images/s, 15 s left",
        "boats: 100 of 100, 2.5 images/s",
    ]
