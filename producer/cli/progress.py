"""Shows how a batch goes on: a bar with images a second and the time left; plain lines where there is no terminal."""

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from producer.client import Batch

LINE_EVERY_S = 5.0


def how_to_resume(paused: Batch) -> str:
    """What is said to whoever waits for a batch of which nothing begins."""
    return f"is paused, and nothing more of it begins until: ovis-batch resume {paused.id}"


class RateColumn(ProgressColumn):
    """Images a second since the first look."""

    def render(self, task: Task) -> Text:
        rate = task.fields["rate"]
        return Text(f"{rate:.1f} images/s" if rate else "–.– images/s")


class BatchProgress:
    """A context that is told of every new state of one batch."""

    def __init__(self, console: Console, name: str, total: int) -> None:
        self._console = console
        self._name = name
        self._began = self._said = time.monotonic()
        self._paused = False  # at the last look
        self._before: int | None = None  # finished at the first look: nobody saw how fast
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            RateColumn(),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(name, total=total, rate=0.0)

    def __enter__(self) -> Callable[[Batch], None]:
        self._bar.start()
        return self._show

    def __exit__(self, *_error: object) -> None:
        self._bar.stop()

    def _show(self, batch: Batch) -> None:
        if self._before is None:
            self._before = batch.finished
        if batch.paused and not self._paused and not batch.done:
            self._console.print(f"{self._name}: {how_to_resume(batch)}", highlight=False, markup=False)
        self._paused = batch.paused
        now = time.monotonic()
        rate = (batch.finished - self._before) / max(now - self._began, 1e-9)
        self._bar.update(self._task, completed=batch.finished, rate=rate)
        if self._console.is_terminal or (now - self._said < LINE_EVERY_S and not batch.done):
            return
        self._said = now
        speed = f", {rate:.1f} images/s" if rate else ""
        left = f", {(batch.jobs - batch.finished) / rate:.0f} s left" if rate and not batch.done else ""
        self._console.print(f"{self._name}: {batch.finished} of {batch.jobs}{speed}{left}", highlight=False)
