"""Puts the API together: routes, problems, metrics, the page, and dispatcher and sweep in threads of their own."""

import logging
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from prometheus_client import CollectorRegistry

from producer.api import (
    batches,
    documents,
    events,
    farm,
    jobs,
    keys,
    login,
    manifests,
    metrics,
    problems,
    query_names,
    results,
    tenants,
    webhooks,
)
from producer.api.access import COOKIE
from producer.api.answers import PREFIX
from producer.api.events import Feed
from producer.api.idempotency import IdempotentPosts
from producer.api.openai import routes as openai
from producer.api.openai.waiting import Waiting
from producer.api.services import Here, Services, admitted
from producer.dashboard import Viewer, dashboard
from producer.jobs.deliverer import Deliverer
from producer.jobs.dispatcher import Dispatcher
from producer.jobs.errors import SchemaMismatch
from producer.jobs.events import Events
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
        dependencies=[Depends(admitted), Depends(query_names.known)],
    )
    app.state.services = services
    app.state.dispatcher = dispatcher
    app.state.sweeper = sweeper
    app.state.deliverer = Deliverer(
        services.background.database,
        settings.durations,
        leads=lambda: dispatcher.leading,
        private=settings.webhook_private,
    )
    app.state.feed = Feed(Events(services.background.database), settings.durations)
    app.state.waiting = Waiting(services.store.standings, settings.durations.top_up_s)
    app.state.registry = CollectorRegistry()
    app.state.registry.register(metrics.FarmCollector(services))
    app.state.registry.register(DispatcherCollector(dispatcher))
    app.state.registry.register(SweeperCollector(sweeper))
    app.add_middleware(IdempotentPosts)
    app.add_middleware(metrics.RequestMetrics, registry=app.state.registry)
    problems.install(app)
    login.install(app)
    for router in (
        jobs.router,
        batches.router,
        manifests.router,
        results.router,
        events.router,
        webhooks.router,
        farm.router,
        tenants.router,
        metrics.router,
        keys.router,
        login.router,
        _page(services),
    ):
        app.include_router(router)
    app.include_router(openai.router)
    documents.complete(app, openai.DESCRIBED)
    return app


def _page(services: Services) -> APIRouter:
    return dashboard(
        _viewer,
        lease_s=services.settings.durations.lease_s,
        api_path=PREFIX,
        image_origin=services.settings.s3_public_endpoint_url or services.settings.require("s3_endpoint_url"),
    )


async def _viewer(request: Request, here: Here) -> Viewer:
    return Viewer(here.store, here.caller.tenant if COOKIE in request.cookies else None)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    services: Services = app.state.services
    try:
        await run_in_threadpool(services.prepare)
        dispatch = partial(_dispatch, app.state.dispatcher)
        async with (
            _running(dispatch, "dispatcher"),
            _running(app.state.sweeper.run, "sweep"),
            _running(app.state.deliverer.run, "deliveries"),
        ):
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
