"""The Celery app with its settings, and what the dispatcher asks of Redis.

A message holds nothing but a job's id and the claim that it is meant for; its Celery task id is ``job:claim``.
Celery alone loses messages on this broker (kombu pops one before it notes it as unacknowledged), so nothing here is
relied on, and nothing noted: a message that is taken is gone from Redis, and the dispatcher's audit compares what Redis
holds with what it should hold. Each priority has a list of its own, and a worker takes from the most urgent first.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import redis
from celery import Celery
from kombu.exceptions import OperationalError
from redis.backoff import NoBackoff
from redis.retry import Retry

from producer.jobs.broker import LISTS, PRIORITY_STEPS, Connection, Rubbish, Transport, read_message
from producer.jobs.contract import QUEUE, TASK, Outgoing
from producer.jobs.errors import Unavailable

SOCKET_OPTIONS: dict[str, Any] = {
    "socket_timeout": 10,
    "socket_connect_timeout": 5,
    "socket_keepalive": True,
    "health_check_interval": 15,
}


def celery_app(redis_url: str) -> Celery:
    """The app that dispatcher and workers share. No result backend: the row is the result."""
    app = Celery("ovis", broker=redis_url)
    app.amqp.Connection = Connection
    app.conf.update(
        task_default_queue=QUEUE,
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        task_acks_late=True,  # or Celery would take as many again while all its threads are at work
        task_acks_on_failure_or_timeout=True,
        task_reject_on_worker_lost=False,  # the lease decides
        worker_prefetch_multiplier=1,
        worker_enable_remote_control=False,  # nobody uses it, and whoever reaches Redis could
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_send_task_events=False,
        worker_hijack_root_logger=False,
        broker_connection_retry=True,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_use_ssl=_ssl(redis_url),
        broker_transport=f"{Transport.__module__}:{Transport.__qualname__}",
        broker_transport_options={"priority_steps": PRIORITY_STEPS, **SOCKET_OPTIONS},
    )
    return app


def _ssl(redis_url: str) -> dict[str, Any] | None:
    """As redis-py reads the address: kombu knows ``rediss`` only by the name of its own transport."""
    options = redis.ConnectionPool.from_url(redis_url)
    if not issubclass(options.connection_class, redis.SSLConnection):
        return None
    given = {name: value for name, value in options.connection_kwargs.items() if name.startswith("ssl_")}
    return {"ssl_cert_reqs": "required"} | given


class Queue:
    """Redis as the dispatcher uses it. Every method raises ``Unavailable`` when it does not answer."""

    def __init__(self, redis_url: str) -> None:
        self._app = celery_app(redis_url)
        self._redis = redis.Redis.from_url(redis_url, retry=Retry(NoBackoff(), retries=0), **SOCKET_OPTIONS)

    def close(self) -> None:
        self._app.close()
        self._redis.close()

    def ping(self) -> None:
        """Return if Redis answers."""
        with _reaching_redis():
            self._redis.ping()

    def publish(self, messages: Iterable[Outgoing]) -> None:
        """Send the messages, in order, over one connection.

        Asks first whether Redis is there: kombu would try for longer than a leader may be silent.
        """
        self.ping()
        with _reaching_redis(), self._app.producer_pool.acquire(block=True) as producer:
            for outgoing in messages:
                message = outgoing.message
                self._app.send_task(
                    TASK,
                    args=(str(message.job_id), message.claim),
                    task_id=message.task_id,
                    priority=outgoing.priority.rank,
                    producer=producer,
                    retry=False,
                    ignore_result=True,
                )

    def depth(self) -> int:
        """Messages that wait in the queue; those that a worker has taken are not among them."""
        with _reaching_redis(), self._redis.pipeline(transaction=False) as pipe:
            for name in LISTS.values():
                pipe.llen(name)
            return sum(pipe.execute())

    def waiting(self) -> set[str]:
        """The task ids that wait in the queue, as far as a worker can take them. Reads the whole queue."""
        with _reaching_redis(), self._redis.pipeline(transaction=False) as pipe:
            for name in LISTS.values():
                pipe.lrange(name, 0, -1)
            return {task_id for entries in pipe.execute() for task_id in _task_ids(entries)}

    def clear(self) -> None:
        """Forget all that waits in the queue; the audit publishes again what should."""
        with _reaching_redis():
            self._redis.unlink(*LISTS.values())


def _task_ids(entries: Iterable[bytes | str]) -> Iterator[str]:
    """Of the messages among these entries. Rubbish is not counted as there: a worker will drop it."""
    for entry in entries:
        with suppress(Rubbish):
            yield read_message(entry).task_id


@contextmanager
def _reaching_redis() -> Iterator[None]:
    try:
        yield
    except (redis.RedisError, OperationalError, OSError) as error:
        raise Unavailable("Redis", str(error) or type(error).__name__) from error
