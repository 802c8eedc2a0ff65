"""A person deletes what a worker draws: the worker ends quietly, and the sweep takes what it left."""

import logging
import threading
import time
from collections.abc import Callable

import pytest

from producer.jobs.contract import Batch, Job, Submission
from producer.jobs.settings import Durations
from producer.jobs.storage import Storage
from producer.jobs.store import Store
from producer.jobs.sweep import Sweeper
from tests.integration.worker.conftest import Workshop
from tests.waiting import until

Workshops = Callable[..., Workshop]


def hand_in(store: Store, *, steps: int, count: int = 2) -> tuple[Batch, list[Job]]:
    wanted = [Submission(prompt="a", width=64, height=64, steps=steps, seed=n) for n in range(count)]
    batch = store.submit_batch("b", wanted, max_failures=3)
    return batch, store.batch_jobs(batch.id)


def keys_in(storage: Storage) -> set[str]:
    return {key for page in storage.pages("") for key in page}


def sweep(store: Store, storage: Storage) -> None:
    """What is deleted goes at once."""
    Sweeper(store, storage, Durations(scale=1e-6), leads=lambda: True).walk(threading.Event())


def test_a_worker_that_draws_for_a_deleted_batch_ends_quietly_and_goes_on_with_the_next(
    store: Store, storage: Storage, workshops: Workshops, caplog: pytest.LogCaptureFixture
) -> None:
    workshop = workshops(step_s=0.05, checkpoint_steps=2)
    batch, jobs = hand_in(store, steps=100)
    with caplog.at_level(logging.INFO):
        ends = [workshop.take(job) for job in jobs]
        until(lambda: any("checkpoints" in key for key in keys_in(storage)))
        store.delete_batch(batch.id)
        for end in ends:
            end.result(60)
        assert len(workshop.drawn) < 200
    assert [record.message for record in caplog.records if record.levelno > logging.INFO] == []
    _, (following,) = hand_in(store, steps=1, count=1)
    workshop.take(following).result(60)
    kept = store.job(following.id).object_key
    assert kept is not None
    until(lambda: _emptied(store, storage, keep=kept))


def _emptied(store: Store, storage: Storage, keep: str) -> bool:
    sweep(store, storage)
    return keys_in(storage) == {keep}


def test_an_image_that_is_drawn_when_its_batch_is_deleted_is_neither_recorded_nor_left(
    store: Store, storage: Storage, workshops: Workshops, monkeypatch: pytest.MonkeyPatch
) -> None:
    workshop = workshops()
    batch, (job,) = hand_in(store, steps=1, count=1)
    put = Storage.put

    def deleted_meanwhile(bucket: Storage, key: str, body: bytes, media_type: str) -> None:
        store.delete_batch(batch.id)
        put(bucket, key, body, media_type)

    monkeypatch.setattr(Storage, "put", deleted_meanwhile)
    workshop.take(job).result(60)
    assert keys_in(storage) == {f"images/{batch.id}/{job.id}/1.png"}
    time.sleep(0.01)  # longer than the sweep waits here
    sweep(store, storage)
    assert keys_in(storage) == set()
    assert store.deletions(after_s=0) == []
