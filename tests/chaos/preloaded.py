"""What the fork server imports before it forks, and the roles that a process may then play."""

import functools
import gc
import logging

import celery.app.amqp
import celery.apps.worker
import celery.concurrency.thread
import celery.events.receiver
import celery.worker.autoscale
import celery.worker.consumer
import celery.worker.consumer.delayed_delivery
import celery.worker.strategy  # noqa: F401  # all of these are imported late: by a worker that starts

from producer.cli import roles
from producer.jobs import dispatcher as _dispatcher  # noqa: F401  # as the dispatcher's command does
from producer.jobs import queue
from producer.jobs.settings import load_settings
from producer.jobs.store import Store
from tests.chaos import doomed
from worker.app import run


def worker() -> int:
    """A worker with the plan of its environment."""
    plan = doomed.Plan.here()
    doom = doomed.Doom(plan)
    settings = load_settings()
    logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if plan.file_limit_bytes is not None:
        doomed.fill_disk(plan.file_limit_bytes)
    return run(
        settings,
        load=functools.partial(doomed.drawer_of, plan, doom),
        storage_at=functools.partial(doomed.DoomedStorage.with_doom, doom),
        store_at=functools.partial(doomed.DoomedStore.with_doom, doom),
    )


def dispatcher() -> int:
    """The product's own command, with the plan's points around its publishing."""
    doomed.DoomedQueue.doom = doomed.Doom(doomed.Plan.here())
    queue.Queue = doomed.DoomedQueue  # type: ignore[misc]  # the command imports it when it runs
    roles.dispatcher()
    return 0


def producer() -> int:
    """Submits what its environment says, and ends."""
    doomed.submit(doomed.Doom(doomed.Plan.here()), Store.at(load_settings().require("database_url")))
    return 0


gc.collect()
gc.freeze()  # a fork that collects would copy all of this
