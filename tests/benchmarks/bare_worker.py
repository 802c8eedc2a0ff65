"""The least that a worker could do: Celery, claim, put and record, with no engine, no lease, no encoding, no metrics.

What ``throughput.py`` measures the product's worker against, on the same machine in the same run.

    python tests/benchmarks/bare_worker.py [--no-upload]
"""

import sys
import threading
import time
from typing import Any
from uuid import UUID, uuid4

from celery import signals

from pipeline.request import ImageFormat
from producer.jobs.contract import TASK, Message, Recorded
from producer.jobs.queue import celery_app
from producer.jobs.settings import load_settings
from producer.jobs.storage import Storage
from producer.jobs.store import Store

CONCURRENCY = 12
BODY = bytes(400)


def main() -> None:
    settings = load_settings()
    store = Store.at(settings.require("database_url"), connections=CONCURRENCY + 2, ping=False)
    storage = None if "--no-upload" in sys.argv else Storage(settings)
    worker_id = uuid4()
    row = {"host": "bare", "pid": 0, "device": "none", "model": "bare", "revision": "0", "version": "0", "capacity": 1}
    store.beat(worker_id, row, "[]")
    threading.Thread(target=_keep_beating, args=(store, worker_id, row), daemon=True).start()
    app = celery_app(settings.require("redis_url"))

    @app.task(name=TASK)
    def draw(job_id: str, number: int) -> None:
        claim = store.claim(Message(UUID(job_id), number), worker_id)
        if claim is None:
            return
        key = f"bare/{job_id}/{number}.png"
        if storage:
            storage.put(key, BODY, "image/png")
        store.record(claim, Recorded(key, "00", len(BODY), 64, 64, ImageFormat.PNG, 0.0, 0.0, 0.0, []))

    signals.setup_logging.connect(lambda **_: None, weak=False)
    options = {"without_gossip": True, "without_mingle": True, "without_heartbeat": True, "quiet": True}
    app.Worker(pool="threads", concurrency=CONCURRENCY, loglevel="WARNING", **options).start()


def _keep_beating(store: Store, worker_id: UUID, row: dict[str, Any]) -> None:
    while True:
        time.sleep(5)
        store.beat(worker_id, row, "[]")


if __name__ == "__main__":
    main()
