"""Previews on their way from the engine to the bucket and the row."""

import io
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from producer.jobs.contract import Job, Message, State, Submission
from producer.jobs.errors import LostClaim
from producer.jobs.settings import Durations, Settings
from producer.jobs.storage import PREVIEWS, Storage, preview_key
from producer.jobs.store import Store
from producer.jobs.sweep import Sweeper
from tests.blank_worker import BlankEngine
from tests.farm import Farmhand
from tests.integration.worker.conftest import Gate, Workshop
from tests.waiting import until

Workshops = Callable[..., Workshop]


def submit(store: Store, previews: int, steps: int = 40) -> Job:
    submission = Submission(prompt="a", width=64, height=64, steps=steps)
    return store.submit(submission, max_failures=3, previews=previews)


def previews(storage: Storage) -> list[str]:
    return [key for page in storage.pages(PREVIEWS) for key in page]


class Held(BlankEngine):
    """Does not go on behind step 25 before it may."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.previews = 0
        super().__init__(0.01, lambda request, step: step != 25 or not self.go_on.wait(60))  # type: ignore[arg-type,return-value]

    def preview(self, ticket: int) -> NDArray[np.uint8]:
        self.previews += 1
        return super().preview(ticket)


@pytest.fixture
def engine() -> Iterator[Held]:
    held = Held()
    yield held
    held.go_on.set()


def test_the_row_points_to_the_last_preview_and_with_the_image_it_goes(
    store: Store, storage: Storage, workshops: Workshops, engine: Held
) -> None:
    workshop, job = workshops(engine=engine), submit(store, previews=3)
    ended = workshop.take(job)
    last = preview_key(job.id, 1, 20)
    until(lambda: store.job(job.id).preview_key == last)
    until(lambda: previews(storage) == [last])
    with Image.open(io.BytesIO(storage.get(last))) as picture:
        assert (picture.format, picture.size) == ("JPEG", (64, 32))
    engine.go_on.set()
    ended.result(60)
    assert (store.job(job.id).state, store.job(job.id).preview_key) == (State.SUCCEEDED, None)
    until(lambda: not previews(storage))
    assert engine.previews == 3


def test_a_job_without_previews_is_never_asked_for_one(
    store: Store, storage: Storage, workshops: Workshops, engine: Held
) -> None:
    engine.go_on.set()
    workshops(engine=engine).take(submit(store, previews=0)).result(60)
    assert engine.previews == 0


def test_a_cancelled_job_leaves_no_preview(store: Store, storage: Storage, workshops: Workshops, engine: Held) -> None:
    workshop, job = workshops(engine=engine), submit(store, previews=1)
    ended = workshop.take(job)
    until(lambda: store.job(job.id).preview_key)
    assert store.cancel(job.id).preview_key is None
    engine.go_on.set()
    ended.result(60)
    until(lambda: not previews(storage))


def test_a_job_that_is_given_back_shows_no_preview_until_it_is_drawn_again(
    store: Store, storage: Storage, workshops: Workshops, engine: Held
) -> None:
    workshop, job = workshops(engine=engine), submit(store, previews=1)
    workshop.take(job)
    until(lambda: store.job(job.id).preview_key)
    workshop.give_back()
    engine.go_on.set()
    until(lambda: store.job(job.id).state is State.QUEUED)
    assert store.job(job.id).preview_key is None
    until(lambda: not previews(storage))


def test_drawing_does_not_wait_for_a_bucket_that_takes_no_previews(
    store: Store, behind_bucket_gate: Workshops, bucket_gate: Gate, engine: Held
) -> None:
    workshop, job = behind_bucket_gate(engine=engine, checkpoint_steps=0), submit(store, previews=3)
    with bucket_gate.swallowing():
        workshop.worker._device.draw("warm", job.request)
        ended = workshop.take(job)
        until(lambda: engine.previews == 2)
        engine.go_on.set()
        until(lambda: engine.previews == 3)
        assert not ended.done()
    ended.result(60)
    assert store.job(job.id).state is State.SUCCEEDED


def test_only_the_claim_that_holds_the_job_may_point_to_a_preview(store: Store, hand: Farmhand) -> None:
    job = submit(store, previews=1)
    hand.beat()
    claim = hand.claim(job)
    assert claim.previews == 1
    store.note_preview(claim, "one")
    assert store.job(job.id).preview_key == "one"
    store.give_back(claim)
    with pytest.raises(LostClaim):
        store.note_preview(claim, "another")
    assert store.job(job.id).preview_key is None


def test_previews_that_no_row_points_to_are_swept(store: Store, storage: Storage, hand: Farmhand) -> None:
    job = submit(store, previews=1)
    hand.beat()
    hand.claim(job)
    keys = [preview_key(job.id, 1, step) for step in (5, 10)]
    lost = store.claim(Message(job.id, 1), hand.id)
    assert lost is None
    for key in keys:
        storage.put(key, b"x", "image/jpeg")
    sweeper = Sweeper(store, storage, Durations(scale=0.001), leads=lambda: True)
    sweeper.walk(threading.Event())
    assert previews(storage) == sorted(keys), "a claim that runs may still point to them"
    store.give_back_all(hand.id)
    sweeper.walk(threading.Event())
    assert previews(storage) == []


@pytest.fixture
def hand(settings: Settings) -> Iterator[Farmhand]:
    farmhand = Farmhand(settings)
    yield farmhand
    farmhand.close()
