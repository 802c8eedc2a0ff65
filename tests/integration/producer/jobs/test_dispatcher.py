import base64
import json
import logging
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from uuid import UUID, uuid4

import httpx
import psycopg
import pytest
import redis
from sqlalchemy import text

from producer.api.answers import PREFIX
from producer.api.app import create_app
from producer.api.services import CONNECTIONS
from producer.jobs.broker import LISTS
from producer.jobs.contract import DEFAULT_TENANT, QUEUE, Message, Outgoing, Priority, State, Submission
from producer.jobs.dispatcher import MOST_WAITING, Dispatcher, Losses, Throughput
from producer.jobs.errors import SchemaMismatch, Unavailable
from producer.jobs.queue import Queue
from producer.jobs.search import Search
from producer.jobs.settings import Durations, Settings
from producer.jobs.storage import Storage, checkpoint_key
from producer.jobs.store import Store
from tests.farm import environment, serving
from tests.waiting import until

FAST = Durations(scale=0.02)
SLOW = Durations(scale=50)
"""For turns that a test takes itself: neither the post nor a lease ends meanwhile, and nothing is audited."""


@pytest.fixture
def queue(settings: Settings) -> Iterator[Queue]:
    queue = Queue(settings.require("redis_url"))
    yield queue
    queue.close()


@pytest.fixture
def broker(settings: Settings) -> Iterator["redis.Redis"]:
    client = redis.Redis.from_url(settings.require("redis_url"))
    yield client
    client.close()


@contextmanager
def running(store: Store, queue: Queue, durations: Durations = FAST) -> Iterator[Dispatcher]:
    dispatcher, stop = Dispatcher(store, queue, durations), threading.Event()
    thread = threading.Thread(target=dispatcher.run, args=(stop,))
    thread.start()
    try:
        yield dispatcher
    finally:
        stop.set()
        thread.join(20)
        assert not thread.is_alive()


def submit(
    store: Store, count: int = 1, priority: Priority = Priority.STANDARD, tenant: str = DEFAULT_TENANT
) -> list[str]:
    """Submits so many and returns the task ids of their first claims, in order."""
    rows = [Submission(prompt="a", priority=priority) for _ in range(count)]
    batch = store.submit_batch("b", rows, max_failures=3, tenant=tenant)
    return [Message(job.id, 1).task_id for job in store.batch_jobs(batch.id)]


def take_turns(dispatcher: Dispatcher, count: int = 10) -> None:
    """Enough of them to prove that nothing happens."""
    for _ in range(count):
        dispatcher.turn()


def beat(store: Store, workers: int) -> None:
    row = {"host": "h", "pid": 1, "device": "cpu", "model": "m", "revision": "r", "version": "0", "capacity": 1}
    for _ in range(workers):
        store.beat(uuid4(), row, "[]")
    with store._begin() as connection:  # however slow the machine is, none of them falls silent
        connection.execute(text("UPDATE workers SET heartbeat_at = now() + interval '1 hour'"))


def test_a_message_holds_the_jobs_id_and_claim_and_nothing_of_its_contents(
    store: Store, queue: Queue, broker: "redis.Redis"
) -> None:
    (task_id,) = submit(store)
    with running(store, queue):
        until(lambda: queue.waiting() == {task_id})
    (body,) = broker.lrange(LISTS[Priority.STANDARD], 0, -1)
    job_id, _, claim = task_id.partition(":")
    (arguments, *_rest) = json.loads(base64.b64decode(json.loads(body)["body"]))
    assert arguments == [job_id, int(claim)]


def test_redis_holds_only_a_window_however_long_the_backlog_is(store: Store, queue: Queue) -> None:
    submit(store, 200)
    beat(store, 3)
    take_turns(Dispatcher(store, queue, SLOW))
    assert queue.depth() == 3
    window = store.window(lease_s=60)
    assert (sum(window.published.values()), window.workers) == (3, 3)


def test_a_commit_is_published_at_once(store: Store, queue: Queue) -> None:
    dispatcher, stop = Dispatcher(store, queue, SLOW), threading.Event()  # only the notification can be quick
    thread = threading.Thread(target=dispatcher.run, args=(stop,))
    thread.start()
    try:
        until(lambda: dispatcher.leading)
        (task_id,) = submit(store)
        until(lambda: queue.waiting() == {task_id}, timeout_s=5)
    finally:
        stop.set()
        submit(store)  # wakes it, so that it sees the stop
        thread.join(20)
    assert not thread.is_alive()


def test_messages_that_redis_lost_are_published_again(store: Store, queue: Queue, broker: "redis.Redis") -> None:
    task_ids = {task_id for priority in Priority for task_id in submit(store, 2, priority)}
    beat(store, 6)
    with running(store, queue) as dispatcher:
        until(lambda: queue.waiting() == task_ids)
        broker.flushdb()
        until(lambda: queue.waiting() == task_ids)
        assert dispatcher.counts.republished >= 6


@pytest.mark.parametrize("priority", list(Priority))
def test_a_message_that_a_dead_worker_took_along_is_published_again(
    store: Store, queue: Queue, broker: "redis.Redis", priority: Priority
) -> None:
    (task_id,) = submit(store, 1, priority)
    with running(store, queue):
        until(lambda: queue.waiting() == {task_id})
        assert broker.rpop(LISTS[priority])
        until(lambda: queue.waiting() == {task_id})


def test_a_lost_message_is_back_within_five_seconds_at_full_durations(
    store: Store, queue: Queue, broker: "redis.Redis"
) -> None:
    (task_id,) = submit(store)
    with running(store, queue, Durations()):
        until(lambda: queue.waiting() == {task_id})
        time.sleep(1)  # lost soon after it was published, which is when the audit looks latest
        broker.flushdb()
        until(lambda: queue.waiting() == {task_id}, timeout_s=5)


def test_a_queue_longer_than_any_window_is_emptied_and_what_should_be_there_published_again(
    store: Store, queue: Queue, broker: "redis.Redis", caplog: pytest.LogCaptureFixture
) -> None:
    (task_id,) = submit(store)
    with running(store, queue):
        until(lambda: queue.waiting() == {task_id})
        with broker.pipeline() as pipe:
            for name in LISTS.values():
                pipe.delete(name)
            pipe.rpush(QUEUE, *[b"{}"] * (MOST_WAITING + 1))
            pipe.execute()
        until(lambda: queue.depth() == 1)
    assert queue.waiting() == {task_id}
    assert "emptied" in caplog.text


@pytest.mark.parametrize("priority", list(Priority))
def test_a_queue_that_is_no_list_is_removed_and_what_should_be_there_published_again(
    store: Store, queue: Queue, broker: "redis.Redis", caplog: pytest.LogCaptureFixture, priority: Priority
) -> None:
    (task_id,) = submit(store, 1, priority)
    with running(store, queue):
        until(lambda: queue.waiting() == {task_id})
        broker.set(LISTS[priority], "x")
        until(lambda: broker.type(LISTS[priority]) == b"list")
        assert queue.waiting() == {task_id}
    assert caplog.text.count("of another type") == 1


def test_a_queue_that_is_no_list_is_removed_though_there_is_nothing_to_do(
    store: Store, queue: Queue, broker: "redis.Redis"
) -> None:
    broker.set(QUEUE, "x")
    Dispatcher(store, queue, SLOW).turn()
    assert not broker.exists(QUEUE)


def test_redis_holds_the_lists_and_nothing_else(store: Store, queue: Queue, broker: "redis.Redis") -> None:
    submit(store)
    Dispatcher(store, queue, SLOW).turn()
    assert broker.keys() == [LISTS[Priority.STANDARD].encode()]


def test_that_redis_answers_again_is_said_when_it_takes_messages_and_not_before(
    store: Store, queue: Queue, broker: "redis.Redis", caplog: pytest.LogCaptureFixture
) -> None:
    """A full Redis answers every question, and takes nothing."""
    caplog.set_level(logging.INFO, "producer.jobs.dispatcher")
    dispatcher, limit = Dispatcher(store, queue, FAST), broker.config_get("maxmemory")["maxmemory"]
    submit(store, 3)
    broker.config_set("maxmemory", 1)
    try:
        for _ in range(5):
            dispatcher._run_until_trouble(threading.Event())
    finally:
        broker.config_set("maxmemory", limit)
    assert caplog.text.count("dispatching stops until Redis") == 1
    assert "answers again" not in caplog.text
    until(lambda: dispatcher.turn() or queue.depth() == 1)  # type: ignore[func-returns-value]
    assert caplog.text.count("Redis answers again") == 1


def test_a_redis_that_is_away_is_said_once_and_not_to_answer(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "producer.jobs.dispatcher")
    queue = Queue("redis://127.0.0.1:1/0")
    submit(store, 3)
    dispatcher = Dispatcher(store, queue, FAST)
    for _ in range(5):
        dispatcher._run_until_trouble(threading.Event())
    assert caplog.text.count("dispatching stops until Redis") == 1
    assert "answers again" not in caplog.text
    queue.close()


def test_losses_that_go_on_are_two_lines_one_when_they_begin_and_one_when_they_are_over(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As while the bucket is away: workers take every message and claim none. The audit looks every second."""
    caplog.set_level(logging.INFO, "producer.jobs.dispatcher")
    losses = Losses(Durations())
    for _outage in range(2):
        for now in range(60):
            losses.note(5 if now % 4 == 0 and now < 40 else 0, float(now))
    told = ["5 messages were lost or not claimed in time; published again",
            "no message is lost any more; 50 were published again"]  # fmt: skip
    assert caplog.messages == told * 2


def test_a_message_that_still_waits_is_not_published_twice(store: Store, queue: Queue) -> None:
    submit(store)
    dispatcher = Dispatcher(store, queue, SLOW)
    dispatcher.turn()
    with store._begin() as connection:
        connection.execute(text("UPDATE messages SET published_at = published_at - interval '1 hour'"))
    assert len(store.overdue_messages(dispatcher.id, audit_s=SLOW.audit_s)) == 1
    dispatcher._audit_at = 0.0
    dispatcher.turn()
    assert (queue.depth(), dispatcher.counts.republished) == (1, 0)


def test_rubbish_in_the_queue_harms_nothing(store: Store, queue: Queue, broker: "redis.Redis") -> None:
    broker.lpush(QUEUE, b"\xff", b"{}", b"[1]", b'{"headers": 3}')
    (task_id,) = submit(store)
    with running(store, queue):
        until(lambda: task_id in queue.waiting())
    assert queue.waiting() == {task_id}


def test_one_of_two_leads_and_the_other_takes_over(store: Store, queue: Queue) -> None:
    with ExitStack() as leading:
        leader = leading.enter_context(running(store, queue, Durations()))
        until(lambda: leader.leading)
        with running(store, queue) as other:
            began = time.monotonic()
            until(lambda: other._renewed_at > began)
            assert leader.leading
            assert not other.leading
            leading.close()
            until(lambda: other.leading, timeout_s=5)


@contextmanager
def another_dispatcher(settings: Settings) -> Iterator["subprocess.Popen[bytes]"]:
    """One in a process of its own, at full durations."""
    process = subprocess.Popen(
        [sys.executable, "-m", "producer.cli", "dispatcher"],
        env=environment(settings) | {"OVIS_TIME_SCALE": "1"},
        stderr=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_another_leads_within_five_seconds_of_the_leaders_death(settings: Settings, store: Store, queue: Queue) -> None:
    with another_dispatcher(settings) as process:
        submit(store)
        until(lambda: queue.depth() == 1)
        with running(store, queue, Durations()) as second:
            time.sleep(1)
            assert not second.leading
            process.kill()
            until(lambda: second.leading, timeout_s=5)


def test_another_leads_within_five_seconds_of_the_leaders_freezing_and_the_frozen_one_wakes_up_harmless(
    settings: Settings, store: Store, queue: Queue
) -> None:
    with another_dispatcher(settings) as process:
        task_ids = submit(store, 20)
        until(lambda: queue.depth() == 1)
        with running(store, queue, Durations()) as second:
            process.send_signal(signal.SIGSTOP)
            until(lambda: second.leading, timeout_s=5)
            beat(store, 5)
            until(lambda: queue.depth() == 5)
            process.send_signal(signal.SIGCONT)
            time.sleep(2)
            assert second.leading
            assert sum(store.window(lease_s=60).published.values()) == queue.depth() == 5
    assert queue.waiting() == set(task_ids[:5])


def test_a_leader_that_lost_its_post_publishes_nothing(store: Store, queue: Queue) -> None:
    dispatcher = Dispatcher(store, queue, SLOW)
    dispatcher.turn()
    assert dispatcher.leading
    store.resign(dispatcher.id)
    store.lead(uuid4(), leader_s=60)
    submit(store, 3)
    dispatcher.turn()
    assert (queue.depth(), dispatcher.counts.published) == (0, 0)
    assert len(store.lanes()) == 3, "it closed nothing"


def test_an_urgent_job_is_let_into_a_full_window_and_only_one_at_a_time(store: Store, queue: Queue) -> None:
    submit(store, 5, Priority.BULK)
    beat(store, 2)
    dispatcher = Dispatcher(store, queue, SLOW)
    dispatcher.turn()
    assert queue.depth() == 2
    submit(store, 3, Priority.INTERACTIVE)
    take_turns(dispatcher)
    assert queue.depth() == 3
    assert store.window(lease_s=60).published == {
        Priority.INTERACTIVE: 1, Priority.STANDARD: 0, Priority.BULK: 2,
    }  # fmt: skip


def test_a_bulk_job_is_not_let_into_a_full_window(store: Store, queue: Queue) -> None:
    submit(store, 5, Priority.STANDARD)
    submit(store, 5, Priority.BULK)
    take_turns(Dispatcher(store, queue, SLOW))
    assert store.window(lease_s=60).published[Priority.BULK] == 0
    assert queue.depth() == 1


def claim_all(store: Store, queue: Queue, worker: UUID, owner: dict[UUID, str]) -> list[str]:
    """Plays a worker that takes whatever is published; returns whose jobs they were."""
    messages = [Message(UUID(task_id[:36]), int(task_id[37:])) for task_id in queue.waiting()]
    return [owner[message.job_id] for message in messages if store.claim(message, worker)]


def test_a_new_tenant_with_ten_jobs_does_not_wait_for_one_with_thousands(store: Store, queue: Queue) -> None:
    large = store.submit_batch("b", [Submission(prompt="a")] * 2000, max_failures=3, tenant="large")
    owner = {job.id: "large" for job in store.batch_jobs(large.id, limit=2000)}
    worker, dispatcher = uuid4(), Dispatcher(store, queue, SLOW)
    dispatcher.turn()
    claim_all(store, queue, worker, owner)
    small = store.submit_batch("b", [Submission(prompt="a")] * 10, max_failures=3, tenant="small")
    owner |= {job.id: "small" for job in store.batch_jobs(small.id)}
    served: list[str] = []
    while served.count("small") < 10:
        dispatcher.turn()
        served += claim_all(store, queue, worker, owner)
        ahead = served.count("large") - served.count("small")
        assert ahead <= 2 or served.count("small") == 10, "every second job is the small tenant's"


def submit_delayed(store: Store, tenant: str) -> None:
    job = store.submit(Submission(prompt="a"), max_failures=3, tenant=tenant)
    claim = store.claim(Message(job.id, 1), uuid4())
    assert claim is not None
    store.retry(claim, "internal", "tried again later", delay_s=600)


@pytest.mark.parametrize("delayed", [20, 150])
def test_what_lanes_that_hold_nothing_due_leave_is_shared_fairly_by_the_others(
    store: Store, queue: Queue, delayed: int
) -> None:
    for number in range(delayed):
        submit_delayed(store, f"waits {number}")
    owner = {task_id: tenant for tenant in "abc" for task_id in submit(store, 60, tenant=tenant)}
    beat(store, 60)
    Dispatcher(store, queue, SLOW).turn()
    assert Counter(owner[task_id] for task_id in queue.waiting()) == {"a": 20, "b": 20, "c": 20}


def test_a_lane_that_holds_less_than_its_part_leaves_the_rest_to_the_others_in_fair_parts(
    store: Store, queue: Queue
) -> None:
    jobs = {"a": 3, "b": 9, "c": 60, "d": 60}
    owner = {task_id: tenant for tenant, count in jobs.items() for task_id in submit(store, count, tenant=tenant)}
    beat(store, 60)
    Dispatcher(store, queue, SLOW).turn()
    assert Counter(owner[task_id] for task_id in queue.waiting()) == {"a": 3, "b": 9, "c": 24, "d": 24}


def test_lanes_that_hold_nothing_due_do_not_keep_others_waiting(store: Store, queue: Queue) -> None:
    for number in range(110):
        submit_delayed(store, f"waits {number}")
    dispatcher = Dispatcher(store, queue, SLOW)
    dispatcher.turn()
    assert (queue.depth(), len(store.lanes())) == (0, 110)
    (task_id,) = submit(store, 1, tenant="is due")
    dispatcher.turn()
    assert queue.waiting() == {task_id}


def test_lanes_that_hold_nothing_more_are_closed(store: Store, queue: Queue) -> None:
    submit(store, 2)
    worker, dispatcher = uuid4(), Dispatcher(store, queue, SLOW)
    for _ in range(3):
        dispatcher.turn()
        for task_id in queue.waiting():
            store.claim(Message(UUID(task_id[:36]), 1), worker)
    dispatcher.turn()
    assert store.lanes() == []


def close_all_lanes(store: Store) -> None:
    with store._begin() as connection:
        connection.execute(text("UPDATE lanes SET open = false"))


def test_a_leader_opens_lanes_that_hold_jobs_though_they_are_closed_when_it_takes_over_and_once_a_lease(
    store: Store, queue: Queue, caplog: pytest.LogCaptureFixture
) -> None:
    dispatcher, task_ids = Dispatcher(store, queue, SLOW), set(submit(store))
    beat(store, 2)
    close_all_lanes(store)
    dispatcher.turn()
    assert queue.waiting() == task_ids
    assert "though they were closed" in caplog.text
    task_ids |= set(submit(store))
    close_all_lanes(store)
    take_turns(dispatcher)
    assert queue.depth() == 1, "not in every turn"
    dispatcher._reopen_at -= SLOW.lease_s
    dispatcher._renew_at = 0.0
    dispatcher.turn()
    assert queue.waiting() == task_ids


def test_an_api_dispatches_and_sweeps_while_requests_hold_all_their_connections(
    settings: Settings, store: Store, queue: Queue, storage: Storage
) -> None:
    (task_id, left) = submit(store, 2)
    claim = store.claim(Message(UUID(left[:36]), 1), uuid4())
    assert claim is not None
    storage.put(checkpoint_key(claim.job_id, 1, 20), b"latents", "application/octet-stream")
    store.cancel(claim.job_id)
    app = create_app(settings)
    with closing(app.state.services) as services, ExitStack() as requests:
        for _ in range(CONNECTIONS):
            requests.enter_context(services.store._begin())
        app.state.dispatcher.turn()
        assert queue.waiting() == {task_id}
        app.state.sweeper.walk(threading.Event())
        assert app.state.sweeper.swept == 1


def test_a_dispatcher_that_finds_the_schema_ahead_stops(settings: Settings, store: Store, queue: Queue) -> None:
    raised: list[SchemaMismatch] = []
    dispatcher, stop = Dispatcher(store, queue, FAST), threading.Event()

    def run() -> None:
        try:
            dispatcher.run(stop)
        except SchemaMismatch as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    until(lambda: dispatcher.leading)
    migrate_ahead(settings)
    thread.join(20)
    assert not thread.is_alive()
    assert "ahead" in str(raised[0])
    assert not dispatcher.leading


def test_the_role_ends_with_its_code_and_one_line_when_the_schema_is_ahead(settings: Settings, store: Store) -> None:
    with another_dispatcher(settings) as process:
        submit(store)
        until(lambda: sum(store.window(lease_s=60).published.values()) == 1)
        migrate_ahead(settings)
        assert process.wait(10) == 2
        assert process.stderr is not None
        told = process.stderr.read().decode()
    assert "ahead" in told.strip().splitlines()[-1]
    assert "Traceback" not in told


def test_an_api_stops_dispatching_and_goes_on_answering_when_the_schema_is_ahead(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(settings) as url:
        migrate_ahead(settings)
        until(lambda: any(record.levelno == logging.CRITICAL for record in caplog.records))
        time.sleep(3 * settings.durations.renew_s)
        assert httpx.get(f"{url}{PREFIX}/jobs").is_success
    critical = [record.getMessage() for record in caplog.records if record.levelno == logging.CRITICAL]
    assert len(critical) == 1
    assert "dispatches nothing more" in critical[0]


def migrate_ahead(settings: Settings) -> None:
    with psycopg.connect(settings.require("database_url"), autocommit=True) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")


def test_the_jobs_of_a_silent_worker_are_taken_back_after_a_lease(store: Store, queue: Queue) -> None:
    (task_id,) = submit(store)
    job = Search(store.database).jobs().found[0]
    worker = uuid4()
    row = {"host": "h", "pid": 1, "device": "cpu", "model": "m", "revision": "r", "version": "0", "capacity": 1}
    store.beat(worker, row, "[]")
    with running(store, queue):
        until(lambda: queue.waiting() == {task_id})
        assert store.claim(Message(job.id, 1), worker) is not None
        until(lambda: Message(job.id, 2).task_id in queue.waiting())
    assert store.job(job.id).state is State.QUEUED


def test_a_redis_that_is_away_is_unavailable() -> None:
    queue = Queue("redis://127.0.0.1:1/0")
    for ask in (
        queue.ping,
        queue.depth,
        queue.waiting,
        queue.clear,
        lambda: queue.publish([Outgoing(Message(uuid4(), 1), Priority.BULK)]),
    ):
        with pytest.raises(Unavailable, match="Redis"):
            ask()
    queue.close()


def test_throughput_follows_what_was_claimed_and_forgets_within_seconds() -> None:
    throughput = Throughput()
    throughput._at -= 1
    throughput.published(100)
    assert 55 < throughput.measured(0) < 70
    throughput._at -= 5
    assert throughput.measured(0) < 1


def test_renewals_that_come_late_do_not_put_a_reclaim_off(store: Store, queue: Queue) -> None:
    durations = Durations(scale=0.1)
    submit(store)
    dead = uuid4()
    (job,) = Search(store.database).jobs().found
    assert store.claim(Message(job.id, 1), dead) is not None, "by a worker of which no heartbeat ever came"
    dispatcher = Dispatcher(store, queue, durations)
    for _ in range(4):
        dispatcher.turn()
        time.sleep(1.5 * durations.leader_s)  # a busy machine
    dispatcher.turn()
    assert dispatcher.counts.reclaimed == 1


def test_batches_that_could_not_be_counted_are_not_counted_again_at_once(
    store: Store, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def slow(holder: UUID) -> int:
        asked.append(holder)
        time.sleep(0.5)
        raise Unavailable("Postgres", "canceling statement due to statement timeout")

    monkeypatch.setattr(store, "finish_batches", slow)
    dispatcher = Dispatcher(store, queue, FAST)
    with pytest.raises(Unavailable):
        dispatcher.turn()
    dispatcher._renew_at = 0
    dispatcher.turn()
    assert asked == [dispatcher.id]
