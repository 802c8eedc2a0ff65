"""One real worker process against real servers; only its drawing is blank."""

import hashlib
import io
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from uuid import UUID

import httpx
import pytest
import redis
from PIL import Image
from pydantic import SecretStr

from pipeline import image_file
from producer.jobs.contract import QUEUE, Batch, Priority, State, Submission
from producer.jobs.dispatcher import Dispatcher
from producer.jobs.queue import Queue
from producer.jobs.settings import Settings
from producer.jobs.storage import CHECKPOINTS, Storage
from producer.jobs.store import Store
from tests.chaos.doomed import Plan
from tests.chaos.nursery import Member, Nursery
from tests.farm import environment, free_port
from tests.integration.worker.conftest import Gate
from tests.waiting import until
from worker.stopping import ECHO_S

ROOT = Path(__file__).parents[3]


@contextmanager
def dispatching(settings: Settings, store: Store) -> Iterator[Dispatcher]:
    queue, stop = Queue(settings.require("redis_url")), threading.Event()
    dispatcher = Dispatcher(store, queue, settings.durations)
    thread = threading.Thread(target=dispatcher.run, args=(stop,))
    thread.start()
    yield dispatcher
    stop.set()
    thread.join(20)
    queue.close()


@pytest.fixture
def dispatcher(settings: Settings, store: Store) -> Iterator[Dispatcher]:
    with dispatching(settings, store) as dispatcher:
        yield dispatcher


@pytest.fixture(scope="session")
def nursery(_no_process_left: None) -> Iterator[Nursery]:
    """Starts a worker in a second, not in the ten that its imports take."""
    nursery = Nursery()
    yield nursery
    nursery.stop()


@pytest.fixture
def steps_file(tmp_path: Path) -> Path:
    """Where workers note each step that they have drawn, from 0 on, behind its image's seed."""
    path = tmp_path / "steps"
    path.touch()
    return path


Workers = Callable[..., AbstractContextManager[Member]]


@pytest.fixture
def workers(settings: Settings, nursery: Nursery, tmp_path: Path, steps_file: Path) -> Workers:
    """Runs a worker process until the block is left, with a blank engine unless told otherwise."""

    @contextmanager
    def running(
        *, step_s: float = 0.0, engine: str = "blank", own: Settings = settings, **more: str
    ) -> Iterator[Member]:
        plan = Plan(engine=engine, step_s=step_s, steps_file=str(steps_file))
        member = nursery.start("worker", environment(own) | plan.environment() | more, tmp_path / "log")
        try:
            yield member
        finally:
            member.kill()

    return running


def steps_of(path: Path) -> list[int]:
    return [int(line.split()[1]) for line in path.read_text().splitlines()]


def submit(store: Store, count: int, **fields: object) -> Batch:
    rows = [Submission.model_validate({"prompt": f"b{n}", "width": 64, "height": 64, **fields}) for n in range(count)]
    return store.submit_batch("b", rows, max_failures=3)


def outcomes(store: Store, job_id: UUID) -> list[str | None]:
    return [row["outcome"] for row in store.history(job_id)]


def objects(storage: Storage, prefix: str) -> list[str]:
    return [key for page in storage.pages(prefix) for key in page]


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
    settings: Settings, store: Store, storage: Storage, dispatcher: Dispatcher, workers: Workers
) -> None:
    batch = submit(store, 30)
    with workers():
        until(lambda: store.batch(batch.id).done)
    check_ledger(store, storage, batch)
    job = store.batch_jobs(batch.id)[7]
    assert job.object_key is not None
    request, model, revision = image_file.read_request(storage.get(job.object_key))
    assert (request, model, revision) == (job.request, "blank", "0")
    assert min(job.waiting_s or -1, job.encoding_s or -1, job.uploading_s or -1) >= 0


def test_a_killed_workers_jobs_are_drawn_by_another_and_none_is_recorded_twice(
    settings: Settings, store: Store, storage: Storage, dispatcher: Dispatcher, workers: Workers
) -> None:
    batch = submit(store, 40, steps=5)
    with workers(step_s=0.05) as first:
        until(lambda: store.batch(batch.id).counts[State.SUCCEEDED] >= 8)
        first.kill()
        first.ended()
    assert not store.batch(batch.id).done
    with workers(step_s=0.01):
        until(lambda: store.batch(batch.id).done)
    check_ledger(store, storage, batch)
    ends = [end for job in store.batch_jobs(batch.id) for end in outcomes(store, job.id)]
    assert "lease_lost" in ends
    assert all(job.failures == 0 for job in store.batch_jobs(batch.id)), "nobody died while drawn alone"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_worker_that_is_told_to_stop_gives_back_what_it_cannot_finish(
    settings: Settings, store: Store, storage: Storage, dispatcher: Dispatcher, workers: Workers,
    number: signal.Signals,
) -> None:  # fmt: skip
    batch = submit(store, 4, steps=100)
    with workers(step_s=0.2) as process:
        until(lambda: store.batch(batch.id).counts[State.RUNNING] >= 1)
        process.signal(number)
        assert process.ended(30) == 0
    jobs = store.batch_jobs(batch.id)
    assert all((job.state, job.failures) == (State.QUEUED, 0) for job in jobs)
    assert "drained" in [end for job in jobs for end in outcomes(store, job.id)]


def test_a_worker_that_is_told_to_stop_finishes_what_fits_in_its_grace_time(
    settings: Settings, store: Store, storage: Storage, dispatcher: Dispatcher, workers: Workers
) -> None:
    batch = submit(store, 1, steps=3)
    with workers(step_s=0.2) as process:
        until(lambda: store.batch(batch.id).counts[State.RUNNING] == 1)
        process.signal(signal.SIGTERM)
        assert process.ended(30) == 0
    check_ledger(store, storage, batch)


def test_a_worker_that_is_told_to_stop_loses_no_step_and_the_next_one_goes_on_where_it_was(
    settings: Settings, store: Store, storage: Storage, dispatcher: Dispatcher, workers: Workers, steps_file: Path
) -> None:
    batch = submit(store, 1, steps=60)
    with workers(step_s=0.1, OVIS_GRACE_S="1") as process:
        until(lambda: len(steps_of(steps_file)) >= 3)
        process.signal(signal.SIGTERM)
        assert process.ended(30) == 0
    stopped_at = len(steps_of(steps_file))
    assert 3 < stopped_at < 60
    with workers(step_s=0.01):
        until(lambda: store.batch(batch.id).done)
    check_ledger(store, storage, batch)
    assert steps_of(steps_file) == list(range(60))


def test_a_kill_costs_no_more_steps_than_lie_between_two_checkpoints(
    settings: Settings, store: Store, storage: Storage, dispatcher: Dispatcher, workers: Workers, steps_file: Path
) -> None:
    batch = submit(store, 1, steps=40)
    with workers(step_s=0.1, OVIS_CHECKPOINT_STEPS="5") as process:
        until(lambda: len(steps_of(steps_file)) >= 13)
        process.kill()
        process.ended()
    with workers(step_s=0.1, OVIS_CHECKPOINT_STEPS="5"):
        until(lambda: store.batch(batch.id).done)
    check_ledger(store, storage, batch)
    drawn = steps_of(steps_file)
    assert set(drawn) == set(range(40))
    assert 40 < len(drawn) <= 45


def test_a_worker_that_is_killed_soon_after_it_was_told_to_stop_has_put_its_images_in_safety(
    settings: Settings, store: Store, storage: Storage, dispatcher: Dispatcher, workers: Workers, steps_file: Path
) -> None:
    batch = submit(store, 3, steps=50)
    with workers(step_s=0.1, OVIS_CHECKPOINT_STEPS="0", OVIS_GRACE_S="60") as process:
        until(lambda: len(steps_of(steps_file)) >= 9)
        assert objects(storage, CHECKPOINTS) == []
        process.signal(signal.SIGTERM)
        until(lambda: len(objects(storage, CHECKPOINTS)) == 3)
        time.sleep(0.1)  # for the last of them to be noted in its row
        process.kill()
        process.ended()
    with workers(step_s=0.01):
        until(lambda: store.batch(batch.id).done)
    check_ledger(store, storage, batch)
    assert len(steps_of(steps_file)) <= 3 * (50 + 3)


def test_a_worker_that_is_told_to_stop_in_a_step_longer_than_its_time_gives_its_claims_back_all_the_same(
    settings: Settings, store: Store, storage: Storage, dispatcher: Dispatcher, workers: Workers
) -> None:
    batch = submit(store, 3, steps=5)
    with workers(step_s=60, OVIS_GRACE_S="1") as process:
        until(lambda: store.batch(batch.id).counts[State.RUNNING] == 3)
        process.signal(signal.SIGTERM)
        assert process.ended(15) == 0
    for job in store.batch_jobs(batch.id):
        assert (job.state, job.failures, outcomes(store, job.id)) == (State.QUEUED, 0, ["drained"])


def test_a_worker_that_is_told_to_stop_keeps_every_step_that_it_finishes_however_long_they_take(
    settings: Settings, store: Store, storage: Storage, dispatcher: Dispatcher, workers: Workers, steps_file: Path
) -> None:
    submit(store, 1, steps=10)
    with workers(step_s=2, OVIS_GRACE_S="4.2", OVIS_CHECKPOINT_STEPS="0") as process:
        until(lambda: len(steps_of(steps_file)) == 1)
        process.signal(signal.SIGTERM)
        assert process.ended(15) == 0
    assert [key.rsplit("-")[-1] for key in objects(storage, CHECKPOINTS)][-1:] == ["3.safetensors"], "of 6 s"


def test_a_worker_whose_bucket_hangs_gives_its_claims_back_before_it_ends_at_its_deadline(
    settings: Settings, store: Store, storage: Storage, dispatcher: Dispatcher, workers: Workers, steps_file: Path
) -> None:
    assert settings.s3_endpoint_url is not None
    gate = Gate(settings.s3_endpoint_url)
    own = settings.model_copy(update={"s3_endpoint_url": gate.url})
    batch = submit(store, 2, steps=10)
    with workers(own=own, step_s=0.1, OVIS_GRACE_S="0.5", OVIS_CHECKPOINT_STEPS="0") as process:
        until(lambda: len(steps_of(steps_file)) >= 4)
        with gate.swallowing():
            until(lambda: len(steps_of(steps_file)) == 2 * 10)
            time.sleep(0.3)  # for the images to be encoded
            process.signal(signal.SIGTERM)
            assert process.ended(15) == 75
    gate.stop()
    for job in store.batch_jobs(batch.id):
        assert (job.state, job.failures, outcomes(store, job.id)) == (State.QUEUED, 0, ["drained"])


def test_another_ctrl_c_ends_a_worker_at_once_and_its_claims_are_given_back(
    settings: Settings, store: Store, storage: Storage, dispatcher: Dispatcher, workers: Workers, tmp_path: Path
) -> None:
    batch = submit(store, 2, steps=100)
    with workers(step_s=0.1, OVIS_GRACE_S="60") as process:
        until(lambda: store.batch(batch.id).counts[State.RUNNING] == 2)
        process.signal(signal.SIGINT)
        time.sleep(ECHO_S + 0.3)
        process.signal(signal.SIGINT)
        assert process.ended(5) == 130
    assert "Traceback" not in (tmp_path / "log").read_text()
    for job in store.batch_jobs(batch.id):
        assert (job.state, job.failures, outcomes(store, job.id)) == (State.QUEUED, 0, ["drained"])


CRASHING = """
import pathlib, sys
from celery.worker import state
from tests.blank_worker import main
flag, looks = pathlib.Path(sys.argv.pop(1)), state.maybe_shutdown
def crash():
    if flag.exists(): raise RuntimeError("Celery's own bug")
    looks()
state.maybe_shutdown = crash
sys.exit(main())
"""


def test_a_worker_whose_consumer_crashes_gives_back_what_it_cannot_finish_and_ends(
    settings: Settings, store: Store, storage: Storage, dispatcher: Dispatcher, tmp_path: Path
) -> None:
    batch, flag = submit(store, 2, steps=100), tmp_path / "crash"
    process = subprocess.Popen(
        [sys.executable, "-c", CRASHING, str(flag), "--step-s", "0.2"],
        env=environment(settings) | {"OVIS_GRACE_S": "1"}, cwd=ROOT, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        until(lambda: store.batch(batch.id).counts[State.RUNNING] == 2, timeout_s=60)
        flag.touch()
        assert process.wait(20) == 1
    finally:
        process.kill()
        process.communicate()
    for job in store.batch_jobs(batch.id):
        assert (job.state, job.failures, outcomes(store, job.id)) == (State.QUEUED, 0, ["drained"])


def test_the_real_engine_goes_on_in_another_process_to_the_very_same_file(
    settings: Settings, store: Store, storage: Storage, dispatcher: Dispatcher, workers: Workers, steps_file: Path
) -> None:
    rows = [
        Submission(prompt='a red "S"', width=256, height=256, steps=100, seed=7, priority=priority)
        for priority in (Priority.INTERACTIVE, Priority.BULK)
    ]
    interrupted, whole = store.batch_jobs(store.submit_batch("b", rows, max_failures=3).id)
    # After a grace of 2 s there is one second for the last checkpoint, also on a busy machine.
    tiny = {"OVIS_MODEL": "tiny", "OVIS_DEVICE": "cpu", "OVIS_GRACE_S": "2", "OMP_NUM_THREADS": "1"}
    with workers(engine="tiny", **tiny) as process:
        until(lambda: len(steps_of(steps_file)) >= 5)
        process.signal(signal.SIGTERM)
        assert process.ended(60) == 0
    assert outcomes(store, interrupted.id) == ["drained"]
    assert [key.split("/")[1] for key in objects(storage, CHECKPOINTS)] == [str(interrupted.id)]
    with workers(engine="tiny", **tiny):
        until(lambda: all(store.job(job.id).state is State.SUCCEEDED for job in (interrupted, whole)), timeout_s=120)
    assert outcomes(store, interrupted.id) == ["drained", "succeeded"]
    assert len(steps_of(steps_file)) == 2 * 100
    assert store.job(interrupted.id).sha256 == store.job(whole.id).sha256


def test_an_outage_of_redis_is_two_lines_of_the_log_and_ends_by_itself(
    settings: Settings, store: Store, storage: Storage, dispatcher: Dispatcher, workers: Workers, tmp_path: Path
) -> None:
    gate, log = Gate(settings.require("redis_url")), tmp_path / "log"
    own = settings.model_copy(update={"redis_url": SecretStr(gate.url)})
    first = submit(store, 2)
    with workers(own=own):
        until(lambda: store.batch(first.id).done)
        with gate.shut():
            gate.cut()
            until(lambda: gate.refused >= 3)
        second = submit(store, 2)
        until(lambda: store.batch(second.id).done)
    gate.stop()
    lines = log.read_text().splitlines()
    assert "Traceback" not in log.read_text()
    told = [line for line in lines if "Redis" in line or "celery" in line or "broker" in line]
    assert [line.split(" worker.outages: ")[-1].split(":")[0] for line in told] == [
        "waiting for Redis",
        "Redis answers again",
    ]


def test_with_postgres_and_the_bucket_away_no_job_fails_or_is_drawn_twice_and_each_is_told_in_two_lines(
    settings: Settings, store: Store, storage: Storage, workers: Workers, tmp_path: Path, steps_file: Path
) -> None:
    assert settings.s3_endpoint_url is not None
    gates = [Gate(settings.require("database_url")), Gate(settings.s3_endpoint_url)]
    log = tmp_path / "log"
    own = settings.model_copy(update={"database_url": SecretStr(gates[0].url), "s3_endpoint_url": gates[1].url})
    batch = submit(store, 12, steps=20)
    away = Store.at(gates[0].url)
    with dispatching(settings, away), workers(own=own, step_s=0.1):
        until(lambda: len(steps_of(steps_file)) > 12)
        with gates[0].shut(), gates[1].shut():
            until(lambda: len(steps_of(steps_file)) == 12 * 20)
            time.sleep(3 * settings.durations.lease_s)
        until(lambda: store.batch(batch.id).done)
    away.close()
    for gate in gates:
        gate.stop()
    check_ledger(store, storage, batch)
    assert len(steps_of(steps_file)) == 12 * 20
    assert all(outcomes(store, job.id) == ["succeeded"] for job in store.batch_jobs(batch.id))
    told = [line.split(" worker.outages: ")[-1] for line in log.read_text().splitlines() if " worker.outages: " in line]
    assert sorted(line.split(":")[0] for line in told) == [
        "Postgres answers again", "S3 answers again", "waiting for Postgres", "waiting for S3",
    ]  # fmt: skip


def test_a_cancel_reaches_a_running_job_within_two_seconds_and_frees_its_place(
    settings: Settings, store: Store, storage: Storage, dispatcher: Dispatcher, workers: Workers
) -> None:
    batch = submit(store, 1, steps=100)
    (job,) = store.batch_jobs(batch.id)
    with workers(step_s=0.5):
        until(lambda: store.job(job.id).state is State.RUNNING)
        until(lambda: store.farm(lease_s=60).workers[0].drawing)
        store.cancel(job.id)
        until(lambda: not store.farm(lease_s=60).workers[0].drawing, timeout_s=2)
    assert outcomes(store, job.id) == ["cancelled"]


def test_rubbish_in_redis_is_passed_over_with_a_line_for_each(
    settings: Settings, store: Store, storage: Storage, dispatcher: Dispatcher, workers: Workers, tmp_path: Path
) -> None:
    broker, log = redis.Redis.from_url(settings.require("redis_url")), tmp_path / "log"
    queue = Queue(settings.require("redis_url"))
    with workers() as process:
        until(lambda: store.farm(lease_s=60).workers)
        finished = submit(store, 1)
        until(lambda: store.batch(finished.id).done)
        (job,) = store.batch_jobs(finished.id)
        for job_id, claim in (("no uuid", 1), (str(UUID(int=1)), 1), (str(UUID(int=1)), "one"), (str(job.id), 1)):
            queue._app.send_task("ovis.draw", args=(job_id, claim), task_id=f"{job_id}:{claim}", queue=QUEUE)
        queue._app.send_task("of.nobody", queue=QUEUE)
        broker.lpush(QUEUE, "no JSON")
        batch = submit(store, 3)
        until(lambda: store.batch(batch.id).done)
        until(lambda: not broker.keys())  # nothing of the rubbish is left anywhere
        assert process.alive
    queue.close()
    broker.close()
    lines = log.read_text().splitlines()
    assert "Traceback" not in log.read_text()
    assert len([line for line in lines if "no message of this farm" in line]) == 4
    assert len([line for line in lines if "nobody waits for claim 1" in line]) == 2


def test_a_worker_tells_prometheus_how_its_jobs_ended_and_how_long_each_phase_took(
    settings: Settings, store: Store, storage: Storage, dispatcher: Dispatcher, workers: Workers
) -> None:
    port = free_port()
    batch = submit(store, 3)
    with workers(OVIS_METRICS_PORT=str(port)):
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
