"""Redis, Postgres and the bucket: killed, emptied, cut off, refused, slow and away."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import redis

from tests.chaos.doomed import Plan
from tests.chaos.farm import LOST_MESSAGE_S, Farm
from tests.chaos.nursery import Member
from tests.chaos.proxy import Kind, Proxy, Trouble
from tests.waiting import until

AWAY_S = 60.0
"""At the product's own durations; scaled with them."""
STEP_S = 0.02


@contextmanager
def _busy(farm: Farm, workers: int = 2, **settings: object) -> Iterator[list[Member]]:
    """A dispatcher and workers with a backlog before them."""
    farm.dispatcher()
    members = [farm.worker(Plan(step_s=STEP_S), **settings) for _ in range(workers)]
    farm.await_live(*members)
    _feed(farm)
    until(farm.succeeded)
    yield members


def _feed(farm: Farm) -> None:
    """So much that the workers are drawing, and messages wait."""
    if (missing := 200 - farm.open_jobs()) > 0:
        farm.submit(missing)


# 4


def redis_lost(farm: Farm) -> None:
    """Flushed; killed and started with what it wrote down; killed and started with nothing."""
    with _busy(farm) as workers:
        for _ in range(3 if farm.long else 1):
            for name, lose, limit_s in (
                ("FLUSHALL", _flush, LOST_MESSAGE_S),
                ("killed, started with its file", _restart, None),
                ("killed, started without its file", _restart_empty, None),
            ):
                _feed(farm)
                missing = farm.unclaimed()
                fault = farm.fault(f"Redis: {name}")
                fault.limit_s = limit_s
                lose(farm)
                farm.recovered(fault, lambda missing=missing: farm.claimed(missing))
        farm.until_ended()
        farm.expect(all(worker.alive for worker in workers), "a worker ended for want of Redis")
    farm.expect(not farm.steps_wasted(), "a loss of messages cost drawn steps")
    farm.expect(not farm.charged(), "a loss of messages was charged as a failure")


def _flush(farm: Farm) -> None:
    with redis.Redis.from_url(farm.settings.require("redis_url")) as broker:
        broker.flushall()


def _restart(farm: Farm) -> None:
    farm.servers.kill("redis")
    farm.servers.start("redis")


def _restart_empty(farm: Farm) -> None:
    farm.servers.kill("redis")
    farm.servers.lose_redis_file()
    farm.servers.start("redis")


# 5


def postgres_lost(farm: Farm) -> None:
    """Killed and started again, away for a minute, connections cut in the midst of claim and record, none left."""
    proxy = farm.through_proxy("postgres")
    with _busy(farm) as workers:
        for away_s in (0, 0, AWAY_S * farm.time_scale):
            _feed(farm)
            fault = farm.fault(f"Postgres killed, {away_s:.0f} s away")
            farm.servers.kill("postgres")
            time.sleep(away_s)
            farm.servers.start("postgres")
            fault.at += away_s
            farm.recovered(fault, farm.going_on())
        for pattern in (b"state = 'running', claim", b"state = 'succeeded', finished_at"):
            for kind in (Kind.RESET, Kind.LOSE_ANSWER):
                _cut(farm, proxy, Trouble(kind, pattern, times=20 if farm.long else 4))
        for _ in range(10 if farm.long else 3):
            _feed(farm)
            _terminate_backends(farm)
        _exhaust_connections(farm)
        farm.until_ended()
        farm.expect(all(worker.alive for worker in workers), "a worker ended for want of Postgres")
    farm.expect(not farm.charged(), "an outage was charged as a failure")
    farm.expect(not farm.lost_leases(), "an outage cost a claim")


def _cut(farm: Farm, proxy: Proxy, trouble: Trouble) -> None:
    """Until so many connections were cut in the midst of this statement."""
    before = proxy.done
    fault = farm.fault(f"connections cut: {trouble.kind.name} of {trouble.pattern!r}")
    with proxy.doing(trouble):
        deadline = time.monotonic() + 60
        while proxy.done - before < trouble.times and time.monotonic() < deadline:
            _feed(farm)
            proxy.cut()  # new connections send their statements in words, which can be told apart
            time.sleep(0.3)
    fault.times = proxy.done - before
    farm.expect(fault.times > 0, f"{fault.kind}: nothing was cut")
    fault.at = time.time()
    farm.recovered(fault, farm.going_on())


def _terminate_backends(farm: Farm) -> None:
    fault = farm.fault("connections ended by the operator")
    ended = farm.rows(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    fault.times = len(ended)
    farm.recovered(fault, farm.going_on())


def _exhaust_connections(farm: Farm) -> None:
    """Somebody else takes every connection there is, those of the farm too as they come free."""
    idle: list[psycopg.Connection[object]] = []
    fault = farm.fault("no connection left")
    _feed(farm)
    farm.rows(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname IS NOT NULL"
    )
    deadline = time.monotonic() + AWAY_S / 4 * farm.time_scale
    refused = 0
    while time.monotonic() < deadline or not refused:
        try:
            idle.append(psycopg.connect(farm.database_url()))
        except psycopg.OperationalError:
            refused += 1
            time.sleep(0.05)
    for connection in idle:
        connection.close()
    fault.at = time.time()
    until(farm.answers)
    going_on = farm.going_on()
    _feed(farm)
    farm.recovered(fault, going_on)


# 6


def bucket_lost(farm: Farm) -> None:
    """It refuses, waits, resets, breaks off, loses answers, is away for a minute: what is drawn is stored later."""
    proxy = farm.through_proxy("s3")
    trouble_s = 5.0 if farm.long else 2.0
    with _busy(farm, checkpoint_steps=5) as workers:
        for trouble in (
            Trouble(Kind.REFUSE),
            Trouble(Kind.REFUSE, status=b"500 Internal Server Error", code=b"InternalError"),
            Trouble(Kind.RESET),
            Trouble(Kind.TRUNCATE),
            Trouble(Kind.LOSE_ANSWER),
            Trouble(Kind.SLOW, slow_s=trouble_s / 2),
        ):
            _feed(farm)
            fault = farm.fault(f"bucket: {trouble.kind.name} {trouble.code.decode()}")
            before = proxy.done
            with proxy.doing(trouble):
                time.sleep(trouble_s)
            fault.times = proxy.done - before
            farm.expect(fault.times > 0, f"{fault.kind}: no request met it")
            fault.at = time.time()
            farm.recovered(fault, farm.going_on())
        _feed(farm)
        fault = farm.fault("bucket killed, and away for a minute")
        farm.servers.kill("s3")
        time.sleep(AWAY_S * farm.time_scale)
        farm.servers.start("s3")
        fault.at = time.time()
        farm.recovered(fault, farm.going_on())
        farm.until_ended()
        farm.expect(all(worker.alive for worker in workers), "a worker ended for want of the bucket")
    farm.expect(not farm.steps_wasted(), f"an outage of the bucket cost {farm.steps_wasted()} drawn steps")
    farm.expect(not farm.charged(), "an outage of the bucket was charged as a failure")
    for worker in workers:
        said = worker.log().count("waiting for S3")
        farm.expect(0 < said <= len(farm.faults), f"{said} lines say that S3 is away: {worker.log_path}")
