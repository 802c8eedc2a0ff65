"""What a turn of the dispatcher costs with a million queued jobs of 1,000 tenants: ``make bench-dispatching``.

The rows are made in the embedded Postgres, each tenant's spread over its lanes: a standard batch, urgent jobs submitted
alone, a bulk batch, standard jobs submitted alone, in this order as many as are asked for. Each round looks at the
window, reads the lanes, picks a full window in fair order, takes it, and looks for overdue messages; a worker then
claims all of it, outside of the clock. The statements go through the product's own ``Store``, Python's part included.
The first rounds are thrown away; medians are told, and what Postgres planned if all together takes more than the limit.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID, uuid4

from sqlalchemy import text

from producer.jobs import schema
from producer.jobs.contract import Priority
from producer.jobs.fairness import FairOrder
from producer.jobs.local import local_servers
from producer.jobs.settings import Settings
from producer.jobs.store import Store, leading

LIMIT_MS = 20
WARM_UP = 5
LEASE_S = 3600
AUDIT_S = 3
DESCRIPTION = {"host": "h", "pid": 1, "device": "none", "model": "m", "revision": "0", "version": "0", "capacity": 1}

MAKE_TENANTS = """
    INSERT INTO tenants (name, weight) SELECT 'tenant ' || n, 1 + n % 3 FROM generate_series(1, :tenants, 10) AS n
"""
MAKE_BATCHES = """
    INSERT INTO batches (id, tenant, name, weight, jobs)
    SELECT gen_random_uuid(), 'tenant ' || n, kind, 1, 0
    FROM generate_series(1, :tenants) AS n, unnest(ARRAY['standard', 'bulk']) AS kind
"""
MAKE_LANES = f"""
    INSERT INTO lanes (tenant, batch_id, priority, open)
    SELECT 'tenant ' || n, batches.id, priority, true
    FROM generate_series(1, :tenants) AS n
    CROSS JOIN (VALUES (1, 'standard', {Priority.STANDARD.rank}), (2, NULL, {Priority.INTERACTIVE.rank}),
                       (3, 'bulk', {Priority.BULK.rank}), (4, NULL, {Priority.STANDARD.rank}))
        AS kinds (number, batch, priority)
    LEFT JOIN batches ON batches.tenant = 'tenant ' || n AND batches.name = kinds.batch
    WHERE number <= :lanes
"""
MAKE_JOBS = """
    INSERT INTO jobs (id, tenant, batch_id, lane_id, position, priority, work, request, max_failures)
    SELECT gen_random_uuid(), tenant, batch_id, lane_id, n, priority, 1 + n / 7 % 50,
           jsonb_build_object('prompt', 'A red banner with the text "SALE" in white ' || n, 'width', 728,
                              'height', 90, 'steps', 28, 'guidance', 5, 'seed', n), 3
    FROM generate_series(0, :jobs - 1) AS n
    JOIN (SELECT id AS lane_id, tenant, batch_id, priority, row_number() OVER (ORDER BY id) - 1 AS place FROM lanes)
        AS spread ON spread.place = n % (SELECT count(*) FROM lanes)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1_000_000)
    parser.add_argument("--tenants", type=int, default=1000)
    parser.add_argument("--lanes", type=int, default=2, choices=range(1, 5), help="lanes of a tenant")
    parser.add_argument("--window", type=int, default=100, help="messages of a full window: as many workers")
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory() as folder, local_servers(Settings(data_dir=Path(folder))) as farm:
        database_url = farm.settings.require("database_url")
        schema.upgrade(database_url)
        store = Store.at(database_url)
        _fill(store, jobs=options.jobs, tenants=options.tenants, lanes=options.lanes)
        _measure(store, options.window, options.rounds)
        store.close()


def _fill(store: Store, **sizes: int) -> None:
    began = time.perf_counter()
    with store._begin() as connection:
        connection.execute(text("SET LOCAL statement_timeout = 0"))
        for statement in (MAKE_TENANTS, MAKE_BATCHES, MAKE_LANES, MAKE_JOBS):
            connection.execute(text(statement), sizes)
    with store._single() as connection:
        connection.execute(text("SET statement_timeout = 0"))
        connection.execute(text("VACUUM ANALYZE"))
    made = "{jobs} queued jobs of {tenants} tenants with {lanes} lanes each".format(**sizes)
    print(f"{made} made in {time.perf_counter() - began:.0f} s", flush=True)


class Stopwatch:
    """Times in ms, by what they are of."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def of(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.times[what].append((time.perf_counter() - began) * 1000)


def _measure(store: Store, window: int, rounds: int) -> None:
    leader, order, watch = uuid4(), FairOrder(), Stopwatch()
    workers = [uuid4() for _ in range(window)]
    for worker in workers:
        store.beat(worker, DESCRIPTION, "[]")
    wanted: dict[int, int] = {}
    for _ in range(WARM_UP + rounds):
        wanted, claimed = _round(store, leader, workers, order, watch)
        for job_id in claimed:
            store.cancel(job_id)
    total = 0.0
    for what, times in watch.times.items():
        measured = times[WARM_UP:]
        total += statistics.median(measured)
        print(f"{statistics.median(measured):6.2f} ms {what} (least {min(measured):.2f}, most {max(measured):.2f})")
    print(f"{total:6.2f} ms together; to reach: under {LIMIT_MS} ms")
    if total > LIMIT_MS:
        _explain(store, leader, wanted)


def _round(
    store: Store, leader: UUID, workers: Sequence[UUID], order: FairOrder, watch: Stopwatch
) -> tuple[dict[int, int], list[UUID]]:
    """What was asked of the lanes, and which jobs the workers claimed."""
    window = len(workers)
    store.lead(leader, leader_s=LEASE_S)
    with watch.of("window"):
        room = window - sum(store.window(lease_s=LEASE_S).published.values())
    with watch.of("lanes"):
        lanes = store.lanes()
    with watch.of("pick"):
        wanted = Counter(order.pick(lanes, room))
    with watch.of(f"next_messages, {window} of them"):
        messages = store.next_messages(leader, wanted, room)
    with watch.of("charge"):
        order.charge(messages)
    with watch.of("overdue_messages"):
        store.overdue_messages(leader, audit_s=AUDIT_S)
    assert len(messages) == room == window
    for published, worker in zip(messages, workers, strict=True):
        assert store.claim(published.message, worker)
    return wanted, [published.message.job_id for published in messages]


def _explain(store: Store, leader: UUID, wanted: dict[int, int]) -> None:
    values = {
        "holder": leader,
        "lanes": list(wanted),
        "counts": list(wanted.values()),
        "limit": None,
        "lease": LEASE_S,
        "audit": AUDIT_S,
    }
    for name in ("_WINDOW", "_LANES", "_NEXT_MESSAGES", "_OVERDUE_MESSAGES"):
        statement = getattr(leading, name)
        print(f"\n{name}")
        with store._begin() as connection:
            explained = text(f"EXPLAIN (ANALYZE, BUFFERS) {statement.text}")
            for row in connection.execute(explained, {key: values[key] for key in statement._bindparams}):
                print(row[0])


if __name__ == "__main__":
    main()
