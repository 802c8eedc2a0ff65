"""The real servers that tests share: embedded ones, started once a session, in a folder that pytest removes.

Nothing is skipped: a server that is not installed fails the tests that need it.
"""

import itertools
import os
import secrets
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import psycopg
import pytest
import redis
from psycopg import sql
from pydantic import SecretStr

from producer.jobs.local import local_servers
from producer.jobs.schema import upgrade
from producer.jobs.settings import Settings
from producer.jobs.storage import Storage
from producer.jobs.store import Store

TEMPLATE = "migrated"
TIME_SCALE = 0.1
REDIS_DATABASES = itertools.cycle(range(1, 16))


@pytest.fixture(scope="session", autouse=True)
def _no_settings_from_outside() -> Iterator[None]:
    """Tests never meet the servers or settings of whoever runs them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("OVIS_")]:
            patch.delenv(name)
        yield


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_reaches_children() -> None:
    """A shell starts what runs behind ``&`` with SIGINT ignored, and every child would inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _no_process_left(_no_settings_from_outside: None) -> Iterator[None]:
    """Whatever a test starts, it stops. What is found at the end is killed, and the run fails."""
    before = set(psutil.Process().children(recursive=True))
    yield
    left = [process for process in psutil.Process().children(recursive=True) if process not in before]
    strays = {process.pid: " ".join(process.cmdline()) for process in left if not _is_pythons_own(process)}
    for process in left:
        process.kill()
    assert not strays, "processes were left running"


def _is_pythons_own(process: psutil.Process) -> bool:
    """multiprocessing's tracker lives as long as the interpreter."""
    try:
        return any("resource_tracker" in part for part in process.cmdline())
    except psutil.NoSuchProcess:
        return True


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory, _no_process_left: None) -> Iterator[Settings]:
    """The settings of embedded servers that run for the whole session. Tests of jobs want ``settings``."""
    data_dir = tmp_path_factory.mktemp("ovis")
    with local_servers(Settings(data_dir=data_dir, time_scale=TIME_SCALE)) as farm:
        yield farm.settings


@pytest.fixture(scope="session")
def migrated(servers: Settings) -> str:
    """The name of a database at the head of the migrations, to be copied. Nobody may be connected to it."""
    _execute(servers, "CREATE DATABASE {}", TEMPLATE)
    upgrade(database_url(servers, TEMPLATE))
    return TEMPLATE


@pytest.fixture(scope="session")
def bucket_maker(servers: Settings) -> Iterator[Storage]:
    """One storage for the session: making one takes three times as long as all else that a test is given."""
    storage = Storage(servers)
    yield storage
    storage.close()


@pytest.fixture
def settings(servers: Settings, migrated: str, bucket_maker: Storage) -> Iterator[Settings]:
    """Settings of the test's own: a migrated empty database, an empty Redis, an empty bucket."""
    with fresh_settings(servers, migrated, bucket_maker) as own:
        yield own


@contextmanager
def fresh_settings(servers: Settings, migrated: str, bucket_maker: Storage) -> Iterator[Settings]:
    """As ``settings``, for as long as somebody needs them."""
    name = f"test_{secrets.token_hex(6)}"
    _execute(servers, "CREATE DATABASE {} TEMPLATE {}", name, migrated)
    own = servers.model_copy(
        update={
            "database_url": SecretStr(database_url(servers, name)),
            "redis_url": SecretStr(_empty_redis(servers)),
            "s3_bucket": name.replace("_", "-"),
        }
    )
    bucket_maker.bucket = own.s3_bucket
    bucket_maker.ensure_bucket()
    yield own
    _execute(servers, "DROP DATABASE {} WITH (FORCE)", name)


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    """The test's own database."""
    store = Store.at(settings.require("database_url"))
    yield store
    store.close()


@pytest.fixture
def storage(settings: Settings) -> Iterator[Storage]:
    """The test's own bucket."""
    storage = Storage(settings)
    yield storage
    storage.close()


def database_url(servers: Settings, name: str) -> str:
    return servers.require("database_url").rpartition("/")[0] + f"/{name}"


def _execute(servers: Settings, statement: str, *names: str) -> None:
    with psycopg.connect(servers.require("database_url"), autocommit=True) as connection:
        connection.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))


def _empty_redis(servers: Settings) -> str:
    """The URL of an emptied database of the shared Redis: each test takes the next of its fifteen."""
    url = servers.require("redis_url").rpartition("/")[0] + f"/{next(REDIS_DATABASES)}"
    with redis.Redis.from_url(url) as client:
        client.flushdb()
    return url
