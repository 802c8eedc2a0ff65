"""The API and the workers beside the servers of one machine: started in order, looked after, stopped in order.

Everything here speaks to this farm's own API, whatever other farm OVIS_API_URL leads to.
"""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import httpx

from producer.api.server import listen
from producer.client import Client
from producer.jobs import schema
from producer.jobs.errors import SettingsError
from producer.jobs.local import Ended, Processes, local_servers
from producer.jobs.settings import Settings

START_S = 120.0
WORKER = "worker-"
EXIT_CANNOT_START = 2
"""What a role ends with when its settings are wrong: starting it again would not help."""
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0
LIVED_S = 60.0
"""A worker that ran for this long is started again as if it had never ended before."""


class Restarts:
    """When each worker that ended is started again: soon, and later each time that it ends at once."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started: dict[str, float] = {}
        self._pauses: dict[str, float] = {}
        self._due: dict[str, float] = {}

    def started(self, name: str) -> None:
        """Note that the worker runs from now on."""
        self._started[name] = self._clock()
        self._due.pop(name, None)

    def ended(self, name: str) -> float:
        """Note that the worker has ended; returns the seconds until it is due."""
        now = self._clock()
        quick = now - self._started.get(name, now) < LIVED_S
        before = self._pauses.get(name) if quick else None
        pause_s = FIRST_PAUSE_S if before is None else min(2 * before, LONGEST_PAUSE_S)
        self._pauses[name] = pause_s
        self._due[name] = now + pause_s
        return pause_s

    def due(self) -> list[str]:
        """The workers whose pause is over."""
        return [name for name, at in self._due.items() if at <= self._clock()]


class RunningFarm:
    """The API and the workers beside the servers of one machine; ``say`` prints a line for a person."""

    def __init__(self, settings: Settings, processes: Processes, say: Callable[[str], None]) -> None:
        self.settings = settings
        self._processes = processes
        self._say = say
        self._restarts = Restarts()
        self._environment = {
            "OVIS_MODEL": settings.model or "tiny",
            "OVIS_DATA_DIR": str(settings.data_dir.resolve()),
            "OVIS_API_PORT": str(settings.api_port),
            "OVIS_API_URL": "",
        }

    def start_api(self) -> None:
        self._processes.start("api", [sys.executable, "-m", "producer.cli", "api"], self._environment)

    def start_worker(self, name: str) -> None:
        grace_s = 2 * self.settings.durations.grace_s + 5
        self._processes.start(name, [sys.executable, "-m", "worker.app"], self._environment, grace_s=grace_s)
        self._restarts.started(name)

    def look_after(self) -> None:
        """Start workers again that ended. Raises: SettingsError, when one never can, or another part ended."""
        for ended in self._processes.poll():
            self._expect(ended)
        for name in self._restarts.due():
            self.start_worker(name)

    def _expect(self, ended: Ended) -> None:
        if not ended.name.startswith(WORKER) or ended.returncode == EXIT_CANNOT_START:
            raise SettingsError(
                f"{ended.name} ended with exit code {ended.returncode}; the end of its log:\n{ended.log_tail}"
            )
        pause_s = self._restarts.ended(ended.name)
        self._say(f"{ended.name} {_how(ended)}: starts again in {pause_s:.0f} s")

    def wait_for(self, ready: Callable[[], bool], what: str) -> None:
        """Ask until the answer is yes. Raises: SettingsError, when a part cannot start or the time is over."""
        deadline = time.monotonic() + START_S
        while not ready():
            self.look_after()
            if time.monotonic() > deadline:
                raise SettingsError(f"{what} was not ready after {START_S:.0f} s")
            time.sleep(0.1)


def _how(ended: Ended) -> str:
    """How a process ended; its log's last line is a cause only if it ended by itself."""
    if ended.returncode < 0:
        return f"was ended by {signal.Signals(-ended.returncode).name}"
    last = (ended.log_tail.splitlines() or ["its log is empty"])[-1]
    return f"ended with exit code {ended.returncode} ({last})"


@contextmanager
def running_farm(settings: Settings, workers: int, say: Callable[[str], None]) -> Iterator[RunningFarm]:
    """Servers, schema, API and workers, until the block is left; then the workers stop first and the servers last.

    Raises:
        AlreadyRunning: a farm runs in this data folder.
        PortTaken: another program listens where the API should.
        SettingsError: a part does not start; the message holds the end of its log.
    """
    say("starting Redis, Postgres and S3 …")
    with local_servers(settings) as local:
        own = with_own_address(local.settings)
        schema.upgrade(own.require("database_url"))
        farm = RunningFarm(own, local.processes, say)
        say("starting the API with its dispatcher, and the workers …")
        farm.start_api()
        for number in range(workers):
            farm.start_worker(f"{WORKER}{number}")
        farm.wait_for(lambda: _ready(own), "the API")
        with Client(own.base_url) as client:
            farm.wait_for(lambda: sum(worker.live for worker in client.farm().workers) >= workers, "a worker")
        yield farm


def with_own_address(settings: Settings) -> Settings:
    """These settings, leading to the API that is to be started by them: its port is chosen now if it is 0.

    Raises: PortTaken, SettingsError: the API could not listen there.
    """
    with closing(listen(settings.api_host, settings.api_port)) as listener:
        return settings.model_copy(update={"api_url": None, "api_port": listener.getsockname()[1]})


def _ready(settings: Settings) -> bool:
    try:
        return httpx.get(f"{settings.base_url}/readyz").is_success
    except httpx.TransportError:
        return False
