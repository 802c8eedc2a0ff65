"""What the sweep removes from a real bucket, by what a real Postgres says of it."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from uuid import UUID, uuid4

import pytest

from pipeline.request import ImageFormat
from producer.jobs.contract import DEFAULT_TENANT, Claim, Job, State, Submission
from producer.jobs.errors import NotFound, Unavailable
from producer.jobs.files import Files, file_key
from producer.jobs.settings import Durations, Settings
from producer.jobs.storage import Storage, checkpoint_key, object_key
from producer.jobs.store import Store
from producer.jobs.sweep import Sweeper
from tests.conftest import database_url
from tests.farm import Farmhand, free_port
from tests.waiting import until

QUICK = Durations(scale=0.001)


@pytest.fixture
def farmhand(settings: Settings) -> Iterator[Farmhand]:
    farmhand = Farmhand(settings)
    yield farmhand
    farmhand.close()


@pytest.fixture
def sweep(store: Store, storage: Storage) -> Callable[[], int]:
    """One walk through the bucket; returns how many objects it removed."""
    sweeper = Sweeper(store, storage, QUICK, leads=lambda: True)

    def walk() -> int:
        before = sweeper.swept
        sweeper.walk(threading.Event())
        return sweeper.swept - before

    return walk


@contextmanager
def sweeping(sweeper: Sweeper) -> Iterator[None]:
    stop = threading.Event()
    thread = threading.Thread(target=sweeper.run, args=(stop,), name="sweep")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(20)
        assert not thread.is_alive()


def submit(store: Store) -> Job:
    return store.submit(Submission.model_validate({"prompt": "a", "width": 64, "height": 64}), max_failures=3)


def leave_behind(storage: Storage, claim: Claim) -> list[str]:
    """An image and a checkpoint of this claim, of which no row knows; returns their keys."""
    keys = [
        object_key(claim.batch_id, claim.job_id, claim.claim, ImageFormat.PNG),
        checkpoint_key(claim.job_id, claim.claim, 20),
    ]
    for key in keys:
        storage.put(key, b"left behind", "application/octet-stream")
    return keys


def keys_in(storage: Storage) -> set[str]:
    return {key for page in storage.pages("") for key in page}


def test_what_a_lost_claim_left_is_removed_and_the_recorded_image_stays(
    store: Store, storage: Storage, farmhand: Farmhand, sweep: Callable[[], int]
) -> None:
    job = submit(store)
    lost = farmhand.claim(job)
    left = leave_behind(storage, lost)
    store.give_back(lost)
    farmhand.succeed(store.job(job.id))
    assert sweep() == len(left)
    assert keys_in(storage) == {store.job(job.id).object_key}


def test_what_a_running_claim_has_uploaded_and_not_yet_recorded_stays(
    store: Store, storage: Storage, farmhand: Farmhand, sweep: Callable[[], int]
) -> None:
    left = leave_behind(storage, farmhand.claim(submit(store)))
    assert sweep() == 0
    assert keys_in(storage) == set(left)


def test_a_checkpoint_that_a_row_points_to_stays_until_the_job_has_ended(
    store: Store, storage: Storage, farmhand: Farmhand, sweep: Callable[[], int]
) -> None:
    job = submit(store)
    claim = farmhand.claim(job)
    old, new = (checkpoint_key(job.id, claim.claim, step) for step in (20, 40))
    for key in (old, new):
        storage.put(key, b"latents", "application/octet-stream")
    store.note_checkpoint(claim, new, 40)
    store.give_back(claim)
    assert sweep() == 1
    assert keys_in(storage) == {new}
    again = farmhand.claim(store.job(job.id))
    assert again.checkpoint_key == new
    assert sweep() == 0
    store.fail(again, "invalid", "of no matter")
    assert sweep() == 1
    assert keys_in(storage) == set()


def test_a_claim_that_comes_between_question_and_deletion_loses_nothing(
    store: Store, storage: Storage, farmhand: Farmhand
) -> None:
    job = submit(store)
    lost = farmhand.claim(job)
    left = leave_behind(storage, lost)
    store.give_back(lost)
    theirs: list[str] = []

    class ClaimedMeanwhile(Store):
        def sweepable(self, keys: list[str]) -> list[str]:  # type: ignore[override]
            answer = store.sweepable(keys)
            if not theirs:
                theirs.extend(leave_behind(storage, farmhand.claim(store.job(job.id))))
            return answer

    Sweeper(ClaimedMeanwhile(store.database), storage, QUICK, leads=lambda: True).walk(threading.Event())
    assert keys_in(storage) == set(theirs)
    assert not keys_in(storage) & set(left)


@pytest.mark.parametrize(
    "foreign",
    [
        f"images/single/{uuid4()}/1.png",
        f"images/{uuid4()}/{uuid4()}/1.png",
        f"checkpoints/{uuid4()}/1-20.safetensors",
        "images/single/------------------------------------/1.png",
        "images/single/{job}/0001234567890123.png",
        "images/single/{job}/1/2.png",
        "images/single/{job}",
        "images/logo.png",
        "images/",
        "checkpoints/somebody's.safetensors",
        "other/{job}/1.png",
        "春.png",
    ],
)
def test_a_key_that_is_not_this_farms_is_left_alone(
    store: Store, storage: Storage, farmhand: Farmhand, sweep: Callable[[], int], foreign: str
) -> None:
    job = submit(store)
    lost = farmhand.claim(job)
    left = leave_behind(storage, lost)
    store.give_back(lost)
    key = foreign.format(job=job.id)
    storage.put(key, b"somebody else's", "application/octet-stream")
    assert sweep() == len(left)
    assert keys_in(storage) == {key}


def test_a_large_bucket_is_swept_page_by_page(
    store: Store, storage: Storage, farmhand: Farmhand, sweep: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("producer.jobs.storage.PAGE", 2)
    jobs = [submit(store) for _ in range(5)]
    for job in jobs:
        lost = farmhand.claim(job)
        leave_behind(storage, lost)
        store.give_back(lost)
        farmhand.succeed(store.job(job.id))
    assert sweep() == 10
    assert keys_in(storage) == {store.job(job.id).object_key for job in jobs}


def test_nothing_is_removed_while_another_leads(store: Store, storage: Storage, farmhand: Farmhand) -> None:
    lost = farmhand.claim(submit(store))
    left = leave_behind(storage, lost)
    store.give_back(lost)
    leads = threading.Event()
    asked = threading.Semaphore(0)

    def answer() -> bool:
        asked.release()
        return leads.is_set()

    sweeper = Sweeper(store, storage, QUICK, leads=answer)
    with sweeping(sweeper):
        for _ in range(3):
            assert asked.acquire(timeout=20)
        assert keys_in(storage) == set(left)
        leads.set()
        until(lambda: sweeper.swept == len(left))
    assert keys_in(storage) == set()


@pytest.mark.parametrize("away", ["S3", "Postgres"])
def test_a_server_that_is_away_is_waited_for_and_said_once(
    settings: Settings, store: Store, storage: Storage, farmhand: Farmhand, away: str, caplog: pytest.LogCaptureFixture
) -> None:
    lost = farmhand.claim(submit(store))
    left = leave_behind(storage, lost)
    store.give_back(lost)
    nowhere = {
        "S3": {"storage": Storage(settings.model_copy(update={"s3_endpoint_url": f"http://127.0.0.1:{free_port()}"}))},
        "Postgres": {"store": Store.at(database_url(settings, "nowhere"))},
    }
    tries = threading.Semaphore(0)

    def leads() -> bool:
        tries.release()
        return True

    sweeper = Sweeper(**({"store": store, "storage": storage} | nowhere[away]), durations=QUICK, leads=leads)  # type: ignore[arg-type]
    with caplog.at_level(logging.INFO, "producer.jobs.sweep"), sweeping(sweeper):
        for _ in range(6):
            assert tries.acquire(timeout=20)
        sweeper._store, sweeper._storage = store, storage
        until(lambda: sweeper.swept == len(left))
        until(lambda: "answers again" in caplog.text)
    assert caplog.text.count("waits for") == 1
    assert caplog.text.count(f"{away} answers again") == 1
    for part in nowhere[away].values():
        part.close()


# What a person deleted.


def drawn_batch(store: Store, farmhand: Farmhand, seeds: list[int], *, deduplicate: bool = False) -> list[Job]:
    wanted = [Submission.model_validate({"prompt": "a", "width": 64, "height": 64, "seed": seed}) for seed in seeds]
    batch = store.submit_batch("b", wanted, max_failures=3, deduplicate=deduplicate)
    farmhand.beat()
    for job in store.batch_jobs(batch.id, state=State.QUEUED):
        farmhand.succeed(job)
    return store.batch_jobs(batch.id)


def image_keys(*jobs: Job) -> set[str]:
    return {job.object_key for job in jobs if job.object_key}


def deletions_left(store: Store) -> int:
    return len(store.deletions(after_s=0))


def delete(store: Store, jobs: list[Job]) -> None:
    assert jobs[0].batch_id is not None
    store.delete_batch(jobs[0].batch_id)


def test_the_images_of_a_deleted_batch_go_and_those_of_others_stay(
    store: Store, storage: Storage, farmhand: Farmhand, sweep: Callable[[], int]
) -> None:
    gone, stay = drawn_batch(store, farmhand, [1, 2, 3]), drawn_batch(store, farmhand, [4])
    delete(store, gone)
    until(lambda: sweep() == 3)
    assert keys_in(storage) == image_keys(*stay)
    assert deletions_left(store) == 0


def test_what_was_deleted_waits_for_workers_that_may_still_upload(
    store: Store, storage: Storage, farmhand: Farmhand
) -> None:
    gone = drawn_batch(store, farmhand, [1])
    delete(store, gone)
    Sweeper(store, storage, Durations(scale=1), leads=lambda: True).walk(threading.Event())
    assert keys_in(storage) == image_keys(*gone)
    assert deletions_left(store) == 1


def test_an_image_that_jobs_of_two_batches_share_goes_with_the_last_of_them(
    store: Store, storage: Storage, farmhand: Farmhand, sweep: Callable[[], int]
) -> None:
    first = drawn_batch(store, farmhand, [1, 2])
    second = drawn_batch(store, farmhand, [2, 3], deduplicate=True)
    assert second[0].copy_of == first[1].id
    delete(store, first)
    until(lambda: deletions_left(store) == 0 or not sweep())
    until(lambda: sweep() == 0 and deletions_left(store) == 0)
    assert keys_in(storage) == image_keys(*second)
    assert storage.get(second[0].object_key or "")
    delete(store, second)
    until(lambda: sweep() == 0 and deletions_left(store) == 0)
    assert keys_in(storage) == set()


def test_a_deletion_that_is_broken_off_goes_on_later(
    store: Store, storage: Storage, farmhand: Farmhand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("producer.jobs.storage.PAGE", 2)
    delete(store, drawn_batch(store, farmhand, [1, 2, 3, 4, 5]))
    until(lambda: store.deletions(after_s=QUICK.sweep_s))
    answers = iter([True, False])
    Sweeper(store, storage, QUICK, leads=lambda: next(answers)).walk(threading.Event())
    assert (len(keys_in(storage)), deletions_left(store)) == (3, 1)
    Sweeper(store, storage, QUICK, leads=lambda: True).walk(threading.Event())
    assert (len(keys_in(storage)), deletions_left(store)) == (0, 0)


def test_a_deletion_is_broken_off_between_prefixes_that_hold_nothing(
    store: Store, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = Files(store.database)
    for _ in range(5):
        files.expect(uuid4(), tenant=DEFAULT_TENANT)
    until(lambda: len(store.deletions(after_s=QUICK.sweep_s)) == 5)
    stop = threading.Event()
    looked: list[str] = []

    def none(prefix: str) -> Iterator[list[str]]:
        looked.append(prefix)
        stop.set()
        return iter(())

    monkeypatch.setattr(storage, "pages", none)
    Sweeper(store, storage, QUICK, leads=lambda: True).walk(stop)
    assert len(looked) == 1
    assert deletions_left(store) == 5


# Uploaded files.


def put(storage: Storage, file_id: UUID) -> str:
    key = file_key(DEFAULT_TENANT, file_id)
    storage.put(key, b"{}", "application/jsonl")
    return key


def test_a_file_whose_row_never_came_goes_and_one_whose_row_came_stays(
    store: Store, storage: Storage, sweep: Callable[[], int]
) -> None:
    files = Files(store.of(DEFAULT_TENANT).database)
    lost, kept = uuid4(), uuid4()
    noted = {file_id: files.expect(file_id, tenant=DEFAULT_TENANT) for file_id in (lost, kept)}
    put(storage, lost)
    key = put(storage, kept)
    facts = {"tenant": DEFAULT_TENANT, "name": "a", "purpose": "batch", "size_bytes": 2}
    files.add(kept, note=noted[kept], within_s=60, **facts)
    until(lambda: sweep() == 1)
    assert keys_in(storage) == {key}
    assert files.file(kept).object_key == key
    assert deletions_left(store) == 0


def test_a_file_that_came_too_late_is_refused_and_goes(
    store: Store, storage: Storage, sweep: Callable[[], int]
) -> None:
    files = Files(store.database)
    late = uuid4()
    note = files.expect(late, tenant=DEFAULT_TENANT)
    until(lambda: sweep() == 0 and deletions_left(store) == 0)
    put(storage, late)
    facts = {"tenant": DEFAULT_TENANT, "name": "a", "purpose": "batch", "size_bytes": 2}
    with pytest.raises(Unavailable):
        files.add(late, note=note, within_s=60, **facts)
    with pytest.raises(NotFound):
        files.file(late)
    until(lambda: sweep() == 1)
    assert keys_in(storage) == set()
