"""What every endpoint stands on: the settings, the store, the queue and the bucket of one API process."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from producer.jobs import schema
from producer.jobs.errors import FarmError
from producer.jobs.queue import Queue
from producer.jobs.settings import Settings
from producer.jobs.storage import Storage
from producer.jobs.store import Store

CONNECTIONS = 10
"""To Postgres, for requests. A bulk submission holds one while its rows go in; the others keep answering."""
BACKGROUND_CONNECTIONS = 3
"""For dispatcher and sweep, which no number of requests may keep waiting."""


@dataclass(frozen=True)
class Services:
    """Built once a process, shared by all requests. Connects on first use."""

    settings: Settings
    store: Store
    background: Store
    queue: Queue
    storage: Storage

    @classmethod
    def at(cls, settings: Settings) -> "Services":
        """Raises: SettingsError: an address is not set."""
        database_url = settings.require("database_url")
        return cls(
            settings,
            Store.at(database_url, connections=CONNECTIONS),
            Store.at(database_url, connections=BACKGROUND_CONNECTIONS),
            Queue(settings.require("redis_url")),
            Storage(settings),
        )

    def prepare(self) -> None:
        """Return if jobs can be accepted: the schema is this code's, and the bucket exists (created if it is missing).

        Raises:
            SettingsError: a person must do something first: migrate (SchemaMismatch), or correct a setting.
            Unavailable: Postgres or S3 does not answer.
        """
        schema.check(self.settings.require("database_url"))
        self.storage.ensure_bucket()

    def readiness(self) -> dict[str, str]:
        """Each dependency, asked now: ``"ok"`` or what is wrong. They are asked at once, so the slowest decides."""
        pings = {"Postgres": self.store.ping, "Redis": self.queue.ping, "S3": self.storage.ping}
        with ThreadPoolExecutor(len(pings)) as pool:
            return dict(zip(pings, pool.map(_ask, pings.values()), strict=True))

    def close(self) -> None:
        self.store.close()
        self.background.close()
        self.queue.close()
        self.storage.close()


def _ask(ping: Callable[[], None]) -> str:
    try:
        ping()
    except FarmError as error:
        return str(error)
    return "ok"


def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


Here = Annotated[Services, Depends(_services)]
"""An endpoint's parameter: the services of the process that it runs in."""
