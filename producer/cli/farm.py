"""A whole farm on one machine: ``up`` keeps it running, ``demo`` draws the shipped catalogue with it."""

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import httpx
import typer
from rich.console import Console

from producer.cli import jobs
from producer.cli.download import download_batch
from producer.client import Client
from producer.jobs import schema
from producer.jobs.errors import AlreadyRunning, SettingsError
from producer.jobs.local import Ended, LocalFarm, Processes, local_servers
from producer.jobs.settings import Settings, load_settings
from producer.manifest import ManifestKind, accept, read

CATALOGUE = Path(__file__).parent / "catalogue" / "banners.csv"
NAME = "{sku}_{width}x{height}"
START_S = 120.0
console = Console(highlight=False, soft_wrap=True)


def up(
    workers: Annotated[int, typer.Option(min=0, help="Worker processes to start.")] = 1,
) -> None:
    """Run a whole farm on this machine until Ctrl-C: servers, API with dispatcher and page, workers."""
    settings = load_settings()
    with _stopping_on_signals(), running_farm(settings, workers) as farm:
        _say_where(farm.settings)
        console.print("Ctrl-C stops it; what was submitted is kept, and drawn at the next start.")
        while not (ended := farm.processes.poll()):
            time.sleep(0.5)
    raise _ended_early(ended[0])


def demo(
    to: Annotated[Path, typer.Option(help="The folder to fill.")] = Path("demo-output"),
) -> int:
    """Draw the shipped catalogue of banners on a farm of this machine, and download it."""
    settings = load_settings()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_stopping_on_signals())
        try:
            farm = stack.enter_context(running_farm(settings, workers=1))
            settings, processes = farm.settings, farm.processes
        except AlreadyRunning as running:
            console.print(f"{running}: the demo uses that farm", markup=False)
            settings, processes = load_settings(), None
        _say_where(settings)
        return _draw_catalogue(Client(settings.base_url), to, processes)


def _draw_catalogue(client: Client, to: Path, processes: Processes | None) -> int:
    with CATALOGUE.open(encoding="utf-8", newline="") as file:
        rows: list[dict[str, object]] = []
        accept(
            read(file, ManifestKind.CSV, name_template=NAME),
            keep=lambda row: rows.append(row.model_dump(mode="json", exclude_defaults=True)),
        )
    batch = client.submit_batch("demo catalogue", rows)
    console.print(f"submitted {batch.jobs} banners from {CATALOGUE.name} as batch {batch.id}", markup=False)
    batch = jobs.wait_for_batch(client, batch, on_poll=lambda: _check(processes))
    download_batch(client, batch.id, to)
    console.print(jobs.downloaded(batch.counts["succeeded"], batch.jobs, to), markup=False)
    return jobs.exit_code(batch)


def _check(processes: Processes | None) -> None:
    if processes and (ended := processes.poll()):
        raise _ended_early(ended[0])


@contextlib.contextmanager
def running_farm(settings: Settings, workers: int) -> Iterator[LocalFarm]:
    """Servers, schema, API and workers, until the block is left; then the workers stop first and the servers last.

    Raises:
        AlreadyRunning: a farm runs in this data folder.
        SettingsError: a part does not start; the message holds the end of its log.
    """
    console.print("starting Redis, Postgres and S3 …")
    with local_servers(settings) as farm:
        schema.upgrade(farm.settings.require("database_url"))
        environment = {"OVIS_MODEL": settings.model or "tiny", "OVIS_DATA_DIR": str(settings.data_dir.resolve())}
        console.print("starting the API with its dispatcher …")
        farm.processes.start("api", [sys.executable, "-m", "producer.cli", "api"], environment)
        for number in range(workers):
            console.print("starting a worker …")
            command = [sys.executable, "-m", "worker.app"]
            grace_s = 2 * settings.durations.grace_s + 5
            farm.processes.start(f"worker-{number}", command, environment, grace_s=grace_s)
        _await(lambda: _ready(settings), farm.processes, "the API")
        with Client(settings.base_url) as client:
            _await(lambda: sum(w.live for w in client.farm().workers) >= workers, farm.processes, "a worker")
        yield farm


def _ready(settings: Settings) -> bool:
    try:
        return httpx.get(f"{settings.base_url}/readyz").is_success
    except httpx.TransportError:
        return False


def _await(ready: Callable[[], bool], processes: Processes, what: str) -> None:
    """Ask until the answer is yes. Raises: SettingsError, when a process ends meanwhile or the time is over."""
    deadline = time.monotonic() + START_S
    while not ready():
        _check(processes)
        if time.monotonic() > deadline:
            raise SettingsError(f"{what} was not ready after {START_S:.0f} s")
        time.sleep(0.1)


def _ended_early(ended: Ended) -> SettingsError:
    return SettingsError(f"{ended.name} ended with exit code {ended.returncode}; the end of its log:\n{ended.log_tail}")


def _say_where(settings: Settings) -> None:
    console.print(f"page  {settings.base_url}/\nAPI   {settings.base_url}/docs", markup=False)


@contextlib.contextmanager
def _stopping_on_signals() -> Iterator[None]:
    """SIGTERM ends the farm as Ctrl-C does; a second signal while it stops changes nothing."""

    def interrupt(*_: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


COMMANDS = (up, demo)
