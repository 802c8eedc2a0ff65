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

from producer.api.server import listen
from producer.cli import jobs
from producer.cli.download import download_batch
from producer.client import Client
from producer.jobs import schema
from producer.jobs.errors import AlreadyRunning, SettingsError
from producer.jobs.local import LocalFarm, local_servers
from producer.jobs.settings import Settings, load_settings
from producer.manifest import ManifestKind, accept, read

CATALOGUE = Path(__file__).parent / "catalogue" / "banners.csv"
NAME = "{sku}_{width}x{height}"
START_S = 120.0
WORKER = "worker-"
RESTART_PAUSE_S = 1.0
EXIT_CANNOT_START = 2
"""What a role ends with when its settings are wrong: starting it again would not help."""
console = Console(highlight=False, soft_wrap=True)


def up(
    workers: Annotated[int, typer.Option(min=0, help="Worker processes to start.")] = 1,
) -> None:
    """Run a whole farm on this machine until Ctrl-C: servers, API with dispatcher and page, workers."""
    with (
        contextlib.suppress(KeyboardInterrupt),  # how it is meant to end
        _stopping_on_signals(),
        running_farm(load_settings(), workers) as farm,
    ):
        _say_where(farm.settings)
        console.print("Ctrl-C stops it; what was submitted is kept, and drawn at the next start.")
        while True:
            farm.look_after()
            time.sleep(0.5)


def demo(
    to: Annotated[Path, typer.Option(help="The folder to fill.")] = Path("demo-output"),
) -> int:
    """Draw the shipped catalogue of banners on a farm of this machine, and download it."""
    with _stopping_on_signals():
        try:
            with running_farm(load_settings(), workers=1) as farm:
                return _draw_catalogue(farm.settings, to, farm.look_after)
        except AlreadyRunning as running:
            console.print(f"{running}: the demo uses that farm", markup=False)
        return _draw_catalogue(load_settings(), to, lambda: None)


def _draw_catalogue(settings: Settings, to: Path, look_after: Callable[[], None]) -> int:
    _say_where(settings)
    rows: list[dict[str, object]] = []
    with CATALOGUE.open(encoding="utf-8", newline="") as file:
        accept(
            read(file, ManifestKind.CSV, name_template=NAME),
            keep=lambda row: rows.append(row.model_dump(mode="json", exclude_defaults=True)),
        )
    with Client(settings.base_url) as client:
        batch = client.submit_batch("demo catalogue", rows)
        console.print(f"submitted {batch.jobs} banners from {CATALOGUE.name} as batch {batch.id}", markup=False)
        batch = jobs.wait_for_batch(client, batch, on_poll=look_after)
        download_batch(client, batch.id, to)
    console.print(jobs.downloaded(batch.counts["succeeded"], batch.jobs, to), markup=False)
    return jobs.exit_code(batch)


class RunningFarm:
    """The API and the workers beside the servers of one machine."""

    def __init__(self, local: LocalFarm) -> None:
        self.settings = local.settings
        self._processes = local.processes
        self._environment = {
            "OVIS_MODEL": self.settings.model or "tiny",
            "OVIS_DATA_DIR": str(self.settings.data_dir.resolve()),
        }

    def start_api(self) -> None:
        self._processes.start("api", [sys.executable, "-m", "producer.cli", "api"], self._environment)

    def start_worker(self, name: str) -> None:
        grace_s = 2 * self.settings.durations.grace_s + 5
        self._processes.start(name, [sys.executable, "-m", "worker.app"], self._environment, grace_s=grace_s)

    def look_after(self) -> None:
        """Start a worker again that ended. Raises: SettingsError, when it never can, or another part ended."""
        for ended in self._processes.poll():
            if not ended.name.startswith(WORKER) or ended.returncode == EXIT_CANNOT_START:
                raise SettingsError(
                    f"{ended.name} ended with exit code {ended.returncode}; the end of its log:\n{ended.log_tail}"
                )
            console.print(f"{ended.name} ended with exit code {ended.returncode}: starting it again", markup=False)
            time.sleep(RESTART_PAUSE_S)
            self.start_worker(ended.name)

    def wait_for(self, ready: Callable[[], bool], what: str) -> None:
        """Ask until the answer is yes. Raises: SettingsError, when a part cannot start or the time is over."""
        deadline = time.monotonic() + START_S
        while not ready():
            self.look_after()
            if time.monotonic() > deadline:
                raise SettingsError(f"{what} was not ready after {START_S:.0f} s")
            time.sleep(0.1)


@contextlib.contextmanager
def running_farm(settings: Settings, workers: int) -> Iterator[RunningFarm]:
    """Servers, schema, API and workers, until the block is left; then the workers stop first and the servers last.

    Raises:
        AlreadyRunning: a farm runs in this data folder.
        PortTaken: another program listens where the API should.
        SettingsError: a part does not start; the message holds the end of its log.
    """
    console.print("starting Redis, Postgres and S3 …")
    with local_servers(settings) as local:
        listen(settings.api_host, settings.api_port).close()
        schema.upgrade(local.settings.require("database_url"))
        farm = RunningFarm(local)
        console.print("starting the API with its dispatcher, and the workers …")
        farm.start_api()
        for number in range(workers):
            farm.start_worker(f"{WORKER}{number}")
        farm.wait_for(lambda: _ready(settings), "the API")
        with Client(settings.base_url) as client:
            farm.wait_for(lambda: sum(worker.live for worker in client.farm().workers) >= workers, "a worker")
        yield farm


def _ready(settings: Settings) -> bool:
    try:
        return httpx.get(f"{settings.base_url}/readyz").is_success
    except httpx.TransportError:
        return False


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
