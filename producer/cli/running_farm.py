"""The API and the workers beside the servers of one machine: started in order, looked after, stopped in order.

Everything here speaks to this farm's own API and Postgres, whatever other farm OVIS_API_URL leads to.
"""

import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import httpx

from producer.api.server import listen
from producer.jobs import schema
from producer.jobs.errors import SettingsError
from producer.jobs.local import Ended, Processes, local_servers
from producer.jobs.restarts import Restarts
from producer.jobs.settings import Settings
from producer.jobs.store import Store

START_S = 120.0
EXIT_SETTINGS = 2
"""What a part ends with when a person must change something first: starting it again would not help."""
WORKERS = "workers"
SUPERVISOR = re.compile(r"[\d-]+ [\d:,]+ ERROR supervisor: (.+)")
"""A line of the workers' log in which their supervisor says that one has ended, how, and when it starts again."""


class RunningFarm:
    """The API and the workers beside the servers of one machine; ``say`` prints a line for a person."""

    def __init__(self, settings: Settings, processes: Processes, say: Callable[[str], None]) -> None:
        self.settings = settings
        self._processes = processes
        self._say = say
        self._log_read_bytes = 0
        self._restarts = Restarts()
        self._environment = {
            "OVIS_MODEL": settings.model or "tiny",
            "OVIS_DATA_DIR": str(settings.data_dir.resolve()),
            "OVIS_API_PORT": str(settings.api_port),
            "OVIS_API_URL": "",
        }

    def start_api(self) -> None:
        self._processes.start("api", [sys.executable, "-m", "producer.cli", "api"], self._environment)

    def start_workers(self, count: int) -> int:
        """Start so many, under a supervisor of their own; returns its pid."""
        grace_s = self.settings.kill_after_s + 5  # in which the supervisor itself has killed its workers
        command = [sys.executable, "-m", "worker", "--count", str(count)]
        return self._processes.start(WORKERS, command, self._environment, grace_s=grace_s)

    def look_after(self) -> None:
        """Say which workers ended and start again, and start again whatever else ended: servers, API, supervisor.

        Raises: SettingsError, when a part says that a person must change something first.
        """
        for line in self._new_lines():
            if told := SUPERVISOR.fullmatch(line):
                self._say(told[1])
        for ended in self._processes.poll():
            self._expect(ended)
        for name in self._restarts.due():
            self._processes.start_again(name)
            self._restarts.started(name)

    def _expect(self, ended: Ended) -> None:
        if ended.returncode == EXIT_SETTINGS:
            raise SettingsError(f"{ended.name} cannot run; the end of its log:\n{ended.log_tail}")
        if ended.name == WORKERS:
            self._log_read_bytes = 0  # the next one writes a new log
        pause_s = self._restarts.ended(ended.name)
        self._say(f"{ended.name} {_how(ended)}: starts again in {pause_s:.0f} s")

    def _new_lines(self) -> list[str]:
        """The whole lines that were written to the workers' log since the last call."""
        path = self._processes.log_path(WORKERS)
        if WORKERS not in self._processes.running() or not path.exists():
            return []
        with path.open("rb") as log:
            log.seek(self._log_read_bytes)
            new = log.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._log_read_bytes += len(whole)
        return whole.decode(errors="replace").splitlines()

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
        if workers:
            farm.start_workers(workers)
        farm.wait_for(lambda: _ready(own), "the API")
        with closing(Store.at(own.require("database_url"), connections=1)) as store:  # no key is needed for this
            farm.wait_for(lambda: store.window(lease_s=own.durations.lease_s).workers >= workers, "a worker")
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
