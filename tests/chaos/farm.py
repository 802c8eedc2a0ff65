"""One cell's farm: its database and bucket, the processes that are put under fire, and what is measured of them."""

import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
from psycopg.rows import dict_row

from producer.jobs.contract import Submission, SubmissionKey
from producer.jobs.queue import Queue
from producer.jobs.settings import Settings
from producer.jobs.storage import Storage
from producer.jobs.store import Store
from producer.jobs.sweep import Sweeper
from tests.chaos.doomed import SUBMISSION_VARIABLE, Plan
from tests.chaos.ledger import End, Findings, Ledger, compare
from tests.chaos.nursery import Member, Nursery
from tests.chaos.proxy import Proxy
from tests.chaos.servers import Servers
from tests.farm import environment
from tests.miscounted import MISCOUNTED
from tests.waiting import until

SIDE_PX = 64
LOST_MESSAGE_S = 5.0
"""Within which a message that Redis lost is there again."""
SUCCEEDED = End()
SEED = "(request->>'seed')::bigint"
OPEN = "SELECT count(*) AS n FROM jobs WHERE state IN ('queued', 'running')"
WHO_DIED = """
    SELECT id FROM workers WHERE pid = %s AND started_at < to_timestamp(%s) ORDER BY started_at DESC LIMIT 1
"""
"""A thousand kills see a pid come round again."""
BACK_IN_THE_QUEUE = """
    SELECT max(extract(epoch FROM ended_at)) AS at FROM claims WHERE outcome = 'lease_lost' AND worker_id = %s
"""
"""When the last job of a dead worker was free again. Where kills follow each other, who takes it may be killed next."""


@dataclass
class Fault:
    """Something that was done to the farm. ``recovered_s``: until the jobs that it hit went on; None: not measured."""

    kind: str
    at: float  # time.time(): the clock of the database too, which runs on this machine
    pid: int | None = None  # of the worker that it ended
    recovered_s: float | None = None
    times: int = 1  # connections, requests, messages that it hit
    limit_s: float | None = None  # within which it should recover; None: the cell's; infinite: it was none by itself


class Farm:
    """The hands of a cell: start, submit, break, measure. ``close`` ends what it started."""

    def __init__(self, servers: Servers, nursery: Nursery, *, time_scale: float, long: bool) -> None:
        self.servers = servers
        self.long = long
        self.max_failures = 3  # the product's own default
        self.time_scale = time_scale
        self.settings = servers.fresh_settings(time_scale)
        self.ledger = Ledger()
        self.faults: list[Fault] = []
        self.broken: list[str] = []
        self.members: list[Member] = []
        self.store = Store.at(self.settings.require("database_url"))
        self.storage = Storage(self.settings)
        self.storage.ensure_bucket()
        self.queue = Queue(self.settings.require("redis_url"))
        self._nursery = nursery
        self._proxies: list[Proxy] = []
        self._numbers = itertools.count(1)
        self._seeds = itertools.count(1)
        self._steps_file = self.settings.data_dir / "steps"
        self._steps_file.touch()

    @property
    def durations(self) -> Any:
        return self.settings.durations

    def close(self) -> None:
        for member in self.members:
            member.kill()
        for proxy in self._proxies:
            proxy.stop()
        self.store.close()
        self.storage.close()
        self.queue.close()

    def expect(self, holds: bool, otherwise: str) -> None:
        """Something besides the ledger that must hold in this cell."""
        if not holds:
            self.broken.append(otherwise)

    # What runs.

    def dispatcher(self, plan: Plan | None = None, **settings: object) -> Member:
        """Start a dispatcher."""
        return self._start("dispatcher", plan or Plan(), settings)

    def worker(self, plan: Plan | None = None, **settings: object) -> Member:
        """Start a worker; it takes jobs as soon as it can."""
        return self._start("worker", plan or Plan(), settings)

    def live_worker(self, plan: Plan | None = None, **settings: object) -> Member:
        """Start a worker, and return once it takes jobs."""
        member = self.worker(plan, **settings)
        self.await_live(member)
        return member

    def await_live(self, *members: Member) -> None:
        for member in members:
            until(lambda member=member: member.takes_jobs() or not member.alive)
            assert member.alive, f"a worker ended while it started:\n{member.log()}"

    def leading_dispatcher(self) -> Member:
        """Start a dispatcher, and return once it leads."""
        member = self.dispatcher()
        until(lambda: member.leads() or not member.alive)
        return member

    def strange_clock(self, role: str, ahead_s: float) -> Member:
        """Start a member on a host whose clock is off by so much."""
        values = environment(self.settings) | self._plan(Plan()).environment()
        return self._keep(self._nursery.start_with_clock(role, values, self._log_path(role), ahead_s))

    def producer(self, plan: Plan, key: SubmissionKey, count: int) -> Member:
        """Start a process that submits so many jobs with this key, and ends."""
        rows = [row.model_dump(mode="json") for row in self.submissions(count)]
        path = self.settings.data_dir / f"{key.key}.json"
        path.write_text(json.dumps({"key": asdict(key), "rows": rows}))
        values = environment(self.settings) | self._plan(plan).environment() | {SUBMISSION_VARIABLE: str(path)}
        return self._keep(self._nursery.start("producer", values, self._log_path("producer")))

    def stop(self, member: Member) -> None:
        """Tell a member to stop, and wait for its end."""
        member.process.terminate()
        member.ended()

    def stop_workers(self) -> None:
        for member in self.members:
            if member.role == "worker":
                member.process.terminate()
        for member in self.members:
            if member.role == "worker":
                member.ended()

    def _start(self, role: str, plan: Plan, changes: dict[str, object]) -> Member:
        values = environment(self.settings.model_copy(update=changes)) | self._plan(plan).environment()
        return self._keep(self._nursery.start(role, values, self._log_path(role)))

    def _plan(self, plan: Plan) -> Plan:
        return replace(plan, steps_file=str(self._steps_file))

    def _log_path(self, role: str) -> Path:
        path = self.settings.data_dir / f"{role}-{next(self._numbers)}.log"
        path.touch()
        return path

    def _keep(self, member: Member) -> Member:
        self.members.append(member)
        return member

    def through_proxy(self, name: str) -> Proxy:
        """From now on members reach this server through a proxy of their own."""
        target = {"redis": self.servers.redis, "postgres": self.servers.postgres, "s3": self.servers.s3}[name].port
        proxy = Proxy(target)
        proxy.start()
        self._proxies.append(proxy)
        self.settings = _redirected(self.settings, name, target, proxy.port)
        return proxy

    # The submitting side.

    def submit(self, count: int, end: End = SUCCEEDED, **fields: object) -> list[UUID]:
        """Submit so many jobs as one batch, each with a seed of its own, and note them in the ledger."""
        batch = self.store.submit_batch("chaos", self.submissions(count, **fields), max_failures=self.max_failures)
        job_ids = [
            row["id"] for row in self.rows("SELECT id FROM jobs WHERE batch_id = %s ORDER BY position", batch.id)
        ]
        self.ledger.accept(job_ids, end)
        return job_ids

    def submissions(self, count: int, **fields: object) -> list[Submission]:
        common = {"prompt": "a banner", "width": SIDE_PX, "height": SIDE_PX, "steps": 10, "guidance": 0, **fields}
        return [Submission.model_validate({"seed": next(self._seeds), **common}) for _ in range(count)]

    def send_task(
        self, task: str, arguments: Sequence[Any], words: Mapping[str, Any], task_id: str | None = None
    ) -> None:
        """Publish a task that no dispatcher of this version would."""
        self.queue._app.send_task(task, args=arguments, kwargs=words, task_id=task_id, ignore_result=True)

    # What is seen.

    def rows(self, statement: str, *values: object) -> list[dict[str, Any]]:
        with (
            psycopg.connect(self.database_url(), autocommit=True, row_factory=dict_row) as connection,
            connection.cursor() as cursor,
        ):
            cursor.execute(statement, values)  # type: ignore[arg-type]
            return cursor.fetchall() if cursor.description else []

    def answers(self) -> bool:
        """Whether there is a connection to be had."""
        try:
            self.rows("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True

    def count(self, statement: str, *values: object) -> int:
        return int(self.rows(statement, *values)[0]["n"])

    def database_url(self) -> str:
        return self.store.database._engine.url.set(drivername="postgresql").render_as_string(hide_password=False)

    def ended(self, job_ids: Iterable[UUID]) -> bool:
        """Whether all of these are in a terminal state."""
        ids = list(job_ids)
        return self.count(OPEN + " AND id = ANY(%s)", ids) == 0

    def open_jobs(self) -> int:
        return self.count(OPEN)

    def succeeded(self) -> int:
        return self.count("SELECT count(*) AS n FROM jobs WHERE state = 'succeeded'")

    def running(self) -> int:
        return self.count("SELECT count(*) AS n FROM jobs WHERE state = 'running'")

    def until_ended(self, job_ids: Iterable[UUID] | None = None, *, timeout_s: float = 60) -> None:
        """Wait for these, or for all that was accepted; what has not ended by then is lost, and the report says so."""
        waiting = list(self.ledger.accepted if job_ids is None else job_ids)
        deadline = time.monotonic() + timeout_s
        while not self.ended(waiting) and time.monotonic() < deadline:
            time.sleep(0.05)

    def taken_on(self, job_ids: Iterable[UUID]) -> bool:
        """Whether each of these is drawn by somebody now, or has ended."""
        return not self.count("SELECT count(*) AS n FROM jobs WHERE state = 'queued' AND id = ANY(%s)", list(job_ids))

    def history_of(self, job_ids: Iterable[UUID]) -> list[tuple[UUID, int, str | None]]:
        """(job, claim, outcome) of every claim of these."""
        rows = self.rows("SELECT job_id, claim, outcome FROM claims WHERE job_id = ANY(%s)", list(job_ids))
        return sorted((row["job_id"], row["claim"], row["outcome"]) for row in rows)

    def lost_leases(self) -> int:
        return self.count("SELECT count(*) AS n FROM claims WHERE outcome = 'lease_lost'")

    def charged(self) -> int:
        """Failures that were charged to any job."""
        return self.count("SELECT coalesce(sum(failures), 0) AS n FROM jobs")

    # What is done to it.

    def fault(self, kind: str, member: Member | None = None) -> Fault:
        """Note a fault that is done now."""
        fault = Fault(kind, time.time(), member.pid if member else None)
        self.faults.append(fault)
        return fault

    def terminate(self, member: Member, kind: str) -> Fault:
        """SIGTERM to a member that lives."""
        fault = self.fault(kind)
        self.expect(member.alive, f"{kind}: the member had ended already")
        member.process.terminate()
        return fault

    def kill(self, member: Member, kind: str = "SIGKILL") -> Fault:
        """Kill a member that still lives."""
        fault = self.fault(kind, member)
        if not member.kill():
            self.faults.remove(fault)
        return fault

    def died(self, member: Member, kind: str, timeout_s: float = 60) -> Fault:
        """Wait until a member has killed itself at the point of its plan."""
        code = member.ended(timeout_s)
        self.expect(code == -9, f"{kind}: the member ended with {code} instead of by SIGKILL")
        return self.fault(kind, member)

    def froze(self, member: Member, kind: str) -> Fault:
        """Wait until a member has frozen itself at the point of its plan."""
        until(member.is_frozen)
        return self.fault(kind)

    def recovered(self, fault: Fault, condition: Callable[[], object], *, timeout_s: float = 60) -> None:
        """Wait for ``condition``, which says that the jobs that the fault hit went on."""
        deadline = time.time() + timeout_s
        while not condition():
            if time.time() > deadline:
                self.broken.append(f"{fault.kind}: no recovery within {timeout_s:.0f} s")
                return
            time.sleep(0.02)
        fault.recovered_s = time.time() - fault.at

    def going_on(self) -> Callable[[], bool]:
        """A question: whether an image was recorded since now."""
        before = self.succeeded()
        return lambda: self.succeeded() > before

    def unclaimed(self) -> list[tuple[UUID, int]]:
        """What Redis should hold now."""
        return [(row["job_id"], row["claim"]) for row in self.rows("SELECT job_id, claim FROM messages")]

    def all_in_redis(self) -> bool:
        """Whether nothing is missing of what Redis should hold, and something is queued at all."""
        expected = {f"{job_id}:{claim}" for job_id, claim in self.unclaimed()}
        return bool(expected) and expected <= self.queue.waiting()

    def claimed(self, messages: Iterable[tuple[UUID, int]]) -> bool:
        """Whether none of these messages waits for its claim any more."""
        return not set(messages) & set(self.unclaimed())

    # The end.

    def finish(self, timeout_s: float) -> tuple[Findings, int]:
        """Wait for the end of all jobs, stop all, sweep, and compare; returns that and the steps drawn twice."""
        self.until_ended(timeout_s=timeout_s)
        self._stop_all()
        for fault in self.faults:
            if fault.pid is not None and fault.recovered_s is None:
                fault.recovered_s = self._back_in_the_queue(fault)
        Sweeper(self.store, self.storage, self.durations, leads=lambda: True).walk(threading.Event())
        columns = "id, state, error_code, object_key, sha256, size_bytes"
        rows = {row["id"]: row for row in self.rows(f"SELECT {columns} FROM jobs")}
        twice = self.rows("SELECT job_id, count(*) AS n FROM claims WHERE outcome = 'succeeded' GROUP BY job_id")
        findings = compare(self.ledger, rows, {row["job_id"]: row["n"] for row in twice}, self.storage)
        findings.other += [f"the tally is not the count: {row}" for row in self.rows(MISCOUNTED)]
        return findings, self.steps_wasted()

    def _stop_all(self) -> None:
        for member in self.members:
            member.wake()
            member.process.terminate()
        for member in self.members:
            code = member.ended(self.durations.grace_s * 2 + 30)
            self.expect(code in (0, -9), f"a {member.role} that was told to stop ended with {code}: {member.log_path}")

    def _back_in_the_queue(self, fault: Fault) -> float | None:
        workers = self.rows(WHO_DIED, fault.pid, fault.at)
        if not workers:
            return None
        at = self.rows(BACK_IN_THE_QUEUE, workers[0]["id"])[0]["at"]
        return None if at is None else max(0.0, float(at) - fault.at)

    def steps_drawn(self) -> list[tuple[int, int]]:
        """(seed, step) of every step that an engine has drawn, as its worker noted it at once."""
        return [(int(seed), int(step)) for seed, step in map(str.split, self._steps_file.read_text().splitlines())]

    def steps_drawn_of(self, job_ids: Iterable[UUID]) -> list[tuple[int, int]]:
        seeds = {row["seed"] for row in self.rows(f"SELECT {SEED} AS seed FROM jobs WHERE id = ANY(%s)", list(job_ids))}
        return [(seed, step) for seed, step in self.steps_drawn() if seed in seeds]

    def redrawn_by_job(self) -> list[tuple[int, int, int]]:
        """(seed, steps drawn twice, claims that were lost) of every job that lost a claim."""
        drawn = self.steps_drawn()
        again = Counter(seed for seed, _ in drawn)
        again.subtract(seed for seed, _ in set(drawn))
        lost = self.rows(
            f"SELECT {SEED} AS seed, count(*) AS n FROM jobs JOIN claims ON claims.job_id = jobs.id"
            " WHERE outcome = 'lease_lost' GROUP BY seed"
        )
        return [(row["seed"], again[row["seed"]], row["n"]) for row in lost]

    def steps_wasted(self) -> int:
        """Steps that were drawn more than once."""
        drawn = self.steps_drawn()
        return len(drawn) - len(set(drawn))


def _redirected(settings: Settings, name: str, target: int, port: int) -> Settings:
    field = {"redis": "redis_url", "postgres": "database_url", "s3": "s3_endpoint_url"}[name]
    url = settings.require(field).replace(f":{target}", f":{port}")
    return Settings.model_validate(settings.model_dump(exclude_none=True) | {field: url})


@contextmanager
def farm(servers: Servers, nursery: Nursery, *, time_scale: float, long: bool) -> Iterator[Farm]:
    """A farm until the block is left."""
    opened = Farm(servers, nursery, time_scale=time_scale, long=long)
    try:
        yield opened
    finally:
        opened.close()
