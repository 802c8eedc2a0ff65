"""Puts the API together: routes, problems, metrics, the page, and dispatcher and sweep in threads of their own."""

import logging
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version

from fastapi import APIRouter, FastAPI
from fastapi.concurrency import run_in_threadpool
from prometheus_client import CollectorRegistry

from producer.api import batches, documents, farm, jobs, metrics, problems, tenants
from producer.api.answers import PREFIX
from producer.api.services import Services
from producer.dashboard import dashboard
from producer.jobs.dispatcher import Dispatcher
from producer.jobs.errors import SchemaMismatch
from producer.jobs.metrics import DispatcherCollector, SweeperCollector
from producer.jobs.settings import Settings
from producer.jobs.sweep import Sweeper

log = logging.getLogger(__name__)

STOP_LIMIT_S = 15
"""What each of these threads may take to end: a question on a lost network ends by its own timeouts."""


def create_app(settings: Settings) -> FastAPI:
    """The API of the farm that ``settings`` name. It connects when it is started, not here.

    Starting it raises SchemaMismatch if the database is not at this code's schema, Unavailable if it is away.

    Raises:
        SettingsError: an address is not set.
    """
    services = Services.at(settings)
    dispatcher = Dispatcher(services.background, services.queue, settings.durations)
    sweeper = Sweeper(services.background, services.storage, settings.durations, leads=lambda: dispatcher.leading)
    app = FastAPI(
        title="ovis-batch",
        description=documents.DESCRIPTION,
        version=version("ovis-batch"),
        lifespan=_lifespan,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.services = services
    app.state.dispatcher = dispatcher
    app.state.sweeper = sweeper
    app.state.registry = CollectorRegistry()
    app.state.registry.register(metrics.FarmCollector(services))
    app.state.registry.register(DispatcherCollector(dispatcher))
    app.state.registry.register(SweeperCollector(sweeper))
    app.add_middleware(metrics.RequestMetrics, registry=app.state.registry)
    problems.install(app)
    for router in (jobs.router, batches.router, farm.router, tenants.router, metrics.router, _page(services)):
        app.include_router(router)
    documents.complete(app)
    return app


def _page(services: Services) -> APIRouter:
    return dashboard(
        services.store,
        lease_s=services.settings.durations.lease_s,
        api_path=PREFIX,
        image_origin=services.settings.s3_public_endpoint_url or services.settings.require("s3_endpoint_url"),
    )


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    services: Services = app.state.services
    try:
        await run_in_threadpool(services.prepare)
        dispatch = partial(_dispatch, app.state.dispatcher)
        async with _running(dispatch, "dispatcher"), _running(app.state.sweeper.run, "sweep"):
            yield
    finally:
        await run_in_threadpool(services.close)


def _dispatch(dispatcher: Dispatcher, stop: threading.Event) -> None:
    """Until ``stop`` is set, or the database is migrated to what this code does not know: reads are still answered."""
    try:
        dispatcher.run(stop)
    except SchemaMismatch as error:
        log.critical("this process dispatches nothing more, and goes on answering: %s", error)


@asynccontextmanager
async def _running(until_stopped: Callable[[threading.Event], None], name: str) -> AsyncIterator[None]:
    stop = threading.Event()
    thread = threading.Thread(target=until_stopped, args=(stop,), name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        await run_in_threadpool(thread.join, STOP_LIMIT_S)
