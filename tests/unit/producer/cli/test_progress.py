"""What is said of a batch while it is waited for."""

import io
from collections.abc import Sequence
from itertools import zip_longest
from uuid import UUID

import pytest
from rich.console import Console

from producer.cli import progress
from producer.cli.progress import BatchProgress
from producer.client import Batch


def batch(finished: int, jobs: int = 100, *, paused: bool = False) -> Batch:
    return Batch.model_construct(id=UUID(int=7), jobs=jobs, finished=finished, done=finished == jobs, paused=paused)


def said(
    monkeypatch: pytest.MonkeyPatch, looks: list[tuple[float, int]], paused: Sequence[bool] = (), *, bar: bool = False
) -> list[str]:
    """The lines where there is no terminal, of looks at (seconds since the start, images that are finished)."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    file = io.StringIO()
    with BatchProgress(Console(file=file, width=200, force_terminal=bar), "boats", 100) as show:
        for (seconds, finished), rests in zip_longest(looks, paused, fillvalue=False):
            now[0] = seconds
            show(batch(finished, paused=rests))
    return file.getvalue().splitlines()


def test_a_batch_that_had_ended_before_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert said(monkeypatch, [(0.01, 100)]) == ["boats: 100 of 100"]


def test_the_speed_is_of_what_was_drawn_while_somebody_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert said(monkeypatch, [(0.01, 50), (10, 70), (20, 100)]) == [
        "boats: 70 of 100, 2.0 images/s, 15 s left",
        "boats: 100 of 100, 2.5 images/s",
    ]


@pytest.mark.parametrize("bar", [False, True], ids=["lines", "terminal"])
def test_a_batch_that_is_paused_says_so_each_time_and_how_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, bar: bool
) -> None:
    looks = [(0.1, 50), (0.2, 50), (0.3, 50), (0.4, 51), (0.5, 51), (0.6, 100)]
    lines = "\n".join(said(monkeypatch, looks, [True, True, False, True, True, True], bar=bar))
    told = f"boats: is paused, and nothing more of it begins until: ovis-batch resume {UUID(int=7)}"
    assert lines.count(told) == 2
