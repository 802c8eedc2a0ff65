"""Redis, Postgres and S3 of the suite's own: real server processes that are killed with SIGKILL and started again.

They are the embedded servers of ``producer.jobs.local``, beside those of the other tests, which must not suffer.
"""

import itertools
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import redis
from psycopg import sql
from pydantic import SecretStr

from producer.jobs.local.folder import DataFolder
from producer.jobs.local.processes import Processes
from producer.jobs.local.servers import PostgresServer, RedisServer, S3Server, Server
from producer.jobs.schema import upgrade
from producer.jobs.settings import Settings
from tests.waiting import until

TEMPLATE = "migrated"
START_S = 120.0


class Servers:
    """The three servers of one folder, by their names ``redis``, ``postgres`` and ``s3``."""

    def __init__(self, folder: Path) -> None:
        data = DataFolder(folder)
        kept, ports = data.secrets(), data.ports(["redis", "postgres", "s3"])
        self.folder = folder
        self.redis = RedisServer(data.subfolder("redis"), ports["redis"], kept.redis_password)
        self.postgres = PostgresServer(data.subfolder("postgres"), ports["postgres"], kept.postgres_password)
        self.s3 = S3Server(
            data.subfolder("s3"), ports["s3"], kept.s3_access_key_id, kept.s3_secret_access_key, "us-east-1"
        )
        self._all: dict[str, Server] = {server.name: server for server in (self.redis, self.s3, self.postgres)}
        self._processes = Processes(folder / "processes.json", data.subfolder("logs"))
        self._pids: dict[str, int] = {}
        self._numbers = itertools.count(1)

    def start(self, *names: str) -> None:
        """Start these, side by side, and return once each does real work."""
        for name in names:
            server = self._all[name]
            server.prepare()
            self._pids[name] = self._processes.start(
                name, server.command(), server.environment(), stop_signal=server.stop_signal
            )
        for name in names:
            until(lambda name=name: self._all[name].question() is None, timeout_s=START_S, pause_s=0.02)

    def kill(self, name: str) -> None:
        """SIGKILL to the server and all of its children."""
        os.killpg(self._pids[name], signal.SIGKILL)
        until(lambda: name in [ended.name for ended in self._processes.poll()])

    def lose_redis_file(self) -> None:
        """What Redis wrote down is gone, as with a broken disk. Only while it does not run."""
        for kept in self.redis.folder.glob("appendonlydir"):
            shutil.rmtree(kept)

    def stop(self) -> None:
        self._processes.stop_all()

    def make_template(self) -> None:
        """A migrated database, which ``fresh_settings`` copies."""
        self.execute("CREATE DATABASE {}", TEMPLATE)
        upgrade(self._database_url(TEMPLATE))

    def fresh_settings(self, time_scale: float) -> Settings:
        """Settings with an empty database, an empty Redis, a bucket and a data folder of their own."""
        name = f"cell{next(self._numbers)}"
        self.execute("CREATE DATABASE {} TEMPLATE {}", name, TEMPLATE)
        with redis.Redis.from_url(self.redis.services()["redis_url"]) as client:
            client.flushall()
        data_dir = self.folder / name
        data_dir.mkdir()
        models = self.folder / "models"  # written once for all
        models.mkdir(exist_ok=True)
        (data_dir / "models").symlink_to(models)
        return Settings(
            data_dir=data_dir,
            time_scale=time_scale,
            database_url=SecretStr(self._database_url(name)),
            redis_url=SecretStr(self.redis.services()["redis_url"]),
            s3_endpoint_url=f"http://127.0.0.1:{self.s3.port}",
            s3_access_key_id=SecretStr(self.s3.key_id),
            s3_secret_access_key=SecretStr(self.s3.secret),
            s3_bucket=f"chaos-{name}",
        )

    def execute(self, statement: str, *names: str) -> None:
        """One statement of the operator's, beside every farm."""
        with psycopg.connect(self._database_url("ovis"), autocommit=True) as connection:
            connection.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))

    def _database_url(self, name: str) -> str:
        return self.postgres.services()["database_url"].rpartition("/")[0] + f"/{name}"


@contextmanager
def running(folder: Path) -> Iterator[Servers]:
    """All three servers, with a template to copy, until the block is left."""
    servers = Servers(folder)
    try:
        servers.start("redis", "s3", "postgres")
        servers.make_template()
        yield servers
    finally:
        servers.stop()
