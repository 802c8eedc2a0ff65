import base64
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import uuid4

import pytest
import redis

from producer.jobs.contract import QUEUE, Message, State, Submission
from producer.jobs.dispatcher import Dispatcher, Throughput
from producer.jobs.errors import Unavailable
from producer.jobs.queue import Queue
from producer.jobs.settings import Durations, Settings
from producer.jobs.store import Store
from tests.waiting import until

FAST = Durations(scale=0.02)


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
def running(store: Store, queue: Queue) -> Iterator[Dispatcher]:
    dispatcher, stop = Dispatcher(store, queue, FAST), threading.Event()
    thread = threading.Thread(target=dispatcher.run, args=(stop,))
    thread.start()
    try:
        yield dispatcher
    finally:
        stop.set()
        thread.join(20)
        assert not thread.is_alive()


def submit(store: Store, count: int = 1) -> list[str]:
    """Submits so many and returns the task ids of their first claims, in order."""
    batch = store.submit_batch("b", [Submission(prompt="a") for _ in range(count)], max_failures=3)
    return [Message(job.id, 1).task_id for job in store.batch_jobs(batch.id)]


def beat(store: Store, workers: int) -> None:
    row = {"host": "h", "pid": 1, "device": "cpu", "model": "m", "revision": "r", "version": "0", "capacity": 1}
    for _ in range(workers):
        store.beat(uuid4(), row, "[]")


def test_a_message_holds_the_jobs_id_and_claim_and_nothing_of_its_contents(
    store: Store, queue: Queue, broker: "redis.Redis"
) -> None:
    (task_id,) = submit(store)
    with running(store, queue):
        until(lambda: queue.waiting() == {task_id})
    (body,) = broker.lrange(QUEUE, 0, -1)
    job_id, _, claim = task_id.partition(":")
    (arguments, *_rest) = json.loads(base64.b64decode(json.loads(body)["body"]))
    assert arguments == [job_id, int(claim)]


def test_redis_holds_only_a_window_however_long_the_backlog_is(store: Store, queue: Queue) -> None:
    submit(store, 200)
    beat(store, 3)
    with running(store, queue):
        until(lambda: queue.depth() == 3)
        time.sleep(10 * FAST.top_up_s)
        assert queue.depth() == 3
    assert store.window(lease_s=60) == (3, 3)


def test_a_commit_is_published_at_once(store: Store, queue: Queue) -> None:
    slow = Durations(scale=50)  # a top-up every 10 s: only the notification can be quick
    dispatcher, stop = Dispatcher(store, queue, slow), threading.Event()
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
    (task_id,) = submit(store)
    with running(store, queue) as dispatcher:
        until(lambda: queue.waiting() == {task_id})
        broker.flushdb()
        until(lambda: queue.waiting() == {task_id})
        assert dispatcher.counts.republished >= 1


def test_a_message_that_a_dead_worker_took_along_is_published_again(
    store: Store, queue: Queue, broker: "redis.Redis"
) -> None:
    (task_id,) = submit(store)
    with running(store, queue):
        until(lambda: queue.waiting() == {task_id})
        body = broker.rpop(QUEUE)
        broker.hset("unacked", "some-tag", json.dumps([json.loads(body), "", QUEUE]))
        until(lambda: queue.waiting() == {task_id})


def test_a_message_that_still_waits_is_not_published_twice(store: Store, queue: Queue) -> None:
    submit(store)
    with running(store, queue) as dispatcher:
        until(lambda: queue.depth() == 1)
        time.sleep(4 * FAST.audit_s)
        assert (queue.depth(), dispatcher.counts.republished) == (1, 0)


def test_rubbish_in_the_queue_harms_nothing(store: Store, queue: Queue, broker: "redis.Redis") -> None:
    broker.lpush(QUEUE, b"\xff", b"{}", b"[1]", b'{"headers": 3}')
    (task_id,) = submit(store)
    with running(store, queue):
        until(lambda: task_id in queue.waiting())
    assert queue.waiting() == {task_id}


def test_one_of_two_leads_and_the_other_takes_over(store: Store, queue: Queue) -> None:
    with running(store, queue) as second:
        until(lambda: second.leading)
        with running(store, queue) as first:
            time.sleep(3 * FAST.renew_s)
            assert second.leading
            assert not first.leading
            store.resign(second.id)
            until(lambda: first.leading or second.leading)
            assert sum((first.leading, second.leading)) >= 1


def test_the_jobs_of_a_silent_worker_are_taken_back_after_a_lease(store: Store, queue: Queue) -> None:
    (task_id,) = submit(store)
    job = store.jobs()[0][0]
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
    for ask in (queue.ping, queue.depth, queue.waiting, lambda: queue.publish([Message(uuid4(), 1)])):
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
