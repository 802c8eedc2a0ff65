"""The commands that are one process of a farm each: migrate, api, dispatcher, worker, workers; and the selftest.

Workers are started by command, never by import: this side reaches no torch.
"""

import logging
import os
import signal
import sys
import threading
from typing import Annotated

import typer

from producer.jobs.settings import Settings, load_settings

log = logging.getLogger(__name__)

STOP_LIMIT_S = 15
"""What sweep and deliveries may take to end: a request on a lost network ends by its own timeouts."""


def migrate() -> None:
    """Bring the database's schema to this version's."""
    from producer.jobs import schema

    schema.upgrade(load_settings().require("database_url"))
    typer.echo(f"the schema is at {schema.head()}")


def api() -> None:
    """Serve the HTTP API and the page, with a dispatcher inside."""
    from producer.api import serve

    serve(_logged(load_settings()))


def dispatcher() -> None:
    """Run a dispatcher of its own: fills Redis, sweeps the bucket, tells webhooks. Several may run; one leads."""
    from prometheus_client import CollectorRegistry

    from producer.jobs import schema
    from producer.jobs.deliverer import Deliverer
    from producer.jobs.dispatcher import Dispatcher
    from producer.jobs.metrics import DispatcherCollector, SweeperCollector, serve_metrics
    from producer.jobs.queue import Queue
    from producer.jobs.storage import Storage
    from producer.jobs.store import Store
    from producer.jobs.sweep import Sweeper

    settings = _logged(load_settings())
    database_url = settings.require("database_url")
    queue = Queue(settings.require("redis_url"))
    storage = Storage(settings)
    schema.check(database_url)
    store = Store.at(database_url)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    leader = Dispatcher(store, queue, settings.durations)
    sweeper = Sweeper(store, storage, settings.durations, leads=lambda: leader.leading)
    deliverer = Deliverer(
        store.database, settings.durations, leads=lambda: leader.leading, private=settings.webhook_private
    )
    beside = [
        threading.Thread(target=part.run, args=(stop,), name=name, daemon=True)
        for part, name in ((sweeper, "sweep"), (deliverer, "deliveries"))
    ]
    if settings.metrics_port is not None:
        registry = CollectorRegistry()
        registry.register(DispatcherCollector(leader))
        registry.register(SweeperCollector(sweeper))
        port = serve_metrics(registry, settings.metrics_host, settings.metrics_port)
        log.info("metrics at http://%s:%d/metrics", settings.metrics_host, port)
    for thread in beside:
        thread.start()
    try:
        leader.run(stop)
    finally:
        stop.set()
        for thread in beside:
            thread.join(STOP_LIMIT_S)
        for part in (queue, store, storage):
            part.close()


def worker(
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …; default: cuda if there is one.")] = None,
) -> None:
    """Run one worker process on one device, until SIGTERM."""
    command = [sys.executable, "-m", "worker.app"]
    os.execv(sys.executable, command + (["--device", device] if device else []))


def workers(
    device: Annotated[
        list[str] | None, typer.Option(help="cpu, cuda (every GPU), cuda:1, …; may be given again.")
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=1, help="Workers, over the devices in turn; default: one a device.")
    ] = None,
) -> None:
    """Run one worker process a device, each started again when it ends, until SIGTERM or Ctrl-C."""
    words = [word for name in device or [] for word in ("--device", name)]
    words += [] if count is None else ["--count", str(count)]
    os.execv(sys.executable, [sys.executable, "-m", "worker", *words])


def selftest(
    model: Annotated[str, typer.Option(help="'tiny', a checkpoint folder, or a hub name.")],
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …")] = None,
    revision: Annotated[str | None, typer.Option(help="A commit of the hub repository.")] = None,
) -> None:
    """Draw a few images by diffusers' own pipeline and by the engine, and compare them."""
    options = {"--model": model, "--device": device, "--revision": revision}
    options["--models-dir"] = str(load_settings().models_dir)
    words = [word for option, value in options.items() if value for word in (option, value)]
    os.execv(sys.executable, [sys.executable, "-m", "pipeline.selftest", *words])


def _logged(settings: Settings) -> Settings:
    logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    return settings


COMMANDS = (migrate, api, dispatcher, worker, workers, selftest)
