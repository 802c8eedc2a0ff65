"""Somebody who submits ten images is not made to wait by somebody with twenty thousand.

Dispatcher, Redis and worker are real; drawing is a sleep that takes as long as a large image on a GPU.
"""

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from producer.jobs.contract import Submission
from producer.jobs.dispatcher import Dispatcher
from producer.jobs.queue import Queue
from producer.jobs.settings import Durations, Settings
from producer.jobs.store import Store
from tests.blank_worker import CAPACITY
from tests.farm import environment
from tests.waiting import until

ROOT = Path(__file__).parents[4]
STEPS, STEP_S = 20, 0.2
"""All the worker's images begin and end together, which is the worst case: 12 places are free at once."""


@pytest.fixture
def farm(settings: Settings, store: Store) -> Iterator[None]:
    quick = settings.model_copy(update={"time_scale": 1.0})
    command = [sys.executable, "tests/blank_worker.py", "--no-upload", "--step-s", str(STEP_S)]
    worker = subprocess.Popen(command, cwd=ROOT, env=environment(quick))
    queue, stop = Queue(settings.require("redis_url")), threading.Event()
    dispatcher = threading.Thread(target=Dispatcher(store, queue, Durations()).run, args=(stop,))
    dispatcher.start()
    yield
    stop.set()
    dispatcher.join()
    queue.close()
    worker.kill()
    worker.wait()


def started(store: Store) -> list[str]:
    """Whose images were claimed, in order."""
    statement = "SELECT tenant FROM claims JOIN jobs ON jobs.id = job_id ORDER BY claims.claimed_at"
    with store.database.begin() as connection:
        return list(connection.execute(text(statement)).scalars())


@pytest.mark.usefixtures("farm")
def test_before_each_of_ten_images_at_most_two_of_a_tenant_with_twenty_thousand_begin(store: Store) -> None:
    def submission() -> Submission:
        return Submission(prompt="a", width=64, height=64, steps=STEPS)

    store.submit_batch("catalogue", (submission() for _ in range(20_000)), max_failures=3, tenant="large")
    until(lambda: len(started(store)) >= CAPACITY, timeout_s=120)
    before = len(started(store))
    for _ in range(10):
        store.submit(submission(), max_failures=3, tenant="small")
    until(lambda: started(store).count("small") == 10, timeout_s=120)
    order = started(store)[before:]
    own = [place for place, tenant in enumerate(order) if tenant == "small"]
    between = [place - last - 1 for last, place in zip([-1, *own], own, strict=False)]
    assert max(between) <= 2, between
