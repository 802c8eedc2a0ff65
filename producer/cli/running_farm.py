"""The API and the workers beside the servers of one machine: started in order, looked after, stopped in order.

Everything here speaks to this farm's own API, whatever other farm OVIS_API_URL leads to.
"""

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import httpx

from producer.api.server import listen
from producer.client import Client
from producer.jobs import schema
from producer.jobs.errors import SettingsError
from producer.jobs.local import Processes, local_servers
from producer.jobs.settings import Settings

START_S = 120.0
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
        """Say which workers ended and start again. Raises: SettingsError, when a part of the farm ended for good."""
        for line in self._new_lines():
            if told := SUPERVISOR.fullmatch(line):
                self._say(told[1])
        if ended := self._processes.poll():
            name, code, log = ended[0].name, ended[0].returncode, ended[0].log_tail
            raise SettingsError(f"{name} ended with exit code {code}; the end of its log:\n{log}")

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
