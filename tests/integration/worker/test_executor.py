"""The way of a job through a worker when something on it is away: what is drawn is kept, and never drawn again."""

import hashlib
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pipeline.engine import Finished
from pipeline.errors import DrawingFailed
from producer.jobs.contract import Job, Message, State, Submission
from producer.jobs.settings import Settings
from producer.jobs.storage import CHECKPOINTS, IMAGES, Storage
from producer.jobs.store import Store
from tests.blank_worker import BlankEngine
from tests.integration.worker.conftest import Gate, Workshop
from tests.waiting import until
from worker.held import Latents

STEPS = 40
Workshops = Callable[..., Workshop]


def submit(store: Store, prompt: str = "a", steps: int = STEPS) -> Job:
    return store.submit(Submission(prompt=prompt, width=64, height=64, steps=steps), max_failures=3)


def objects(storage: Storage, prefix: str) -> list[str]:
    return [key for page in storage.pages(prefix) for key in page]


def check(store: Store, storage: Storage, job: Job) -> None:
    """It succeeded, its object is the one that the row says, and there is no other of it."""
    job = store.job(job.id)
    assert (job.state, job.failures) == (State.SUCCEEDED, 0)
    assert job.object_key is not None
    assert objects(storage, IMAGES) == [job.object_key]
    assert hashlib.sha256(storage.get(job.object_key)).hexdigest() == job.sha256


def steps_of(*workshops: Workshop) -> list[int]:
    return [step for workshop in workshops for _, step in workshop.drawn]


# Checkpoints on the way


def test_the_row_points_to_a_checkpoint_of_every_so_many_steps_and_the_bucket_holds_that_one_alone(
    store: Store, storage: Storage, workshops: Workshops
) -> None:
    workshop = workshops(step_s=0.02, checkpoint_steps=15)
    job = submit(store)
    ended = workshop.take(job)
    until(lambda: objects(storage, CHECKPOINTS) == [f"checkpoints/{job.id}/1-15.safetensors"])
    until(lambda: objects(storage, CHECKPOINTS) == [f"checkpoints/{job.id}/1-30.safetensors"])
    ended.result(10)
    check(store, storage, job)
    until(lambda: not objects(storage, CHECKPOINTS))


def test_without_a_number_of_steps_no_checkpoint_is_taken_on_the_way(
    store: Store, storage: Storage, workshops: Workshops
) -> None:
    workshop = workshops(checkpoint_steps=0)
    job = submit(store)
    ended = workshop.take(job)
    while not ended.done():
        assert not objects(storage, CHECKPOINTS)
    check(store, storage, job)


def test_a_job_that_is_given_back_goes_on_at_the_step_where_it_was(
    store: Store, storage: Storage, workshops: Workshops
) -> None:
    first = workshops(step_s=0.02)
    job = submit(store)
    first.take(job)
    until(lambda: len(first.drawn) >= 7)
    first.stop()
    job = store.job(job.id)
    assert (job.state, job.failures, store.history(job.id)[0]["outcome"]) == (State.QUEUED, 0, "drained")
    second = workshops()
    second.take(job).result(10)
    check(store, storage, job)
    assert steps_of(first, second) == list(range(1, STEPS + 1)), "no step was drawn twice"
    until(lambda: not objects(storage, CHECKPOINTS))


def test_a_job_that_is_given_back_again_and_again_draws_each_step_once(
    store: Store, storage: Storage, workshops: Workshops
) -> None:
    job, all_of_them = submit(store), []
    while store.job(job.id).state is State.QUEUED:
        workshop = workshops(step_s=0.01)
        all_of_them.append(workshop)
        ended = workshop.take(store.job(job.id))
        until(lambda workshop=workshop, ended=ended: len(workshop.drawn) >= 12 or ended.done())
        workshop.stop()
    assert len(all_of_them) >= 3
    assert steps_of(*all_of_them) == list(range(1, STEPS + 1))
    check(store, storage, job)


@pytest.mark.parametrize("spoil", ["gone", "rubbish"])
def test_a_checkpoint_that_cannot_be_used_costs_a_fresh_start_and_one_line(
    spoil: str, store: Store, storage: Storage, workshops: Workshops, caplog: pytest.LogCaptureFixture
) -> None:
    first = workshops(step_s=0.02)
    job = submit(store)
    first.take(job)
    until(lambda: len(first.drawn) >= 3)
    first.stop()
    (key,) = objects(storage, CHECKPOINTS)
    storage.delete([key]) if spoil == "gone" else storage.put(key, b"rubbish", "")
    caplog.clear()
    second = workshops()
    second.take(store.job(job.id)).result(10)
    check(store, storage, job)
    assert steps_of(second) == list(range(1, STEPS + 1))
    assert len([line for line in caplog.messages if "start" in line]) == 1


def test_the_checkpoint_of_a_job_that_failed_is_removed_and_that_of_a_cancelled_one_can_be_swept(
    store: Store, storage: Storage, workshops: Workshops
) -> None:
    class Breaking(BlankEngine):
        def step(self) -> list[Finished]:
            broken = [ticket for ticket, (request, step) in self._inside.items() if step == 39 and request.seed == 1]
            ended = [Finished(ticket, error=DrawingFailed("asked for")) for ticket in broken if self.cancel(ticket)]
            return ended or super().step()

    workshop = workshops(engine=Breaking(0.03), checkpoint_steps=15)
    failing = store.submit(Submission(prompt="a", width=64, height=64, seed=1, steps=STEPS), max_failures=1)
    workshop.take(failing).result(10)
    assert store.job(failing.id).state is State.FAILED
    until(lambda: not objects(storage, CHECKPOINTS))
    cancelled = submit(store, steps=100)
    ended = workshop.take(cancelled)
    until(lambda: objects(storage, CHECKPOINTS))
    store.cancel(cancelled.id)
    ended.result(10)
    assert store.sweepable(objects(storage, CHECKPOINTS)) == objects(storage, CHECKPOINTS)


# The bucket is away


def test_an_image_that_cannot_be_stored_is_held_on_disk_and_stored_when_the_bucket_is_back(
    store: Store, storage: Storage, behind_bucket_gate: Workshops, bucket_gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    workshop = behind_bucket_gate()
    job = submit(store)
    with bucket_gate.shut():
        ended = workshop.take(job)
        until(lambda: workshop.worker._held.image(job.id) is not None)
        until(lambda: bucket_gate.refused > 6)
        assert not ended.done()
    ended.result(10)
    check(store, storage, job)
    assert steps_of(workshop) == list(range(1, STEPS + 1))
    assert workshop.worker._held.image(job.id) is None
    lines = [line for line in caplog.messages if "S3" in line]
    assert [line.split(":")[0] for line in lines] == ["waiting for S3", "S3 answers again"]


def test_a_drawn_image_that_a_worker_could_not_store_is_stored_by_the_next_one_and_not_drawn_again(
    store: Store, storage: Storage, behind_bucket_gate: Workshops, bucket_gate: Gate
) -> None:
    first, job = behind_bucket_gate(), submit(store)
    with bucket_gate.shut():
        ended = first.take(job)
        until(lambda: first.worker._held.image(job.id) is not None)
        first.give_back()
        ended.result(20)
    job = store.job(job.id)
    assert (job.state, job.failures) == (State.QUEUED, 0)
    second = behind_bucket_gate()
    second.take(job).result(10)
    check(store, storage, job)
    assert not second.drawn
    assert second.worker._held.image(job.id) is None


def test_a_held_image_of_another_model_is_drawn_again(store: Store, storage: Storage, workshops: Workshops) -> None:
    workshop, job = workshops(), submit(store)
    other = submit(store, prompt="of another request")
    workshop.take(other).result(10)
    key = store.job(other.id).object_key
    assert key is not None
    workshop.worker._held.keep_image(job.id, storage.get(key))
    workshop.take(job).result(10)
    assert ("a", STEPS) in workshop.drawn
    workshop.worker._held.keep_image((rubbish := submit(store)).id, b"rubbish")
    workshop.take(rubbish).result(10)
    assert store.job(rubbish.id).state is State.SUCCEEDED


def test_a_step_that_could_not_be_stored_at_the_end_is_gone_on_from_by_the_next_worker_of_the_host(
    store: Store, storage: Storage, behind_bucket_gate: Workshops, bucket_gate: Gate
) -> None:
    first, job = behind_bucket_gate(step_s=0.05), submit(store)
    ended = first.take(job)
    until(lambda: len(first.drawn) >= 5)
    with bucket_gate.shut():
        first.give_back()
        ended.result(20)
        assert not objects(storage, CHECKPOINTS)
    job = store.job(job.id)
    assert (job.state, job.failures) == (State.QUEUED, 0)
    second = behind_bucket_gate()
    second.take(job).result(10)
    check(store, storage, job)
    assert steps_of(first, second) == list(range(1, STEPS + 1))


def test_drawing_goes_on_while_no_checkpoint_can_be_stored_and_the_newest_is_when_it_can(
    store: Store, storage: Storage, behind_bucket_gate: Workshops, bucket_gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    workshop, job = behind_bucket_gate(step_s=0.02, checkpoint_steps=5), submit(store, steps=100)
    with bucket_gate.shut():
        ended = workshop.take(job)
        until(lambda: len(workshop.drawn) >= 40)
    until(lambda: objects(storage, CHECKPOINTS))
    assert len([line for line in caplog.messages if line.startswith("waiting for S3")]) == 1
    ended.result(10)
    check(store, storage, job)


def test_who_cannot_store_claims_nothing_until_the_bucket_answers(
    store: Store, storage: Storage, behind_bucket_gate: Workshops, bucket_gate: Gate
) -> None:
    workshop, first, second = behind_bucket_gate(), submit(store), submit(store, "b")
    with bucket_gate.shut():
        drawn = workshop.take(first)
        until(lambda: workshop.worker._outages.away("S3"))
        workshop.take(second).result(20)
        assert store.job(second.id).state is State.QUEUED
    until(lambda: workshop.take(second).exception(10) is None and store.job(second.id).state is State.SUCCEEDED)
    drawn.result(10)
    assert store.job(second.id).claim == 1


def test_with_nothing_held_the_bucket_is_asked_by_one_message_at_a_time(
    store: Store, behind_bucket_gate: Workshops, bucket_gate: Gate
) -> None:
    workshop = behind_bucket_gate()
    workshop.worker._outages.begin("S3", "S3: said by a test")
    jobs = [submit(store) for _ in range(8)]
    with bucket_gate.shut():
        for ended in [workshop.take(job) for job in jobs]:
            ended.result(20)
        assert {store.job(job.id).state for job in jobs} == {State.QUEUED}
        # Each time it is asked twice, up to a second apart: hardly more than two times while a message waits.
        assert 0 < bucket_gate.refused <= 6
    workshop.take(jobs[0]).result(20)
    assert store.job(jobs[0].id).state is State.SUCCEEDED


def test_a_resumed_image_waits_for_a_bucket_that_is_away(
    store: Store, storage: Storage, behind_bucket_gate: Workshops, bucket_gate: Gate
) -> None:
    first, job = behind_bucket_gate(step_s=0.02), submit(store)
    first.take(job)
    until(lambda: len(first.drawn) >= 5)
    first.stop()
    second = behind_bucket_gate()
    with bucket_gate.shut():
        ended = second.take(store.job(job.id))
        until(lambda: bucket_gate.refused >= 4)
        assert not second.drawn
    ended.result(10)
    check(store, storage, job)
    assert steps_of(first, second) == list(range(1, STEPS + 1))


def test_a_drawn_image_can_be_held_while_its_upload_hangs(
    store: Store, storage: Storage, behind_bucket_gate: Workshops, bucket_gate: Gate
) -> None:
    workshop, job = behind_bucket_gate(checkpoint_steps=0), submit(store)
    with bucket_gate.swallowing():
        ended = workshop.take(job)
        until(lambda: bucket_gate.refused)
        assert workshop.worker._held.image(job.id) is None
        workshop.worker._executor.hold_drawn()
        assert workshop.worker._held.image(job.id) is not None
    ended.result(20)
    check(store, storage, job)
    workshop.worker._executor.hold_drawn()
    assert workshop.worker._held.image(job.id) is None


def test_an_image_stays_held_whose_thread_gives_up_while_it_is_being_held(
    store: Store, behind_bucket_gate: Workshops, bucket_gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    workshop, job = behind_bucket_gate(checkpoint_steps=0), submit(store)
    executor, held = workshop.worker._executor, workshop.worker._held
    with bucket_gate.full():
        ended = workshop.take(job)
        until(lambda: held.image(job.id))
        hold = executor._hold

        def hold_slowly(*args: Any) -> None:
            hold(*args)
            if threading.current_thread() is threading.main_thread():
                executor.give_up(endings_s=4)
                ended.result(10)

        monkeypatch.setattr(executor, "_hold", hold_slowly)
        executor.hold_drawn()
        assert store.job(job.id).state is State.QUEUED
        assert held.image(job.id) is not None


def test_what_is_drawn_after_the_worker_was_told_to_stop_is_held_before_it_is_stored(
    store: Store, storage: Storage, behind_bucket_gate: Workshops, bucket_gate: Gate
) -> None:
    workshop, job = behind_bucket_gate(step_s=0.02, checkpoint_steps=0), submit(store)
    ended = workshop.take(job)
    until(lambda: workshop.drawn)
    with bucket_gate.swallowing():
        workshop.worker._executor.drain()
        until(lambda: bucket_gate.refused)
        assert workshop.worker._held.image(job.id) is not None
    ended.result(20)
    check(store, storage, job)


def test_a_held_image_that_is_broken_is_drawn_again(store: Store, storage: Storage, workshops: Workshops) -> None:
    workshop, job = workshops(), submit(store)
    workshop.take(job).result(10)
    key = store.job(job.id).object_key
    assert key is not None
    again = submit(store)
    held = workshop.worker._held
    held.keep_image(again.id, storage.get(key))
    path = held._folder / f"{again.id}.image"
    path.write_bytes(path.read_bytes()[:-60])
    storage.delete([key])
    workshop.drawn.clear()
    workshop.take(again).result(10)
    check(store, storage, again)
    assert steps_of(workshop) == list(range(1, STEPS + 1))


def test_a_bucket_that_hangs_does_not_keep_a_claim_from_being_given_back(
    store: Store, storage: Storage, behind_bucket_gate: Workshops, bucket_gate: Gate
) -> None:
    first, job = behind_bucket_gate(step_s=0.05, checkpoint_steps=3), submit(store)
    ended = first.take(job)
    until(lambda: len(first.drawn) >= 5)
    with bucket_gate.swallowing():
        until(lambda: bucket_gate.refused)
        first.give_back()
        ended.result(6)
        assert store.job(job.id).state is State.QUEUED
        assert store.history(job.id)[0]["outcome"] == "drained"
    second = behind_bucket_gate()
    second.take(store.job(job.id)).result(10)
    check(store, storage, job)
    assert steps_of(first, second) == list(range(1, STEPS + 1))


def test_a_bucket_that_can_be_read_but_takes_nothing_is_away_while_an_image_waits_for_it(
    store: Store, storage: Storage, behind_bucket_gate: Workshops, bucket_gate: Gate
) -> None:
    workshop = behind_bucket_gate(checkpoint_steps=0)
    first, second = submit(store), submit(store, "b")
    with bucket_gate.full():
        ended = workshop.take(first)
        until(lambda: workshop.worker._outages.away("S3"))
        for _ in range(3):
            workshop.take(second).result(20)
        assert store.job(second.id).claim == 0
        assert workshop.worker._outages.away("S3")
    ended.result(20)
    assert store.job(first.id).state is State.SUCCEEDED
    workshop.take(second).result(20)
    assert store.job(second.id).state is State.SUCCEEDED


def test_a_message_that_cannot_be_claimed_is_kept_until_the_audit_has_published_it_again_or_the_worker_stops(
    store: Store, behind_bucket_gate: Workshops, bucket_gate: Gate
) -> None:
    workshop, job = behind_bucket_gate(time_scale=0.5), submit(store)
    workshop.worker._outages.begin("S3", "S3: said by a test")
    with bucket_gate.shut():
        began = time.monotonic()
        workshop.take(job).result(20)
        assert time.monotonic() - began >= 1.5
        waiting = [workshop.take(job) for _ in range(8)]
        until(lambda: all(end.running() for end in waiting))
        began = time.monotonic()
        workshop.worker._executor.drain()
        waiting[-1].result(20)
        assert time.monotonic() - began < 1.2
    assert store.job(job.id).claim == 0


# Unfinished images that this host holds


def held_on_this_host(first: Workshop, store: Store, gate: Gate, job: Job, steps: int) -> int:
    """Draw about so many steps and give the job back while the bucket is away; the step that it came to."""
    ended = first.take(store.job(job.id))
    until(lambda: len(first.drawn) >= steps)
    with gate.shut():
        first.give_back()
        ended.result(20)
    return steps_of(first)[-1]


def test_a_held_step_that_is_of_no_use_does_not_hide_the_buckets(
    store: Store, storage: Storage, workshops: Workshops
) -> None:
    first, job = workshops(step_s=0.02), submit(store)
    first.take(job)
    until(lambda: len(first.drawn) >= 7)
    first.stop()
    second = workshops()
    second.worker._held.keep_latents(job.id, 0, Latents(39, b"of another version"))
    second.take(store.job(job.id)).result(10)
    check(store, storage, job)
    assert steps_of(first, second) == list(range(1, STEPS + 1))
    assert second.worker._held.latents(job.id, 0) is None


def test_a_job_that_failed_since_does_not_go_on_from_a_held_step(
    store: Store, behind_bucket_gate: Workshops, bucket_gate: Gate
) -> None:
    job = submit(store)
    first = behind_bucket_gate(step_s=0.05)
    held_on_this_host(first, store, bucket_gate, job, 5)
    claim = store.claim(Message(job.id, 2), first.worker.id)
    assert claim is not None
    store.retry(claim, "internal", "it failed elsewhere", delay_s=0)
    second = behind_bucket_gate()
    second.take(store.job(job.id)).result(10)
    assert (store.job(job.id).state, store.job(job.id).failures) == (State.SUCCEEDED, 1)
    assert steps_of(second) == list(range(1, STEPS + 1))


def test_the_row_catches_up_with_the_held_step_that_a_claim_goes_on_from(
    store: Store,
    storage: Storage,
    behind_bucket_gate: Workshops,
    workshops: Workshops,
    bucket_gate: Gate,
    tmp_path: Path,
) -> None:
    first, job = behind_bucket_gate(step_s=0.05), submit(store)
    came_to = held_on_this_host(first, store, bucket_gate, job, 5)
    second = behind_bucket_gate(step_s=1.0)
    ended = second.take(store.job(job.id))
    until(lambda: f"checkpoints/{job.id}/2-{came_to}.safetensors" in objects(storage, CHECKPOINTS))
    second.give_back()
    ended.result(20)
    other_host = workshops(data_dir=tmp_path / "other")
    other_host.take(store.job(job.id)).result(10)
    check(store, storage, job)
    assert steps_of(first, second, other_host) == list(range(1, STEPS + 1))


def test_nothing_is_held_of_a_job_that_was_cancelled(
    store: Store, behind_bucket_gate: Workshops, bucket_gate: Gate
) -> None:
    first, job = behind_bucket_gate(step_s=0.05), submit(store)
    held_on_this_host(first, store, bucket_gate, job, 5)
    assert list(first.worker._held._folder.iterdir())
    second = behind_bucket_gate(step_s=0.05)
    ended = second.take(store.job(job.id))
    until(lambda: second.drawn)
    store.cancel(job.id)
    ended.result(10)
    assert not list(first.worker._held._folder.iterdir())


def test_a_checkpoint_that_cannot_be_stored_for_a_reason_of_its_own_holds_no_other_up(
    store: Store, storage: Storage, workshops: Workshops
) -> None:
    workshop, jobs = workshops(step_s=0.05, checkpoint_steps=0), [submit(store), submit(store, "b")]
    ended = [workshop.take(job) for job in jobs]
    until(lambda: len(workshop.worker._checkpoints._drawings) == 2)
    messages = list(workshop.worker._checkpoints._drawings)
    workshop.worker._checkpoints.take(messages[0], Latents(5, 7))  # type: ignore[arg-type]
    workshop.worker._checkpoints.take(messages[1], Latents(6, b"some"))
    until(lambda: objects(storage, CHECKPOINTS) == [f"checkpoints/{messages[1].job_id}/1-6.safetensors"])
    for end in ended:
        end.result(10)


# A suspect is drawn alone


def make_suspect(settings: Settings, job: Job) -> None:
    with psycopg.connect(settings.require("database_url").replace("+psycopg", "")) as connection:
        connection.execute("UPDATE jobs SET suspect = true WHERE id = %s", [job.id])


def test_beside_a_suspect_nothing_is_claimed_and_messages_are_let_go_for_idle_workers(
    settings: Settings, store: Store, workshops: Workshops
) -> None:
    workshop, suspect, others = workshops(step_s=0.1), submit(store), [submit(store, "b") for _ in range(5)]
    make_suspect(settings, suspect)
    ended = workshop.take(suspect)
    until(lambda: workshop.drawn)
    for end in [workshop.take(job) for job in others]:
        end.result(10)
    assert not ended.done()
    assert [store.job(job.id).claim for job in others] == [0] * 5
    ended.result(20)
    workshop.take(others[0]).result(10)
    assert store.job(others[0].id).state is State.SUCCEEDED


@pytest.mark.parametrize("how", ["cancelled", "stopped"])
def test_a_suspect_that_waits_for_others_ends_at_once_when_nobody_wants_it_here(
    how: str, settings: Settings, store: Store, workshops: Workshops
) -> None:
    workshop, other, suspect = workshops(step_s=0.1), submit(store, steps=100), submit(store, "b")
    make_suspect(settings, suspect)
    others_end = workshop.take(other)
    until(lambda: workshop.drawn)
    ended = workshop.take(suspect)
    until(lambda: store.job(suspect.id).state is State.RUNNING)
    if how == "cancelled":
        store.cancel(suspect.id)
    else:
        workshop.worker._executor.drain()
    ended.result(5)
    assert not others_end.done()
    assert store.job(suspect.id).state is (State.CANCELLED if how == "cancelled" else State.QUEUED)


# Postgres is away


def test_a_claim_is_given_back_though_postgres_was_away_for_a_moment(
    store: Store, behind_postgres_gate: Workshops, postgres_gate: Gate
) -> None:
    workshop, job = behind_postgres_gate(step_s=0.05), submit(store)
    ended = workshop.take(job)
    until(lambda: len(workshop.drawn) >= 5)
    with postgres_gate.shut():
        postgres_gate.cut()
        workshop.give_back()
        time.sleep(0.4)
        assert not ended.done()
    ended.result(10)
    assert store.job(job.id).state is State.QUEUED
    assert store.history(job.id)[0]["outcome"] == "drained"


def test_an_image_that_cannot_be_recorded_is_held_and_recorded_when_postgres_is_back(
    store: Store,
    storage: Storage,
    behind_postgres_gate: Workshops,
    postgres_gate: Gate,
    caplog: pytest.LogCaptureFixture,
) -> None:
    workshop, job = behind_postgres_gate(step_s=0.02, checkpoint_steps=5), submit(store)
    ended = workshop.take(job)
    until(lambda: len(workshop.drawn) >= 2)
    with postgres_gate.shut():
        until(lambda: workshop.worker._held.image(job.id) is not None)
        until(lambda: postgres_gate.refused > 20)
    ended.result(20)
    check(store, storage, job)
    assert steps_of(workshop) == list(range(1, STEPS + 1))
    assert [len(store.history(job.id)), store.history(job.id)[0]["outcome"]] == [1, "succeeded"]
    assert len([line for line in caplog.messages if line.startswith("waiting for Postgres")]) == 1


# What a claim cannot be


def test_a_message_that_nobody_waits_for_is_one_line(
    store: Store, workshops: Workshops, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    workshop, job = workshops(), submit(store)
    workshop.take(job).result(10)
    unknown = job.model_copy(update={"id": type(job.id)(int=1)})
    for stale in (job, unknown):
        caplog.clear()
        workshop.take(stale).result(10)
        assert [line for line in caplog.messages if "nobody waits" in line] == [
            f"job {stale.id}: nobody waits for claim 1"
        ]


def test_the_wait_after_a_failure_is_of_full_jitter_and_grows_with_the_failures_not_with_the_claims(
    store: Store, workshops: Workshops, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(BlankEngine):
        def step(self) -> list[Finished]:
            return [Finished(ticket, error=DrawingFailed("asked for")) for ticket in self.drain_softly()]

        def drain_softly(self) -> list[int]:
            tickets = list(self._inside)
            self._inside.clear()
            return tickets

    waits: list[tuple[float, float]] = []
    monkeypatch.setattr("worker.executor.random.uniform", lambda low, high: waits.append((low, high)) or low)
    job = store.submit(Submission(prompt="a", width=64, height=64), max_failures=9)
    workshop = workshops(engine=Failing(0.01))
    for claim in range(1, 6):  # drained five times
        held = store.claim(Message(job.id, claim), workshop.worker.id)
        assert held is not None
        store.give_back(held)
    waits.clear()
    for _ in range(3):
        workshop.take(store.job(job.id)).result(10)
    retry_s = workshop.worker._executor._durations.retry_s
    limits = [limit for low, limit in waits if low == 0]
    assert limits == [retry_s, 2 * retry_s, 4 * retry_s]


def test_many_claims_that_end_at_once_leave_nothing_behind(
    store: Store, storage: Storage, workshops: Workshops
) -> None:
    workshop = workshops(step_s=0.01, checkpoint_steps=3)
    threads_before = threading.active_count()
    jobs = [submit(store, f"p{number}", steps=10) for number in range(16)]
    ended: list[Future[None]] = [workshop.take(job) for job in jobs]
    for end in ended:
        end.result(20)
    assert {store.job(job.id).state for job in jobs} == {State.SUCCEEDED}
    until(lambda: not [key for key in objects(storage, CHECKPOINTS) if key not in store.sweepable([key])])
    assert not workshop.worker._checkpoints._drawings
    assert not list(workshop.worker._held._folder.iterdir())
    assert threading.active_count() <= threads_before + Workshop.THREADS
