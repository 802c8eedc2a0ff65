"""How long a page of a search takes among ten million jobs: ``python tests/benchmarks/search.py [--jobs N]``.

The rows are made in an embedded Postgres, in SQL: 200 tenants, of whom the first has half of all and one a thousand,
batches of 50,000, the newest jobs queued, one job in a hundred failed, prompts of a template's words, a headline of
20,000 and a number of its own. Each question is asked through the product's own ``Search``, Python's part included: the
first page of 50, and (``page 2``) the one behind its cursor; then what pages and estimates ask of the whole farm. The
first rounds are thrown away; medians are told. It needs some 20 GB; in a ``--folder`` they stay, and are asked again by
the next run.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from uuid import UUID

from sqlalchemy import text

from producer.jobs import schema
from producer.jobs.contract import State
from producer.jobs.estimate import estimate
from producer.jobs.local import local_servers
from producer.jobs.postgres import Database
from producer.jobs.search import BatchFilter, JobFilter, Page, Search, Sort
from producer.jobs.settings import Settings
from producer.jobs.store import Store

LIMIT_MS = 50
WARM_UP = 2
ROUNDS = 7
PAGE = 50
BATCH = 50_000
TENANTS = 200
SMALL, LARGE = "tenant 1", "tenant 0"
SMALL_JOBS = 1000

PROMPT = """
    'A ' || (ARRAY['red', 'blue', 'green', 'vivid', 'pale', 'golden', 'matte', 'glossy'])[1 + n % 8] || ' banner for '
    || (ARRAY['shoes', 'lamps', 'chairs', 'bikes', 'tents', 'watches', 'phones', 'plants'])[1 + n / 8 % 8]
    || ' number sku' || n || ' with the text "headline' || hashint8(n) % 20000 || '" in white, studio light'
    || CASE WHEN n % 1000 = 7 THEN ', unicorn' ELSE '' END || CASE WHEN n % 1000000 = 77 THEN ', narwhal' ELSE '' END
"""
MAKE_BATCHES = """
    INSERT INTO batches (id, tenant, name, jobs, lines, created_at)
    SELECT gen_random_uuid(), 'tenant ' || CASE WHEN n % 2 = 0 THEN 0 ELSE n % :tenants END, 'batch ' || n,
           :batch, :batch, now() - make_interval(mins => CAST(:batches - n AS int))
    FROM generate_series(0, :batches - 1) AS n
"""
MAKE_JOBS = f"""
    INSERT INTO jobs (id, tenant, batch_id, lane_id, position, priority, work, request, max_failures, created_at,
                      state, claim, worker_id, finished_at, error_code, object_key, sha256)
    SELECT gen_random_uuid(), tenant, id, 1, n % :batch, 1, 28,
           jsonb_build_object('prompt', {PROMPT}, 'width', 728, 'height', 90, 'steps', 28, 'guidance', 5, 'seed', n),
           3, created_at,
           state, 1, gen_random_uuid(), CASE WHEN state <> 'queued' THEN created_at + interval '1 minute' END,
           CASE WHEN state = 'failed' THEN CASE WHEN n % 10000 = 50 THEN 'exhausted' ELSE 'internal' END END, 'k', 's'
    FROM (SELECT *, row_number() OVER (ORDER BY created_at) - 1 AS number FROM batches) AS batches
    CROSS JOIN LATERAL (
        SELECT number * :batch + place AS n FROM generate_series(0, :batch - 1) AS place) AS places
    CROSS JOIN LATERAL (
        SELECT CASE WHEN number >= :queued_from THEN 'queued' WHEN n % 100 = 50 THEN 'failed'
                    ELSE 'succeeded' END AS state) AS states
    WHERE number BETWEEN :first AND :first + 9 AND (tenant <> :small OR n % :batch < :small_jobs)
"""
MAKE_WORDS = """
    INSERT INTO prompt_words (tenant, batch_id, first_position, last_position, created_at, words)
    SELECT min(tenant), batch_id, min(position), max(position), min(created_at),
           array_to_tsvector(array_agg(DISTINCT word) || array_agg(DISTINCT '@' || tenant))
    FROM jobs CROSS JOIN LATERAL string_to_table(translate(lower(request ->> 'prompt'), '",', ''), ' ') AS word
    WHERE seq BETWEEN :first AND :last
    GROUP BY batch_id, position / 100 ORDER BY min(seq)
"""
MAKE_TALLIES = """
    INSERT INTO tallies (tenant, batch_id, priority, state, jobs, pixel_steps, at, folded)
    SELECT tenant, batch_id, priority, state, count(*), sum(work * 1e6), max(created_at), true
    FROM jobs GROUP BY GROUPING SETS ((tenant, batch_id, priority, state), (tenant, priority, state))
"""


def make(database: Database, jobs: int) -> None:
    """Indexes are made after the rows, as far as they are not keys."""
    batches = jobs // BATCH
    with database.begin() as connection:
        connection.execute(text("SET LOCAL statement_timeout = 0"))
        connection.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))
        connection.execute(text("SET LOCAL session_replication_role = replica"))  # no events of rows that never were
        connection.execute(text("SET LOCAL maintenance_work_mem = '1GB'"))
        indexes = connection.execute(
            text(
                "SELECT indexname, indexdef FROM pg_indexes WHERE tablename IN ('jobs', 'prompt_words')"
                " AND indexdef NOT LIKE 'CREATE UNIQUE%'"
            )
        ).all()
        for name, _ in indexes:
            connection.execute(text(f"DROP INDEX {name}"))
        connection.execute(text(MAKE_BATCHES), {"tenants": TENANTS, "batch": BATCH, "batches": batches})
        same = {"batch": BATCH, "queued_from": batches * 95 // 100, "small": SMALL, "small_jobs": SMALL_JOBS}
        made = 0
        for first in range(0, batches, 10):
            before, made = made, made + connection.execute(text(MAKE_JOBS), same | {"first": first}).rowcount
            connection.execute(text(MAKE_WORDS), {"first": before + 1, "last": made})
        connection.execute(text(MAKE_TALLIES))
        for _, definition in indexes:
            connection.execute(text(definition))
    with database.single() as connection:
        connection.execute(text("SET statement_timeout = 0"))
        connection.execute(text("VACUUM ANALYZE jobs, batches, prompt_words, tallies"))


Question = Callable[[str | None], Page[object]]


@dataclass(frozen=True)
class Sample:
    """A batch of the first tenant, and a quarter of the time."""

    batch_id: UUID
    early: datetime
    late: datetime

    @classmethod
    def of(cls, database: Database) -> "Sample":
        statement = """
            SELECT (SELECT id FROM batches WHERE tenant = :tenant ORDER BY created_at OFFSET 1 LIMIT 1) AS batch_id,
                   min(created_at) + (max(created_at) - min(created_at)) / 4 AS early,
                   min(created_at) + (max(created_at) - min(created_at)) / 2 AS late
            FROM batches
        """
        with database.single() as connection:
            return cls(**connection.execute(text(statement), {"tenant": LARGE}).mappings().one())


def questions(search: Search, sample: Sample) -> dict[str, Question]:
    """Each takes a cursor."""
    batch_id, early, late = sample.batch_id, sample.early, sample.late

    def jobs(sort: Sort = Sort.NEWEST, **which: object) -> Question:
        return lambda cursor: search.jobs(JobFilter(**which), sort=sort, cursor=cursor, limit=PAGE)  # type: ignore[arg-type,return-value]

    return {
        "all, newest first": jobs(),
        "all, oldest first": jobs(Sort.OLDEST),
        "last finished first": jobs(Sort.LAST_FINISHED),
        "state failed": jobs(state=State.FAILED),
        "state succeeded": jobs(state=State.SUCCEEDED),
        "state running (none)": jobs(state=State.RUNNING),
        "failed, last finished first": jobs(Sort.LAST_FINISHED, state=State.FAILED),
        "error code, common": jobs(error_code="internal"),
        "error code, rare": jobs(error_code="exhausted"),
        "error code, none": jobs(error_code="nothing"),
        "time": jobs(submitted_after=early, submitted_before=late),
        "time, state failed": jobs(submitted_after=early, submitted_before=late, state=State.FAILED),
        "time, error code": jobs(submitted_after=early, submitted_before=late, error_code="exhausted"),
        "batch": jobs(batch_id=batch_id),
        "batch, state failed": jobs(batch_id=batch_id, state=State.FAILED),
        "batch, error code": jobs(batch_id=batch_id, error_code="exhausted"),
        "batch, text": jobs(batch_id=batch_id, prompt="unicorn"),
        "batch, text in 1 of 8": jobs(batch_id=batch_id, prompt="golden"),
        "tenant, large": jobs(tenant=LARGE),
        "tenant, small": jobs(tenant=SMALL),
        "tenant, small, state failed": jobs(tenant=SMALL, state=State.FAILED),
        "tenant, large, error code": jobs(tenant=LARGE, error_code="exhausted"),
        "text in every prompt": jobs(prompt="banner"),
        "text in 1 of 8": jobs(prompt="golden"),
        "text in 1 of 64": jobs(prompt="red shoes"),
        "text in 1 of 1,000": jobs(prompt="unicorn"),
        "text in 1 of 20,000": jobs(prompt="headline4711"),
        "text in ten": jobs(prompt="narwhal"),
        "text in one": jobs(prompt="sku4711077"),
        "text in none": jobs(prompt="walrus"),
        "words never in one prompt": jobs(prompt="red golden"),
        "part of a word in all": jobs(prompt="ban"),
        "part of a word in few": jobs(prompt="narw"),
        "text in 1 of 1,000, oldest first": jobs(Sort.OLDEST, prompt="unicorn"),
        "text, state failed": jobs(prompt="golden", state=State.FAILED),
        "text, time": jobs(prompt="unicorn", submitted_after=early, submitted_before=late),
        "text, small tenant": jobs(prompt="golden", tenant=SMALL),
        "batches": lambda cursor: search.batches(cursor=cursor),  # type: ignore[dict-item]
        "batches, finished": lambda cursor: search.batches(BatchFilter(finished=True), cursor=cursor),  # type: ignore[dict-item]
    }


def whole_farm(database: Database) -> dict[str, Callable[[], object]]:
    store = Store(database)
    return {
        "the farm": lambda: store.farm(lease_s=10),
        "the backlog by priority": store.backlog,
        "an estimate": lambda: estimate(database, 1000, lease_s=10),
    }


def median_ms(ask: Callable[[], object]) -> float:
    for _ in range(WARM_UP):
        ask()
    taken = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        ask()
        taken.append(time.perf_counter() - began)
    return 1000 * statistics.median(taken)


def tell(database: Database) -> None:
    sample = Sample.of(database)
    scopes = {"everybody": database, LARGE: database.of(LARGE), SMALL: database.of(SMALL)}
    print(f"| {'ms':35} | " + " | ".join(f"{scope:>10} | {'page 2':>7}" for scope in scopes) + " |")
    asked = {scope: questions(Search(of), sample) for scope, of in scopes.items()}
    for name in asked["everybody"]:
        row = []
        for scope in scopes:
            ask = asked[scope][name]
            first = median_ms(partial(ask, None))
            following = ask(None).next
            second = f"{median_ms(partial(ask, following)):7.1f}" if following else " " * 7
            row.append(f"{first:8.1f} {'!' if first > LIMIT_MS else ' '} | {second}")
        print(f"| {name:35} | " + " | ".join(row) + " |", flush=True)
    for name, ask in whole_farm(database).items():
        taken_ms = median_ms(ask)
        print(f"| {name:35} | {taken_ms:8.1f} {'!' if taken_ms > LIMIT_MS else ' '} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path, help="where the database is made, and stays; default: nowhere")
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ovis-search-")))
        farm = stack.enter_context(local_servers(Settings(data_dir=folder)))
        url = farm.settings.require("database_url")
        schema.upgrade(url)
        database = Database.at(url)
        stack.callback(database.close)
        if not Search(database).batches().found:
            began = time.perf_counter()
            make(database, options.jobs)
            print(f"{options.jobs:,} jobs made in {time.perf_counter() - began:.0f} s")
        print(f"{os.cpu_count()} cores ({platform.machine()}), limit {LIMIT_MS} ms, pages of {PAGE}")
        tell(database)


if __name__ == "__main__":
    main()
