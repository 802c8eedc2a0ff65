"""A whole farm on one machine: ``up`` keeps it running, ``demo`` draws the shipped catalogue with it."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from producer.cli import jobs
from producer.cli.download import download
from producer.cli.folder import claim_folder
from producer.cli.results import downloaded
from producer.jobs.errors import AlreadyRunning
from producer.jobs.settings import Settings, load_settings

ECHO_S = 1.0
"""Terminal, make and shell may each pass the same Ctrl-C on."""
CATALOGUE = Path(__file__).parent / "catalogue" / "banners.csv"
NAME = "{sku}_{size}"
DEMO = "the demo"
"""Whose the folder is: each demo takes the place of the one before."""
console = Console(highlight=False, soft_wrap=True)


def up(
    workers: Annotated[int, typer.Option(min=0, help="Worker processes to start.")] = 1,
) -> None:
    """Run a whole farm on this machine until Ctrl-C: servers, API with dispatcher and page, workers."""
    from producer.cli.running_farm import running_farm

    with (
        contextlib.suppress(KeyboardInterrupt),  # how it is meant to end
        _stopping_on_signals(),
        running_farm(load_settings(), workers, _say) as farm,
    ):
        _say_where(farm.settings)
        _say("Ctrl-C stops it; what was submitted is kept, and drawn at the next start.")
        while True:
            farm.look_after()
            time.sleep(0.5)


def demo(
    to: Annotated[Path, typer.Option(help="The folder to fill.")] = Path("demo-output"),
) -> int:
    """Draw the shipped catalogue of banners on a farm of this machine, and download it."""
    from producer.cli.running_farm import running_farm

    claim_folder(to, DEMO)
    with _stopping_on_signals():
        try:
            with running_farm(load_settings(), 1, _say) as farm:
                return _draw_catalogue(farm.settings, to, farm.look_after)
        except AlreadyRunning as running:
            _say(f"{running}: the demo uses that farm")
        return _draw_catalogue(load_settings().model_copy(update={"api_url": None}), to, lambda: None)


def _draw_catalogue(settings: Settings, to: Path, look_after: Callable[[], None]) -> int:
    _say_where(settings)
    with jobs.client_of(settings) as client:
        batch = client.submit_manifest(CATALOGUE, name="demo catalogue", file_name=NAME)
        _say(f"submitted {batch.jobs} banners from {CATALOGUE.name} as batch {batch.id}")
        batch = jobs.wait_for_batch(client, batch, on_poll=look_after)
        done = download(client, batch, to)
    _say(downloaded(done, to))
    return jobs.exit_code(batch)


def _say(line: str) -> None:
    console.print(line, markup=False)


def _say_where(settings: Settings) -> None:
    _say(f"page  {settings.base_url}/\nAPI   {settings.base_url}/docs")


@contextlib.contextmanager
def _stopping_on_signals() -> Iterator[None]:
    """SIGTERM ends the farm as Ctrl-C does; a second signal, unless it is the first one's echo, ends it at once."""
    first_at: list[float] = []

    def interrupt(*_: object) -> None:
        if not first_at:
            _say("\nstopping: what is drawn now has some seconds to be finished; Ctrl-C again stops at once")
            first_at.append(time.monotonic())
        elif time.monotonic() - first_at[0] < ECHO_S:
            return
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


COMMANDS = (up, demo)
