import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text

from pipeline.request import ImageFormat
from producer.jobs.contract import (
    Claim,
    EventKind,
    Job,
    Message,
    Outcome,
    Priority,
    Recorded,
    State,
    Submission,
    SubmissionKey,
)
from producer.jobs.errors import IllegalTransition, KeyAtWork, KeyReused, LostClaim, NotFound, Unavailable
from producer.jobs.search import Search
from producer.jobs.settings import Settings
from producer.jobs.store import Store
from producer.jobs.webhooks import Webhooks

IMAGE = Recorded(
    object_key="images/x/1.png", sha256="00" * 32, size_bytes=10, width_px=64, height_px=64, format=ImageFormat.PNG,
    drawing_s=1.0, encoding_s=0.1, uploading_s=0.1, warnings=["wide"],
)  # fmt: skip
LEASE_S = 0.5


def worker(store: Store) -> UUID:
    worker_id = uuid4()
    beat(store, worker_id)
    return worker_id


def beat(store: Store, worker_id: UUID) -> None:
    description = {"host": "h", "pid": 1, "device": "cpu", "model": "m", "revision": "r", "version": "0", "capacity": 1}
    store.beat(worker_id, description, "[]")


def submit(store: Store, *, max_failures: int = 3, **fields: object) -> Job:
    return store.submit(Submission.model_validate({"prompt": "a", **fields}), max_failures=max_failures)


def claim(store: Store, job: Job, worker_id: UUID) -> Claim:
    taken = store.claim(Message(job.id, store.job(job.id).claim + 1), worker_id)
    assert taken is not None
    return taken


def sql(store: Store, statement: str, **values: object) -> None:
    with store._begin() as connection:
        connection.execute(text(statement), values)


def sql_value(store: Store, statement: str) -> object:
    with store._begin() as connection:
        return connection.scalar(text(statement))


def silence(store: Store, worker_id: UUID) -> None:
    sql(store, "UPDATE workers SET heartbeat_at = now() - interval '1 hour' WHERE id = :id", id=worker_id)


def next_messages(store: Store, holder: UUID, limit: int = 10) -> list[Message]:
    """Up to so many of each open lane, urgent lanes first."""
    lanes = sorted(store.lanes(), key=lambda lane: (lane.priority.rank, lane.id))
    found = store.next_messages(holder, {lane.id: limit for lane in lanes})
    return [following.message for following in sorted(found, key=lambda following: following.priority.rank)]


def published(store: Store) -> int:
    return sum(store.window(lease_s=60).published.values())


def outcomes(store: Store, job: Job) -> list[str]:
    return [row["outcome"] for row in store.history(job.id)]


def test_a_job_goes_its_whole_way(store: Store) -> None:
    job, me = submit(store, name="first"), worker(store)
    taken = claim(store, job, me)
    assert taken.request["prompt"] == "a"
    assert taken.request["seed"] is not None
    assert store.job(job.id).state is State.RUNNING
    store.record(taken, IMAGE)
    done = store.job(job.id)
    assert (done.state, done.claim, done.failures) == (State.SUCCEEDED, 1, 0)
    assert (done.object_key, done.sha256, done.warnings) == (IMAGE.object_key, IMAGE.sha256, ["wide"])
    assert outcomes(store, job) == ["succeeded"]


def test_a_seed_is_given_once_so_that_a_retry_draws_the_same_picture(store: Store) -> None:
    job, me = submit(store), worker(store)
    first = claim(store, job, me)
    store.retry(first, "internal", "x", delay_s=0)
    assert claim(store, job, me).request["seed"] == first.request["seed"] == job.request.seed


def test_a_message_is_claimed_once(store: Store) -> None:
    job, me = submit(store), worker(store)
    message = Message(job.id, 1)
    assert store.claim(message, me) is not None
    assert store.claim(message, me) is None
    assert store.claim(Message(job.id, 2), me) is None
    assert store.claim(Message(uuid4(), 1), me) is None


def test_recording_twice_records_once(store: Store) -> None:
    job = submit(store)
    taken = claim(store, job, worker(store))
    store.record(taken, IMAGE)
    store.record(taken, IMAGE)
    assert outcomes(store, job) == ["succeeded"]


def test_a_write_without_the_fence_bounces(store: Store, leader: UUID) -> None:
    job, old, new = submit(store), worker(store), worker(store)
    lost = claim(store, job, old)
    silence(store, old)
    assert store.reclaim(leader, lease_s=LEASE_S) == [(job.id, State.QUEUED)]
    held = claim(store, job, new)
    for write in (
        lambda: store.record(lost, IMAGE),
        lambda: store.fail(lost, "x", "y"),
        lambda: store.retry(lost, "x", "y", delay_s=0),
        lambda: store.give_back(lost),
        lambda: store.mark_alone(lost),
        lambda: store.note_checkpoint(lost, "checkpoints/x", 1),
    ):
        with pytest.raises(LostClaim):
            write()
    store.record(held, IMAGE)
    assert outcomes(store, job) == ["lease_lost", "succeeded"]


def test_a_worker_asks_which_claims_are_its_own_now(store: Store) -> None:
    me, kept, dropped = worker(store), submit(store), submit(store)
    for job in (kept, dropped):
        claim(store, job, me)
    store.cancel(dropped.id)
    assert store.holding(me) == {Message(kept.id, 1)}
    assert store.holding(worker(store)) == set()


def test_the_words_of_an_error_never_keep_its_job_from_ending(store: Store) -> None:
    job = submit(store)
    store.fail(claim(store, job, worker(store)), "internal", "a\x00b \ud800", trace="\x00")
    assert store.job(job.id).error_message == "a\N{REPLACEMENT CHARACTER}b ?"


def test_a_database_that_is_read_only_for_a_moment_is_away(store: Store, settings: Settings) -> None:
    sql(store, "SET default_transaction_read_only = on")  # of the pool's first connection, which is used again
    with pytest.raises(Unavailable, match="read-only"):
        sql(store, "DELETE FROM leader")


def test_failures_are_tried_again_until_they_are_too_many(store: Store) -> None:
    job, me = submit(store, max_failures=2), worker(store)
    store.retry(claim(store, job, me), "internal", "once", delay_s=0)
    assert (store.job(job.id).state, store.job(job.id).failures) == (State.QUEUED, 1)
    store.retry(claim(store, job, me), "internal", "twice", delay_s=0, trace="Traceback …")
    ended = store.job(job.id)
    assert (ended.state, ended.failures, ended.error_message) == (State.FAILED, 2, "twice")
    assert outcomes(store, job) == ["retried", "failed"]
    assert store.history(job.id)[1]["error"] == "Traceback …"


def test_a_retry_waits_for_its_time(store: Store, leader: UUID) -> None:
    job, me = submit(store), worker(store)
    store.retry(claim(store, job, me), "internal", "later", delay_s=60)
    assert store.claim(Message(job.id, 2), me) is None
    assert next_messages(store, leader) == []


def test_a_drain_charges_no_failure(store: Store) -> None:
    job, me = submit(store), worker(store)
    store.give_back(claim(store, job, me))
    again = store.job(job.id)
    assert (again.state, again.failures, again.claim) == (State.QUEUED, 0, 1)
    assert outcomes(store, job) == [Outcome.DRAINED]


def test_only_deaths_while_alone_are_charged(store: Store, leader: UUID) -> None:
    job = submit(store, max_failures=2)
    for drawn_alone, state, failures in (
        (False, "queued", 0),
        (True, "queued", 1),
        (False, "queued", 1),
        (True, "failed", 2),
    ):
        me = worker(store)
        taken = claim(store, job, me)
        if drawn_alone:
            assert taken.suspect
            store.mark_alone(taken)
        silence(store, me)
        store.reclaim(leader, lease_s=LEASE_S)
        assert (store.job(job.id).state, store.job(job.id).failures) == (state, failures)
    assert store.job(job.id).error_code == "worker_lost"


def test_a_beating_worker_keeps_its_claims_and_a_departed_one_does_not(store: Store, leader: UUID) -> None:
    job, me = submit(store), worker(store)
    claim(store, job, me)
    assert store.reclaim(leader, lease_s=LEASE_S) == []
    store.farewell(me)
    assert store.reclaim(leader, lease_s=LEASE_S) == [(job.id, State.QUEUED)]


def test_one_dispatcher_leads_until_its_post_expires(store: Store) -> None:
    first, second = uuid4(), uuid4()
    assert store.lead(first, leader_s=60)
    assert store.lead(first, leader_s=60)
    assert not store.lead(second, leader_s=60)
    submit(store)
    assert next_messages(store, second) == []
    sql(store, "UPDATE leader SET expires_at = now() - interval '1 s'")
    assert next_messages(store, first) == [], "a leader past its expiry changes nothing"
    assert store.lead(second, leader_s=60)
    assert not store.lead(first, leader_s=60)
    assert len(next_messages(store, second)) == 1


def test_the_window_takes_of_each_lane_what_is_wanted_the_oldest_first_and_each_once(
    store: Store, leader: UUID
) -> None:
    standard = [submit(store) for _ in range(3)]
    bulk = [submit(store, priority="bulk") for _ in range(3)]
    lanes = {lane.priority: lane.id for lane in store.lanes()}
    wanted = {lanes[Priority.STANDARD]: 2, lanes[Priority.BULK]: 1}
    assert [following.message.job_id for following in store.next_messages(leader, wanted)] == [
        standard[0].id, standard[1].id, bulk[0].id,
    ]  # fmt: skip
    (following,) = store.next_messages(leader, {lanes[Priority.STANDARD]: 5})
    assert following.message == Message(standard[2].id, 1)
    assert (following.priority, following.lane_id) == (Priority.STANDARD, lanes[Priority.STANDARD])
    assert following.work == standard[2].request.work > 0
    window = store.window(lease_s=60)
    assert window.published == {Priority.INTERACTIVE: 0, Priority.STANDARD: 3, Priority.BULK: 1}


def test_a_lane_is_one_tenants_one_batchs_and_one_prioritys(store: Store) -> None:
    store.set_tenant("big", {"weight": 2.5})
    for tenant in ("big", "small"):
        for priority in ("bulk", "bulk", "interactive"):
            store.submit(
                Submission.model_validate({"prompt": "a", "priority": priority}), max_failures=3, tenant=tenant
            )
    batch = store.submit_batch("b", [Submission(prompt="a")], max_failures=3, tenant="big", weight=3)
    found = {
        (lane.tenant, lane.tenant_weight, lane.batch_id, lane.batch_weight, lane.priority) for lane in store.lanes()
    }
    assert found == {
        *((tenant, weight, None, 1.0, priority) for tenant, weight in (("big", 2.5), ("small", 1.0))
          for priority in (Priority.BULK, Priority.INTERACTIVE)),
        *(("big", 2.5, batch.id, 3.0, priority) for priority in Priority),
    }  # fmt: skip
    assert (batch.tenant, batch.weight, store.batch_jobs(batch.id)[0].tenant) == ("big", 3.0, "big")
    assert [(tenant.name, tenant.weight) for tenant in store.tenants()] == [("big", 2.5)]


def test_only_a_lane_without_queued_jobs_closes_and_a_job_that_is_queued_again_opens_it(
    store: Store, leader: UUID
) -> None:
    job, me = submit(store), worker(store)
    (lane,) = store.lanes()
    store.close_lanes(leader, [lane.id])
    assert store.lanes() == [lane], "it holds a queued job"
    for queue_again in (
        lambda taken: store.give_back(taken),
        lambda taken: store.retry(taken, "internal", "x", delay_s=60),
        lambda taken: (silence(store, me), store.reclaim(leader, lease_s=LEASE_S), beat(store, me)),
    ):
        sql(store, "UPDATE jobs SET not_before = now()")
        taken = claim(store, job, me)
        store.close_lanes(leader, [lane.id])
        assert store.lanes() == []
        queue_again(taken)
        assert store.lanes() == [lane]
    store.cancel(job.id)
    store.close_lanes(uuid4(), [lane.id])
    assert store.lanes() == [lane], "only the leader closes"
    store.close_lanes(leader, [lane.id])
    assert store.lanes() == []
    submit(store)
    assert store.lanes() == [lane]


def test_a_lane_in_which_a_job_is_just_being_queued_stays_open(store: Store, leader: UUID) -> None:
    store.cancel(submit(store).id)
    (lane,) = store.lanes()
    with store._begin() as submitting:
        submitting.execute(text("UPDATE lanes SET open = true"))  # as every submission does before its commit
        store.close_lanes(leader, [lane.id])
    assert store.lanes() == [lane]


def test_the_same_key_gives_the_first_answer(store: Store) -> None:
    key = SubmissionKey("k", "f")
    first = store.submit(Submission(prompt="a"), max_failures=3, key=key)
    assert store.submit(Submission(prompt="a"), max_failures=3, key=key) == first
    batch_key = SubmissionKey("kb", "g")
    batch = store.submit_batch("b", [Submission(prompt="a")] * 2, max_failures=3, key=batch_key)
    assert store.submit_batch("b", iter(()), max_failures=3, key=batch_key) == batch
    assert len(Search(store.database).jobs().found) == 3
    other = store.submit(Submission(prompt="a"), max_failures=3, key=key, tenant="another")
    assert other.id != first.id, "a key is its tenant's own"


def test_a_key_of_another_submission_is_refused(store: Store) -> None:
    store.submit(Submission(prompt="a"), max_failures=3, key=SubmissionKey("k", "f"))
    with pytest.raises(KeyReused, match="'k'"):
        store.submit(Submission(prompt="b"), max_failures=3, key=SubmissionKey("k", "g"))
    assert len(Search(store.database).jobs().found) == 1


def test_a_submission_that_failed_frees_its_key(store: Store) -> None:
    def broken() -> Iterator[Submission]:
        yield Submission(prompt="a")
        raise RuntimeError("the file ends here")

    key = SubmissionKey("k", "f")
    with pytest.raises(RuntimeError):
        store.submit_batch("b", broken(), max_failures=3, key=key)
    assert store.submit_batch("b", [Submission(prompt="a")], max_failures=3, key=key).jobs == 1


def test_who_submits_with_a_key_that_is_at_work_is_told_at_once_and_later_gets_what_came_of_it(store: Store) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slowly() -> Iterator[Submission]:
        begun.set()
        assert go_on.wait(20)
        yield Submission(prompt="a")

    key = SubmissionKey("k", "f")
    with ThreadPoolExecutor() as pool:
        first = pool.submit(store.submit_batch, "b", slowly(), max_failures=3, key=key)
        assert begun.wait(20)
        with pytest.raises(KeyAtWork):
            store.submit_batch("b", [Submission(prompt="a")], max_failures=3, key=key)
        assert store.submit(Submission(prompt="b"), max_failures=3, tenant="other", key=key).tenant == "other"
        go_on.set()
        batch = first.result(20)
    assert store.submit_batch("b", [Submission(prompt="a")], max_failures=3, key=key) == batch


def test_a_checkpoint_is_kept_through_every_loss_of_the_claim_and_gone_at_the_end(store: Store, leader: UUID) -> None:
    job, me = submit(store), worker(store)
    first = claim(store, job, me)
    assert (first.checkpoint_key, first.checkpoint_step) == (None, 0)
    store.note_checkpoint(first, "checkpoints/x", 20)
    store.give_back(first)
    second = claim(store, job, me)
    assert (second.checkpoint_key, second.checkpoint_step) == ("checkpoints/x", 20)
    with pytest.raises(LostClaim):
        store.note_checkpoint(first, "checkpoints/old", 10)
    silence(store, me)
    store.reclaim(leader, lease_s=LEASE_S)
    third = claim(store, job, worker(store))
    assert third.checkpoint_step == 20
    store.retry(third, "internal", "x", delay_s=0)
    fourth = claim(store, job, worker(store))
    assert fourth.checkpoint_key is None, "after an error of no class it begins afresh"
    store.note_checkpoint(fourth, "checkpoints/y", 5)
    store.record(fourth, IMAGE)
    assert sql_value(store, "SELECT checkpoint_key FROM jobs") is None


def test_a_job_that_is_given_back_keeps_its_place(store: Store, leader: UUID) -> None:
    first, second = submit(store), submit(store)
    store.give_back(claim(store, first, worker(store)))
    assert [message.job_id for message in next_messages(store, leader)] == [first.id, second.id]


def test_what_no_row_points_to_and_no_claim_can_write_any_more_is_swept_and_nothing_else(
    store: Store, leader: UUID
) -> None:
    me, done, running, waiting = worker(store), submit(store), submit(store), submit(store)
    store.give_back(claim(store, done, me))
    taken = claim(store, done, me)
    store.record(taken, replace(IMAGE, object_key=f"images/single/{done.id}/2.png"))
    store.give_back(claim(store, running, me))
    held = claim(store, running, me)
    store.note_checkpoint(held, f"checkpoints/{running.id}/1-20.safetensors", 20)
    store.give_back(claim(store, waiting, me))
    swept = [
        f"images/single/{done.id}/1.png",
        f"checkpoints/{done.id}/2-20.safetensors",
        f"images/{uuid4()}/{running.id}/1.png",
        f"checkpoints/{running.id}/1-10.safetensors",
        f"images/single/{waiting.id}/1.png",
    ]
    kept = [
        f"images/single/{done.id}/2.png",
        f"checkpoints/{running.id}/1-20.safetensors",
        f"checkpoints/{running.id}/2-40.safetensors",
        f"images/single/{running.id}/2.png",
        f"images/single/{waiting.id}/2.png",
        f"images/single/{uuid4()}/1.png",
        f"images/single/{done.id}/1/of/somebody.png",
        "images/single/no-id/1.png",
        "somebody's own",
    ]
    assert sorted(store.sweepable([*swept, *kept])) == sorted(swept)
    assert store.sweepable([]) == []


def test_a_claim_takes_its_message_out_of_the_window(store: Store, leader: UUID) -> None:
    job, me = submit(store), worker(store)
    next_messages(store, leader)
    assert published(store) == 1
    claim(store, job, me)
    assert published(store) == 0


def test_what_a_dead_worker_holds_takes_no_place_of_those_that_live(store: Store, leader: UUID) -> None:
    dead, _ = worker(store), worker(store)
    both = store.window(lease_s=60)
    claim(store, submit(store), dead)
    assert store.window(lease_s=60).free == both.free - 1
    store.farewell(dead)
    assert (store.window(lease_s=60).workers, store.window(lease_s=60).free) == (1, both.free // 2)


def test_a_cancelled_job_never_leaves_the_table(store: Store, leader: UUID) -> None:
    job = submit(store)
    next_messages(store, leader)
    assert store.cancel(job.id).state is State.CANCELLED
    assert store.cancel(job.id).state is State.CANCELLED
    assert published(store) == 0
    assert store.claim(Message(job.id, 1), worker(store)) is None


def test_cancelling_a_batch_ends_what_has_not_ended_and_leaves_the_rest(store: Store, leader: UUID) -> None:
    batch = store.submit_batch("b", [Submission(prompt="a") for _ in range(4)], max_failures=3)
    other, me = submit(store), worker(store)
    done, running, *_queued = store.batch_jobs(batch.id)
    store.record(claim(store, done, me), IMAGE)
    claim(store, running, me)
    next_messages(store, leader)
    cancelled = store.cancel_batch(batch.id)
    assert (cancelled.counts[State.CANCELLED], cancelled.counts[State.SUCCEEDED], cancelled.done) == (3, 1, True)
    assert outcomes(store, running) == ["cancelled"]
    assert store.job(other.id).state is State.QUEUED
    with pytest.raises(NotFound):
        store.cancel_batch(uuid4())


def test_what_a_silent_worker_drew_is_no_longer_told(store: Store) -> None:
    me = uuid4()
    row = {"host": "h", "pid": 1, "device": "cpu", "model": "m", "revision": "r", "version": "0", "capacity": 1}
    store.beat(me, row, '[{"job": "x", "step": 1, "steps": 2}]')
    assert store.farm(lease_s=60).workers[0].drawing
    silence_for = "UPDATE workers SET heartbeat_at = now() - interval '2 minutes'"
    sql(store, silence_for)
    (silent,) = store.farm(lease_s=60).workers
    assert (silent.live, silent.drawing) == (False, [])


def test_a_finished_job_cannot_be_cancelled(store: Store) -> None:
    job = submit(store)
    store.record(claim(store, job, worker(store)), IMAGE)
    with pytest.raises(IllegalTransition):
        store.cancel(job.id)


def test_no_job_of_a_paused_batch_is_published_or_claimed(store: Store, leader: UUID) -> None:
    batch = store.submit_batch("b", [Submission(prompt="a")], max_failures=3)
    (job,) = store.batch_jobs(batch.id)
    next_messages(store, leader)
    sql(store, "UPDATE batches SET paused = true")
    assert store.lanes() == []
    assert store.claim(Message(job.id, 1), worker(store)) is None
    assert store.overdue_messages(leader, audit_s=0) == []
    assert published(store) == 0, "what was published before is taken back"


def test_a_batch_is_all_there_or_not_at_all(store: Store) -> None:
    def rows() -> Iterator[Submission]:
        yield Submission(prompt="a")
        raise RuntimeError("the file ends here")

    with pytest.raises(RuntimeError, match="the file ends here"):
        store.submit_batch("b", rows(), max_failures=3)
    assert store.batches() == []
    assert Search(store.database).jobs().found == []


def test_a_batch_keeps_its_order_and_counts_its_states(store: Store) -> None:
    rows = [Submission(prompt=f"p{n}", name=f"n{n}", priority=Priority.BULK) for n in range(5)]
    batch = store.submit_batch("five", rows, max_failures=3)
    jobs = store.batch_jobs(batch.id)
    assert [job.name for job in jobs] == ["n0", "n1", "n2", "n3", "n4"]
    assert [job.position for job in store.batch_jobs(batch.id, after=1, limit=2)] == [2, 3]
    store.record(claim(store, jobs[0], worker(store)), IMAGE)
    counted = store.batch(batch.id)
    assert (counted.jobs, counted.finished, counted.done) == (5, 1, False)
    assert counted.counts[State.QUEUED] == 4


def test_text_of_every_kind_comes_back_as_it_went_in(store: Store) -> None:
    prompt = 'tab\there, "quotes", back\\slash, \\N, 春节 🎆\nnew line'
    assert submit(store, prompt=prompt).request.prompt == prompt


def test_unknown_ids_are_not_found(store: Store) -> None:
    for ask in (store.job, store.batch, store.cancel, store.batch_jobs):
        with pytest.raises(NotFound):
            ask(uuid4())


def test_a_commit_that_queues_a_job_wakes_the_listener(store: Store) -> None:
    with store.listening() as listener:
        assert not listener.wait(0.01)
        submit(store)
        assert listener.wait(5)


def test_a_postgres_that_is_away_is_unavailable() -> None:
    store = Store.at("postgresql://nobody:x@127.0.0.1:1/none")
    with pytest.raises(Unavailable, match="Postgres"):
        store.ping()


def test_a_lane_in_which_somebody_else_queued_a_job_is_opened_again(store: Store, leader: UUID) -> None:
    jobs = [submit(store, priority=priority) for priority in ("bulk", "standard")]
    for job in jobs:
        claim(store, job, worker(store))
    store.close_lanes(leader, [lane.id for lane in store.lanes()])
    assert store.reopen_lanes(leader) == 0
    sql(store, "UPDATE jobs SET state = 'queued', worker_id = NULL")  # by hand, or by a worker of an older version
    assert store.lanes() == []
    assert store.reopen_lanes(uuid4()) == 0, "only the leader does"
    assert store.reopen_lanes(leader) == 2
    assert len(next_messages(store, leader)) == 2


def test_who_submits_alone_waits_for_nobody_who_does_the_same(store: Store) -> None:
    submit(store)
    with store._begin() as frozen:
        frozen.execute(text("SELECT id FROM lanes WHERE open FOR SHARE"))  # as in the middle of a submission
        frozen.execute(text("SELECT 1"))
        with ThreadPoolExecutor() as pool:
            assert pool.submit(submit, store).result(5).state is State.QUEUED


def test_a_job_that_its_last_death_fails_leaves_its_checkpoint_to_the_sweep(store: Store, leader: UUID) -> None:
    job, me = submit(store, max_failures=1), worker(store)
    silence_after(store, me, claim(store, job, me), leader)
    me = worker(store)
    taken = claim(store, job, me)
    key = f"checkpoints/{job.id}/2-20.safetensors"
    store.note_checkpoint(taken, key, 20)
    store.mark_alone(taken)
    silence_after(store, me, taken, leader)
    assert store.job(job.id).state is State.FAILED
    assert store.sweepable([key]) == [key]


def silence_after(store: Store, worker_id: UUID, taken: Claim, leader: UUID) -> None:
    silence(store, worker_id)
    assert [job_id for job_id, _ in store.reclaim(leader, lease_s=LEASE_S)] == [taken.job_id]


def test_the_dispatcher_and_a_cancel_never_wait_for_each_other(store: Store, leader: UUID) -> None:
    batch = store.submit_batch("b", [Submission(prompt="a") for _ in range(50)], max_failures=3)
    messages = next_messages(store, leader, 50)
    with store._begin() as cancelling:  # holds one message, and would want others next
        cancelling.execute(text("SELECT 1 FROM messages WHERE job_id = :id FOR UPDATE"), {"id": messages[25].job_id})
        with ThreadPoolExecutor() as pool:
            pool.submit(store.republishing, leader, messages).result(5)
            sql(store, "UPDATE batches SET paused = true")
            assert pool.submit(store.overdue_messages, leader, audit_s=0).result(5) != []
    assert published(store) == 1, "only the one that was held is left"
    assert store.batch(batch.id).jobs == 50


def test_a_worker_that_ends_gives_back_all_that_it_still_holds(store: Store, leader: UUID) -> None:
    me, other = worker(store), worker(store)
    mine, ended, others = submit(store), submit(store), submit(store)
    taken = claim(store, mine, me)
    store.record(claim(store, ended, me), IMAGE)
    claim(store, others, other)
    store.close_lanes(leader, [lane.id for lane in store.lanes()])
    assert store.give_back_all(me) == 1
    assert [store.job(job.id).state for job in (mine, ended, others)] == ["queued", "succeeded", "running"]
    assert (outcomes(store, mine), store.job(mine.id).failures) == ([Outcome.DRAINED], 0)
    assert len(store.lanes()) == 1
    with pytest.raises(LostClaim):
        store.record(taken, IMAGE)
    assert store.give_back_all(me) == 0


def test_a_webhook_that_is_being_deleted_keeps_no_image_from_being_recorded(store: Store, leader: UUID) -> None:
    webhooks = Webhooks(store.database)
    gone, _ = webhooks.create("default", "https://example.com/a", list(EventKind))
    stays, _ = webhooks.create("default", "https://example.com/b", list(EventKind))
    batch = store.submit_batch("b", [Submission(prompt="a")], max_failures=3)
    taken = claim(store, store.batch_jobs(batch.id)[0], worker(store))
    told = len(webhooks.deliveries(stays.id))
    with store._begin() as deleting, ThreadPoolExecutor() as pool:
        deleting.execute(text("DELETE FROM webhooks WHERE id = :id"), {"id": gone.id})
        pool.submit(store.record, taken, IMAGE).result(5)
        assert pool.submit(store.finish_batches, leader).result(5) == 1
    assert store.job(taken.job_id).state is State.SUCCEEDED
    assert len(webhooks.deliveries(stays.id)) == told + 2


def test_the_jobs_of_a_batch_that_is_being_deleted_hold_up_no_others(store: Store, leader: UUID) -> None:
    batch = store.submit_batch("b", [Submission(prompt="a")] * 3, max_failures=3)
    other = submit(store)
    with store._begin() as deleting, ThreadPoolExecutor() as pool:
        deleting.execute(text("DELETE FROM batches WHERE id = :id"), {"id": batch.id})
        assert pool.submit(next_messages, store, leader).result(5) == [Message(other.id, 1)]
    assert published(store) == 1


def test_a_key_gives_what_came_of_it_also_when_the_image_was_there_already(store: Store) -> None:
    key = SubmissionKey("k", "f")
    drawn = submit(store, seed=7)
    store.record(claim(store, drawn, worker(store)), IMAGE)
    same = Submission(prompt="a", seed=7)
    assert store.submit(same, max_failures=3, key=key, deduplicate=True).id == drawn.id
    assert store.submit(same, max_failures=3, key=key).id == drawn.id
    with pytest.raises(KeyReused):
        store.submit(same, max_failures=3, key=SubmissionKey("k", "g"), deduplicate=True)
    before = store.submit(Submission(prompt="b"), max_failures=3, key=SubmissionKey("b", "f"))
    with pytest.raises(KeyReused):
        store.submit(same, max_failures=3, key=SubmissionKey("b", "g"), deduplicate=True)
    assert store.submit(same, max_failures=3, key=SubmissionKey("b", "f"), deduplicate=True).id == before.id


def test_the_same_key_makes_one_refused_batch(store: Store) -> None:
    key = SubmissionKey("k", "f")
    batch = store.refuse_batch("bad", [{"line": 1, "message": "no JSON"}], key=key)
    assert store.refuse_batch("bad", [{"line": 1, "message": "no JSON"}], key=key) == batch
    with pytest.raises(KeyReused):
        store.submit_batch("b", [Submission(prompt="a")], max_failures=3, key=SubmissionKey("k", "g"))


def test_a_batch_that_has_finished_is_not_cancelled_any_more(store: Store, leader: UUID) -> None:
    batch = store.submit_batch("b", [Submission(prompt="a")] * 2, max_failures=3)
    first, second = store.batch_jobs(batch.id)
    store.cancel(first.id)
    store.record(claim(store, second, worker(store)), IMAGE)
    assert store.finish_batches(leader) == 1
    assert store.cancel_batch(batch.id).cancelled_at is None
