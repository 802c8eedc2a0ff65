"""Puts the API together: routes, problems, metrics, the page, and a dispatcher in a thread of its own."""

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import APIRouter, FastAPI
from fastapi.concurrency import run_in_threadpool
from prometheus_client import CollectorRegistry

from producer.api import batches, documents, farm, jobs, metrics, problems
from producer.api.answers import PREFIX
from producer.api.services import Services
from producer.dashboard import dashboard
from producer.jobs.dispatcher import Dispatcher
from producer.jobs.metrics import DispatcherCollector
from producer.jobs.settings import Settings

STOP_LIMIT_S = 15
"""What the dispatcher's thread may take to end: a statement on a lost network ends by its own timeouts."""


def create_app(settings: Settings) -> FastAPI:
    """The API of the farm that ``settings`` name. It connects when it is started, not here.

    Starting it raises SchemaMismatch if the database is not at this code's schema, Unavailable if it is away.

    Raises:
        SettingsError: an address is not set.
    """
    services = Services.at(settings)
    dispatcher = Dispatcher(services.store, services.queue, settings.durations)
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
    app.state.registry = CollectorRegistry()
    app.state.registry.register(metrics.FarmCollector(services))
    app.state.registry.register(DispatcherCollector(dispatcher))
    app.add_middleware(metrics.RequestMetrics, registry=app.state.registry)
    problems.install(app)
    for router in (jobs.router, batches.router, farm.router, metrics.router, _page(services)):
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
        async with _dispatching(app.state.dispatcher):
            yield
    finally:
        await run_in_threadpool(services.close)


@asynccontextmanager
async def _dispatching(dispatcher: Dispatcher) -> AsyncIterator[None]:
    stop = threading.Event()
    thread = threading.Thread(target=dispatcher.run, args=(stop,), name="dispatcher", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        await run_in_threadpool(thread.join, STOP_LIMIT_S)
