"""One real worker process against real servers; only its drawing is blank."""

import hashlib
import io
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

import httpx
import pytest
import redis
from PIL import Image

from pipeline import image_file
from producer.jobs.contract import QUEUE, Batch, State, Submission
from producer.jobs.dispatcher import Dispatcher
from producer.jobs.queue import Queue
from producer.jobs.settings import Settings
from producer.jobs.storage import Storage
from producer.jobs.store import Store
from tests.farm import environment, free_port
from tests.waiting import until

ROOT = Path(__file__).parents[3]
BLANK_WORKER = ROOT / "tests" / "blank_worker.py"


@pytest.fixture
def dispatcher(settings: Settings, store: Store) -> Iterator[Dispatcher]:
    queue, stop = Queue(settings.require("redis_url")), threading.Event()
    dispatcher = Dispatcher(store, queue, settings.durations)
    thread = threading.Thread(target=dispatcher.run, args=(stop,))
    thread.start()
    yield dispatcher
    stop.set()
    thread.join(20)
    queue.close()


@contextmanager
def worker(settings: Settings, *options: str, **more: str) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [sys.executable, BLANK_WORKER, *options], env=environment(settings) | more, cwd=ROOT,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def submit(store: Store, count: int, **fields: object) -> Batch:
    rows = [Submission.model_validate({"prompt": f"b{n}", "width": 64, "height": 64, **fields}) for n in range(count)]
    return store.submit_batch("b", rows, max_failures=3)


def outcomes(store: Store, job_id: UUID) -> list[str | None]:
    return [row["outcome"] for row in store.history(job_id)]


def check_ledger(store: Store, storage: Storage, batch: Batch) -> None:
    """Every job succeeded once, and its row's object is there with its sha256 and its size."""
    for job in store.batch_jobs(batch.id):
        assert job.state is State.SUCCEEDED
        assert outcomes(store, job.id).count("succeeded") == 1
        assert job.object_key is not None
        body = storage.get(job.object_key)
        assert hashlib.sha256(body).hexdigest() == job.sha256
        assert Image.open(io.BytesIO(body)).size == (job.width_px, job.height_px) == (64, 64)


def test_every_job_ends_as_one_image_that_can_be_drawn_again_from_its_file_alone(
    settings: Settings, store: Store, storage: Storage, dispatcher: Dispatcher
) -> None:
    batch = submit(store, 30)
    with worker(settings):
        until(lambda: store.batch(batch.id).done)
    check_ledger(store, storage, batch)
    job = store.batch_jobs(batch.id)[7]
    assert job.object_key is not None
    request, model, revision = image_file.read_request(storage.get(job.object_key))
    assert (request, model, revision) == (job.request, "blank", "0")
    assert min(job.waiting_s or -1, job.encoding_s or -1, job.uploading_s or -1) >= 0


def test_a_killed_workers_jobs_are_drawn_by_another_and_none_is_recorded_twice(
    settings: Settings, store: Store, storage: Storage, dispatcher: Dispatcher
) -> None:
    batch = submit(store, 40, steps=5)
    with worker(settings, "--step-s", "0.05") as first:
        until(lambda: store.batch(batch.id).counts[State.SUCCEEDED] >= 8)
        first.kill()
        first.wait()
    assert not store.batch(batch.id).done
    with worker(settings, "--step-s", "0.01"):
        until(lambda: store.batch(batch.id).done)
    check_ledger(store, storage, batch)
    ends = [end for job in store.batch_jobs(batch.id) for end in outcomes(store, job.id)]
    assert "lease_lost" in ends
    assert all(job.failures == 0 for job in store.batch_jobs(batch.id)), "nobody died while drawn alone"


def test_a_worker_that_is_told_to_stop_gives_back_what_it_cannot_finish(
    settings: Settings, store: Store, storage: Storage, dispatcher: Dispatcher
) -> None:
    batch = submit(store, 4, steps=100)
    with worker(settings, "--step-s", "0.2") as process:
        until(lambda: store.batch(batch.id).counts[State.RUNNING] >= 1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    jobs = store.batch_jobs(batch.id)
    assert all((job.state, job.failures) == (State.QUEUED, 0) for job in jobs)
    assert "drained" in [end for job in jobs for end in outcomes(store, job.id)]


def test_a_worker_that_is_told_to_stop_finishes_what_fits_in_its_grace_time(
    settings: Settings, store: Store, storage: Storage, dispatcher: Dispatcher
) -> None:
    batch = submit(store, 1, steps=3)
    with worker(settings, "--step-s", "0.2") as process:
        until(lambda: store.batch(batch.id).counts[State.RUNNING] == 1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    check_ledger(store, storage, batch)


def test_a_cancel_reaches_a_running_job_within_two_seconds_and_frees_its_place(
    settings: Settings, store: Store, storage: Storage, dispatcher: Dispatcher
) -> None:
    batch = submit(store, 1, steps=100)
    (job,) = store.batch_jobs(batch.id)
    with worker(settings, "--step-s", "0.5"):
        until(lambda: store.job(job.id).state is State.RUNNING)
        until(lambda: store.farm(lease_s=60).workers[0].drawing)
        store.cancel(job.id)
        until(lambda: not store.farm(lease_s=60).workers[0].drawing, timeout_s=2)
    assert outcomes(store, job.id) == ["cancelled"]


def test_rubbish_in_redis_is_passed_over(
    settings: Settings, store: Store, storage: Storage, dispatcher: Dispatcher
) -> None:
    broker = redis.Redis.from_url(settings.require("redis_url"))
    queue = Queue(settings.require("redis_url"))
    with worker(settings) as process:
        until(lambda: store.farm(lease_s=60).workers)
        for arguments in (("no uuid", 1), (str(UUID(int=1)), 1), (str(UUID(int=1)), "one"), ()):
            queue._app.send_task("ovis.draw", args=arguments, queue=QUEUE)
        queue._app.send_task("of.nobody", queue=QUEUE)
        batch = submit(store, 3)
        until(lambda: store.batch(batch.id).done)
        until(lambda: broker.hlen("unacked") == 0)
        assert process.poll() is None
    queue.close()
    broker.close()


def test_a_worker_tells_prometheus_how_its_jobs_ended_and_how_long_each_phase_took(
    settings: Settings, store: Store, storage: Storage, dispatcher: Dispatcher
) -> None:
    port = free_port()
    batch = submit(store, 3)
    with worker(settings, OVIS_METRICS_PORT=str(port)):
        until(lambda: store.batch(batch.id).done)
        numbers = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    assert 'ovis_claims_ended_total{outcome="succeeded"} 3.0' in numbers
    assert 'ovis_phase_seconds_count{phase="uploading"} 3.0' in numbers


@pytest.mark.parametrize(
    ("changes", "code", "told"),
    [
        ({"OVIS_DEVICE": "cuda:9"}, 2, "cuda:9"),
        ({"OVIS_MODEL": "/nowhere/at/all"}, 2, "/nowhere/at/all"),
        ({"OVIS_UPLOAD_SLOTS": "many"}, 2, "OVIS_UPLOAD_SLOTS"),
        ({"OVIS_DATABASE_URL": "postgresql://x:y@127.0.0.1:1/none"}, 3, "Postgres"),
    ],
)
def test_a_worker_that_cannot_start_says_why_and_ends_with_its_code(
    settings: Settings, changes: dict[str, str], code: int, told: str
) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "worker.app"], env=environment(settings) | changes, cwd=ROOT,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert ended.returncode == code
    assert told in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr
