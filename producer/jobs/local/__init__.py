"""A private Redis, Postgres and S3 for one machine: the embedded default of whatever the settings do not name.

    with local_servers(settings) as farm:
        farm.processes.start("api", [sys.executable, "-m", ...])
        farm.settings.require("database_url")

Real servers from packages, on ports of the loopback that stay the same from start to start, with data and
credentials in ``settings.data_dir``. This package creates the database ``ovis``, and no table or bucket in
anything; it knows nothing of jobs.

folder.py     the data folder: its lock, credentials and ports
processes.py  what runs, what a killed supervisor left
servers.py    the three servers
s3.py         the S3 server's own process
"""

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import SecretStr

from producer.jobs.errors import SettingsError
from producer.jobs.local.folder import DataFolder, Secrets, read_json, write_private
from producer.jobs.local.processes import Ended, Processes
from producer.jobs.local.servers import PostgresServer, RedisServer, S3Server, Server
from producer.jobs.settings import Settings

__all__ = ["Ended", "LocalFarm", "Processes", "local_servers"]

# Generous, since one that ends is seen at once: replaying a long append-only file or log takes its time.
START_S = 180.0
ASK_S = 0.02
PROCESSES_FILE = "processes.json"


@dataclass(frozen=True)
class LocalFarm:
    """The running servers' settings, and the processes beside which more may be started."""

    settings: Settings
    processes: Processes


@contextlib.contextmanager
def local_servers(settings: Settings) -> Iterator[LocalFarm]:
    """Runs each server that the settings name none of one's own for, until the block is left.

    All processes started meanwhile are stopped at the end, the servers last. What an earlier supervisor left
    when it was killed is stopped before anything starts. ``services.json`` is there exactly while all servers
    answer. SIGTERM must be turned into an exception by the caller, as Python does with Ctrl-C, or nothing is
    stopped before the next start.

    Raises:
        AlreadyRunning: another process does this in the same data folder.
        SettingsError: the folder cannot be written, a server is not installed, or one does not start; the message
            holds the last lines of its log.
    """
    folder = DataFolder(settings.data_dir)
    with folder.held():
        processes = Processes(folder.path / PROCESSES_FILE, folder.subfolder("logs"))
        processes.stop_leftovers()
        settings = _without_leftovers(settings)
        settings.services_path.unlink(missing_ok=True)
        try:
            services = _start(_servers(settings, folder), processes)
            write_private(settings.services_path, json.dumps(services, indent=1))
            yield LocalFarm(settings.with_services(services), processes)
        finally:
            try:
                processes.stop_all()
            finally:
                settings.services_path.unlink(missing_ok=True)


def _without_leftovers(settings: Settings) -> Settings:
    """The settings without the addresses that they took from the ``services.json`` of a killed supervisor."""
    left: dict[str, Any] = read_json(settings.services_path) or {}
    taken = [name for name, value in left.items() if _plain(getattr(settings, name, None)) == value]
    return settings.model_copy(update=dict.fromkeys(taken))


def _plain(value: object) -> object:
    return value.get_secret_value() if isinstance(value, SecretStr) else value


def _servers(settings: Settings, folder: DataFolder) -> list[Server]:
    """The servers to start; Postgres last, so that the others come up while its first start makes the cluster."""
    wanted = {"redis": settings.redis_url, "s3": settings.s3_endpoint_url, "postgres": settings.database_url}
    names = [name for name, own in wanted.items() if own is None]
    if not names:
        return []
    ports = folder.ports(names)
    kept = folder.secrets()
    return [_server(name, settings, folder, ports[name], kept) for name in names]


def _server(name: str, settings: Settings, folder: DataFolder, port: int, kept: Secrets) -> Server:
    data = folder.subfolder(name)
    if name == "redis":
        return RedisServer(data, port, kept.redis_password)
    if name == "postgres":
        return PostgresServer(data, port, kept.postgres_password)
    # Keys of one's own without a server of one's own become the embedded server's: every process has the same pair.
    key_id = str(_plain(settings.s3_access_key_id) or kept.s3_access_key_id)
    secret = str(_plain(settings.s3_secret_access_key) or kept.s3_secret_access_key)
    return S3Server(data, port, key_id, secret, settings.s3_region)


def _start(servers: Sequence[Server], processes: Processes) -> dict[str, str]:
    """Starts the servers side by side and returns the settings that lead to them once all are ready."""
    deadline = time.monotonic() + START_S
    for server in servers:
        server.prepare()
        processes.start(server.name, server.command(), server.environment(), stop_signal=server.stop_signal)
    for server in servers:
        _await(server, processes, deadline)
    return {name: value for server in servers for name, value in server.services().items()}


def _await(server: Server, processes: Processes, deadline: float) -> None:
    while (missing := server.question()) is not None:
        for ended in processes.poll():
            raise _not_started(ended.name, f"ended with exit code {ended.returncode}", processes)
        if time.monotonic() > deadline:
            raise _not_started(server.name, f"was not ready after {START_S:.0f} s ({missing})", processes)
        time.sleep(ASK_S)


def _not_started(name: str, problem: str, processes: Processes) -> SettingsError:
    return SettingsError(
        f"the embedded {name} {problem}; the end of its log, {processes.log_path(name)}:\n{processes.log_tail(name)}"
    )
