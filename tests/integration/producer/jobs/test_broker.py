"""What lies in the queues of Redis and is no message: a real worker drops it, says so once, and goes on."""

import json
import subprocess
import sys
from base64 import b64decode, b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psutil
import pytest
import redis

from producer.jobs.broker import CLAIM_MAX, LISTS, Rubbish, read_message
from producer.jobs.contract import TASK, Message, Outgoing, Priority, State, Submission
from producer.jobs.queue import Queue, celery_app
from producer.jobs.settings import Settings
from producer.jobs.store import Store
from tests.farm import Farmhand, environment
from tests.waiting import until

ROOT = Path(__file__).parents[4]
UNKNOWN = Message(UUID(int=7), 3)
NO_ENVELOPE = (
    b"\xff\xfe",
    b"",
    b"no json",
    b"3",
    b"[1]",
    b"{}",
    b"null",
    b'"words"',
    b"[" * 100_000,
    b'{"body": "e30="}',
)
INSTEAD: tuple[Any, ...] = (
    None,
    3,
    -1,
    True,
    "no such thing",
    "",
    [],
    [1],
    {},
    {"a": 1},
    {"__type__": "uuid", "__value__": "none"},
)


@pytest.fixture
def broker(settings: Settings) -> Iterator["redis.Redis"]:
    client = redis.Redis.from_url(settings.require("redis_url"))
    yield client
    client.close()


@pytest.fixture
def queue(settings: Settings) -> Iterator[Queue]:
    queue = Queue(settings.require("redis_url"))
    yield queue
    queue.close()


@contextmanager
def worker(settings: Settings, log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    with log.open("wb") as words:
        process = subprocess.Popen(
            [sys.executable, ROOT / "tests" / "blank_worker.py"], env=environment(settings), cwd=ROOT, stderr=words
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def entry(queue: Queue, broker: "redis.Redis", message: Message = UNKNOWN) -> dict[str, Any]:
    """An entry as the dispatcher writes it; the queue is empty again afterwards."""
    queue.publish([Outgoing(message, Priority.STANDARD)])
    (written,) = broker.lrange(LISTS[Priority.STANDARD], 0, -1)
    queue.clear()
    envelope: dict[str, Any] = json.loads(written)
    return envelope


def with_body(envelope: dict[str, Any], body: Any) -> dict[str, Any]:
    return envelope | {"body": b64encode(json.dumps(body).encode()).decode()}


def damaged(value: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The entry with each of its fields, however deep, missing or replaced."""
    for name, inner in value.items():
        yield {other: kept for other, kept in value.items() if other != name}
        yield from (value | {name: other} for other in INSTEAD)
        if isinstance(inner, dict):
            yield from (value | {name: other} for other in damaged(inner))


def wrong_arguments() -> list[list[Any]]:
    job = str(UUID(int=7))
    claims: list[Any] = ["one", None, True, 0, -1, 1.5, CLAIM_MAX + 1]
    return [[], [job], [job, 1, 2], ["no uuid", 1], [7, 1], [None, 1], *([job, claim] for claim in claims)]


def test_what_the_dispatcher_writes_is_read(queue: Queue, broker: "redis.Redis") -> None:
    assert read_message(json.dumps(entry(queue, broker))) == UNKNOWN


def test_wrong_arguments_an_unknown_task_and_a_foreign_form_are_rubbish(queue: Queue, broker: "redis.Redis") -> None:
    good = entry(queue, broker)
    _arguments, keywords, embedded = json.loads(b64decode(good["body"]))
    for arguments in wrong_arguments():
        with pytest.raises(Rubbish):
            read_message(json.dumps(with_body(good, [arguments, keywords, embedded])))
    for change in (
        {"headers": good["headers"] | {"task": "of.nobody"}},
        {"content-type": "application/x-python-serialize"},
        {"body": "no base64!"},
    ):
        with pytest.raises(Rubbish):
            read_message(json.dumps(good | change))


def test_whatever_lies_in_the_queues_a_worker_goes_on_and_nothing_of_it_stays(
    settings: Settings, store: Store, queue: Queue, broker: "redis.Redis", tmp_path: Path
) -> None:
    good = entry(queue, broker)
    rubbish = [*NO_ENVELOPE, *(json.dumps(other).encode() for other in damaged(good))]
    rubbish += [json.dumps(with_body(good, [arguments, {}, {}])).encode() for arguments in wrong_arguments()]
    rubbish += [json.dumps(with_body(good, body)).encode() for body in INSTEAD]
    dropped = sum(_is_rubbish(item) for item in rubbish)
    assert dropped > 50
    assert len(rubbish) - dropped > 100, "those that hold a message all the same, of no job"
    job = store.submit(Submission(prompt="a", width=64, height=64), max_failures=3)
    with worker(settings, tmp_path / "log") as process:
        for number, item in enumerate(rubbish):
            broker.lpush(list(LISTS.values())[number % len(LISTS)], item)
        until(lambda: queue.depth() == 0 or process.poll() is not None)
        queue.publish([Outgoing(Message(job.id, 1), Priority.STANDARD)])
        until(lambda: store.job(job.id).state is State.SUCCEEDED or process.poll() is not None)
        assert process.poll() is None, (tmp_path / "log").read_text()[-2000:]
        assert broker.keys() == []
        assert psutil.Process(process.pid).is_running()
    told = (tmp_path / "log").read_text(errors="replace")
    assert told.count("dropped what is no message") == dropped
    assert "Traceback" not in told, told[told.index("Traceback") - 1000 :][:3000]


def _is_rubbish(item: bytes) -> bool:
    try:
        read_message(item)
    except Rubbish:
        return True
    return False


def test_messages_of_unknown_and_of_finished_jobs_are_acknowledged_and_change_nothing(
    settings: Settings, store: Store, queue: Queue, broker: "redis.Redis", tmp_path: Path
) -> None:
    job = store.submit(Submission(prompt="a", width=64, height=64), max_failures=3)
    hand = Farmhand(settings)
    hand.succeed(job)
    hand.close()
    before = store.job(job.id)
    with worker(settings, tmp_path / "log") as process:
        for message in (UNKNOWN, Message(job.id, 1), Message(job.id, 2)):
            queue.publish([Outgoing(message, Priority.BULK)])
        until(lambda: queue.depth() == 0)
        next_job = store.submit(Submission(prompt="a", width=64, height=64), max_failures=3)
        queue.publish([Outgoing(Message(next_job.id, 1), Priority.BULK)])  # by when the others are done with, too
        until(lambda: store.job(next_job.id).state is State.SUCCEEDED)
        assert process.poll() is None
    assert store.job(job.id) == before
    assert len(store.history(job.id)) == 1
    assert "Traceback" not in (tmp_path / "log").read_text()


def contents(broker: "redis.Redis") -> dict[bytes, bytes | None]:
    return {key: broker.dump(key) for key in broker.scan_iter()}


@pytest.mark.parametrize("note", ["garbage", "3", '[3, "", "ovis.images"]', None])
def test_what_lies_where_kombu_keeps_its_notes_is_not_read(
    settings: Settings, queue: Queue, broker: "redis.Redis", note: str | None
) -> None:
    """Neither as messages are taken and acknowledged, nor by what kombu does every ten seconds."""
    if note is None:
        for key in ("unacked", "unacked_index", "_kombu.binding.ovis.images"):
            broker.set(key, "of another type")
    else:
        broker.hset("unacked", "t", note)
        broker.zadd("unacked_index", {"t": 1})
    before = contents(broker)
    queue.publish([Outgoing(UNKNOWN, Priority.STANDARD)])
    taken: list[str] = []
    app = celery_app(settings.require("redis_url"))
    with app.connection_for_read() as connection, app.amqp.TaskConsumer(connection.channel()) as consumer:

        def take(message: Any) -> None:
            taken.append(message.headers["id"])
            message.ack()

        consumer.on_message = take
        consumer.consume()
        connection.drain_events(timeout=5)
        connection.transport.cycle.maybe_restore_messages()
    app.close()
    assert taken == [UNKNOWN.task_id]
    assert contents(broker) == before


def test_what_a_channel_has_not_acknowledged_when_it_ends_is_left_to_the_audit(
    settings: Settings, queue: Queue, broker: "redis.Redis"
) -> None:
    queue.publish([Outgoing(UNKNOWN, Priority.STANDARD)])
    taken: list[Any] = []
    app = celery_app(settings.require("redis_url"))
    with app.connection_for_read() as connection, app.amqp.TaskConsumer(connection.channel()) as consumer:
        consumer.on_message = taken.append
        consumer.consume()
        connection.drain_events(timeout=5)
    app.close()
    assert len(taken) == 1
    assert broker.keys() == []


def test_kombus_own_transport_would_end_the_worker(settings: Settings, broker: "redis.Redis") -> None:
    """Why there is one of our own. If this fails, kombu has learnt it and ``broker.Transport`` can go."""
    app = celery_app(settings.require("redis_url"))
    app.conf.broker_transport = None
    app.task(name=TASK)(print)
    broker.lpush(LISTS[Priority.STANDARD], b"no json")
    with app.connection_for_read() as connection, app.amqp.TaskConsumer(connection.channel()) as consumer:
        consumer.on_message = print
        consumer.consume()
        with pytest.raises(ValueError, match="Expecting value"):
            connection.drain_events(timeout=5)
    app.close()


def test_a_worker_takes_the_most_urgent_first(settings: Settings, store: Store, queue: Queue) -> None:
    urgency = [Priority.BULK, Priority.STANDARD, Priority.INTERACTIVE, Priority.BULK, Priority.INTERACTIVE]
    sent = [Outgoing(Message(uuid4(), number), priority) for number, priority in enumerate(urgency, start=1)]
    queue.publish(sent)
    taken: list[int] = []
    app = celery_app(settings.require("redis_url"))
    with app.connection_for_read() as connection, app.amqp.TaskConsumer(connection.channel()) as consumer:

        def take(message: Any) -> None:
            taken.append(int(message.headers["id"].rpartition(":")[2]))
            message.ack()

        consumer.on_message = take
        consumer.consume()
        while len(taken) < len(sent):
            connection.drain_events(timeout=5)
    app.close()
    assert taken == [3, 5, 2, 1, 4]
