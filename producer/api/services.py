"""What every endpoint stands on: the settings, the store, the queue and the bucket of one API process, as the caller of
the request may use them.

Invariant: through ``Here`` a caller that is no administrator reaches its own tenant's rows alone, whatever the
endpoint asks for: others' are not there. So no endpoint chooses by tenant itself. Two go past ``Here``: an
estimate, of all that waits, which tells a time and nothing else, and a stream of events, of what ``Here`` found.
"""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Annotated

from fastapi import Depends, Request
from fastapi.concurrency import run_in_threadpool

from producer.api.access import ANYBODY, OPEN_PATHS, READING, Access, Caller, host_name
from producer.api.places import Places
from producer.jobs import schema
from producer.jobs.contract import Scope
from producer.jobs.errors import FarmError
from producer.jobs.keys import Keys
from producer.jobs.postgres import Database
from producer.jobs.queue import Queue
from producer.jobs.settings import Settings
from producer.jobs.storage import Storage
from producer.jobs.store import Store

log = logging.getLogger(__name__)

CONNECTIONS = 10
"""To Postgres, for requests. Whoever has one of the places below holds at most one, so some are left for all others."""
BULK_PLACES = 3
"""Python runs one thread at a time: with more, each would only be slower."""
TRANSFER_PLACES = 4
BACKGROUND_CONNECTIONS = 5
"""For dispatcher, sweep, deliveries and streams, which no number of requests may keep waiting."""


@dataclass(frozen=True)
class Services:
    """Built once a process, shared by all requests. Connects on first use."""

    settings: Settings
    store: Store
    background: Store
    queue: Queue
    storage: Storage
    access: Access
    caller: Caller = ANYBODY
    bulk: Places = field(default_factory=lambda: Places(BULK_PLACES))
    """For what goes through all of a batch at once: a submission, a preview, a workbook."""
    transfers: Places = field(default_factory=lambda: Places(TRANSFER_PLACES))
    """For files on their way to the caller or to the bucket: piece by piece, so that all of them go on."""

    @classmethod
    def at(cls, settings: Settings) -> "Services":
        """Raises: SettingsError: an address is not set."""
        database_url = settings.require("database_url")
        store = Store.at(database_url, connections=CONNECTIONS)
        return cls(
            settings,
            store,
            Store.at(database_url, connections=BACKGROUND_CONNECTIONS),
            Queue(settings.require("redis_url")),
            Storage(settings),
            Access(
                Keys(store.database),
                require_keys=settings.require_keys,
                hosts=[name for name in (settings.api_host, host_name(settings.api_url or "")) if name],
            ),
        )

    @property
    def database(self) -> Database:
        """For the nouns that have a file of their own beside the store: ``Files(here.database)``."""
        return self.store.database

    def whose(self, asked: str | None) -> str:
        """For which tenant the caller makes something that should be ``asked``'s; None: its own. Raises: Forbidden."""
        return self.caller.whose(asked)

    def of(self, caller: Caller) -> "Services":
        """The same, as this caller may use them."""
        return replace(self, caller=caller, store=self.store if caller.admin else self.store.of(caller.tenant))

    def prepare(self) -> None:
        """Return if jobs can be accepted: the schema is this code's, and the bucket exists (created if it is missing).

        Raises:
            SettingsError: a person must do something first: migrate (SchemaMismatch), or correct a setting.
            Unavailable: Postgres or S3 does not answer.
        """
        schema.check(self.settings.require("database_url"))
        self.storage.ensure_bucket()

    def readiness(self) -> dict[str, str]:
        """Each dependency, asked now: ``"ok"`` or what is wrong. They are asked at once, so the slowest decides.

        Where keys are required, strangers ask this too: they are told no address and no user, only that it is away.
        """
        pings = {"Postgres": self.store.ping, "Redis": self.queue.ping, "S3": self.storage.ping}
        with ThreadPoolExecutor(len(pings)) as pool:
            found = dict(zip(pings, pool.map(_ask, pings.values()), strict=True))
        for name, wrong in found.items():
            if wrong != "ok" and self.settings.require_keys:
                log.warning("%s is not ready: %s", name, wrong)
                found[name] = "away"
        return found

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


async def caller_of(request: Request) -> Caller:
    """Who asks. Found once a request, whoever needs it first. Raises: Unauthorized, Forbidden, Overloaded."""
    if not hasattr(request.state, "caller"):
        access = request.app.state.services.access
        request.state.caller = await run_in_threadpool(access.caller, request)
    caller: Caller = request.state.caller
    return caller


async def admitted(request: Request) -> None:
    """A dependency of every path: whoever only reads needs the one scope, everybody else the other.

    Raises: Unauthorized, Forbidden, Overloaded.
    """
    if request.scope["route"].path not in OPEN_PATHS:
        (await caller_of(request)).need(Scope.READ if request.method in READING else Scope.SUBMIT)


async def _here(request: Request) -> Services:
    services: Services = request.app.state.services
    if request.scope["route"].path in OPEN_PATHS:
        return services
    return services.of(await caller_of(request))


async def _administered(request: Request) -> Services:
    here = await _here(request)
    here.caller.need(Scope.ADMIN)
    return here


Here = Annotated[Services, Depends(_here)]
"""An endpoint's parameter: the services of the process that it runs in, as the caller may use them."""
Admin = Annotated[Services, Depends(_administered)]
"""The same where only an administrator may ask."""
