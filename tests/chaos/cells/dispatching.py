"""What lies between a producer's commit and a worker's claim: producers, dispatchers and messages."""

import json
import time
from typing import Any
from uuid import UUID, uuid4

import redis

from producer.jobs.broker import LISTS
from producer.jobs.contract import DEFAULT_TENANT, TASK, Batch, SubmissionKey
from producer.jobs.errors import KeyAtWork
from tests.chaos.doomed import Plan
from tests.chaos.farm import LOST_MESSAGE_S, SUCCEEDED, Farm
from tests.waiting import until

TAKE_OVER_S = 5.0
"""Within which another dispatcher leads, after the leader's death or freezing."""
ASKED_AGAIN_S = 10.0
"""Within which a killed producer's key is free again."""


# 7


def producer_killed(farm: Farm) -> None:
    """A submitting process is killed before its commit and after it; a dispatcher between its note and its publishing.

    Who was told nothing asks again with the same key, and gets the first answer if there was one.
    """
    rounds = 5 if farm.long else 2
    farm.worker()
    dispatcher = farm.leading_dispatcher()
    for _ in range(rounds):
        for point in ("before the commit", "after the commit"):
            _kill_a_producer(farm, point)
    farm.until_ended()
    farm.stop(dispatcher)
    for point in ("noted", "published") * rounds:
        doomed = farm.dispatcher(Plan(point=point))
        job_ids = farm.submit(5)
        fault = farm.died(doomed, f"dispatcher: SIGKILL when {point}")
        other = farm.dispatcher()
        farm.recovered(fault, lambda job_ids=job_ids: farm.ended(job_ids))
        farm.stop(other)
    farm.expect(not farm.steps_wasted(), "a submission was drawn twice")


def _kill_a_producer(farm: Farm, point: str) -> None:
    """It submits a batch of twenty with a key; the client that waited for the answer asks again."""
    key = SubmissionKey(str(uuid4()), "f" * 64)
    known = {row["id"] for row in farm.rows("SELECT id FROM batches")}
    doomed = farm.producer(Plan(point=point), key, count=20)
    farm.died(doomed, f"producer: SIGKILL {point}")
    before = farm.rows("SELECT id FROM batches WHERE name = 'first' AND id <> ALL(%s)", list(known))
    farm.expect(len(before) == (point == "after the commit"), f"{point}: {len(before)} batches were there")
    batch = _asked_again(farm, key)
    farm.expect(not before or batch.id == before[0]["id"], "the same key gave another batch")
    farm.expect(batch.jobs == 20, f"a batch of {batch.jobs} jobs instead of 20")
    farm.ledger.accept((row["id"] for row in farm.rows("SELECT id FROM jobs WHERE batch_id = %s", batch.id)), SUCCEEDED)


def _asked_again(farm: Farm, key: SubmissionKey) -> Batch:
    """As a client does: again, too, while Postgres has not noticed that the killed one's connection is gone."""
    deadline = time.monotonic() + ASKED_AGAIN_S
    while True:
        try:
            return farm.store.submit_batch(
                "asked again", farm.submissions(20), max_failures=3, tenant=DEFAULT_TENANT, key=key
            )
        except KeyAtWork:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


# 8


def leader_lost(farm: Farm) -> None:
    """Of two dispatchers one leads; it is killed, or frozen past its lock and woken: the other takes over."""
    farm.worker()
    leader = farm.leading_dispatcher()
    for round_ in range(6 if farm.long else 3):
        standby = farm.dispatcher()
        time.sleep(farm.durations.renew_s + 2)
        if round_ % 2:
            fault = farm.kill(leader, "leader: SIGKILL")
        else:
            leader.freeze()
            fault = farm.fault("leader: SIGSTOP past its lock")
        fault.limit_s = TAKE_OVER_S
        job_ids = farm.submit(5)
        farm.recovered(fault, lambda job_ids=job_ids: farm.ended(job_ids))
        if leader.alive:
            leader.wake()
            more = farm.submit(5)
            farm.until_ended(more)
            time.sleep(farm.durations.renew_s * 2)
            farm.expect("stands by" in leader.log(), "a woken leader does not know that it has lost its post")
            farm.stop(leader)
        leader = standby
    farm.expect(farm.count("SELECT count(*) AS n FROM leader") == 1, "more than one post is led")
    farm.expect(not farm.steps_wasted(), "two dispatchers made work be done twice")


# 12

NEWER: list[tuple[Any, ...]] = [
    (["{id}", 1, {"since": "version 9"}], {}),
    (["{id}", 1], {"since": "version 9"}),
    ([{"job": "{id}", "claim": 1}], {}),
]
STRANGE_TASKS: list[tuple[Any, ...]] = [
    ([], {}),
    ([None, None], {}),
    (["no id", 1], {}),
    ([str(UUID(int=1)), 1], {}),
    ([str(UUID(int=1)), "one"], {}),
    ([str(UUID(int=1)), -1], {}),
    ([str(UUID(int=1)), 2**70], {}),
    (["x" * 100_000, 1], {}),
]
RUBBISH: list[bytes] = [
    b"",
    b"\xff\xfe\x00",
    b"not json",
    b"null",
    b"3",
    b"[]",
    b"{}",
    b'"text"',
    b'{"body": 3}',
    b'{"headers": 3, "properties": 4}',
    b'{"body": "!!!", "content-type": "application/json", "content-encoding": "utf-8", "headers": {}}',
    b'{"body": "W10=", "headers": {"id": "x", "task": "ovis.draw"}, "properties": {"delivery_tag": "t"}}',
    b"[" * 5000,
]


def rubbish(farm: Farm) -> None:
    """All sorts of it in each list that workers read, and messages of a newer version: logged, and gone past.

    A job whose message this worker cannot read is not lost: the audit sends one that it can.
    """
    farm.dispatcher()
    worker = farm.live_worker()
    finished = farm.submit(1)
    farm.until_ended(finished)
    broker = redis.Redis.from_url(farm.settings.require("redis_url"))
    for queue in LISTS.values():
        fault = farm.fault(f"rubbish in {queue!r}")
        fault.times = len(RUBBISH)
        for body in RUBBISH:
            broker.lpush(queue, body)
        job_ids = farm.submit(2)
        farm.recovered(fault, lambda job_ids=job_ids: farm.ended(job_ids))
    strange = [*STRANGE_TASKS, ([str(finished[0]), 1], {}), ([str(finished[0]), 2], {})]
    fault = farm.fault("tasks that cannot be done")
    fault.times = len(strange) + 1
    for arguments, words in strange:
        farm.send_task(TASK, arguments, words)
    farm.send_task("of.nobody", [], {})
    job_ids = farm.submit(3)
    farm.recovered(fault, lambda: farm.ended(job_ids))
    _newer_messages(farm)
    until(lambda: not broker.keys(), timeout_s=20)  # nothing of the rubbish is left anywhere
    farm.expect(worker.alive, f"rubbish ended a worker: {worker.log_path}")
    farm.expect(not farm.charged(), "rubbish was charged as a failure")
    broker.close()


def _newer_messages(farm: Farm) -> None:
    """In the place of those that this farm's dispatcher has published: an old worker in a farm of newer producers."""
    dispatcher = farm.members[0]
    dispatcher.freeze()
    job_ids = farm.submit(len(NEWER))
    for job_id, (arguments, words) in zip(job_ids, NEWER, strict=True):
        filled = json.loads(json.dumps(arguments).replace("{id}", str(job_id)))
        farm.rows("INSERT INTO messages (job_id, claim) VALUES (%s, 1)", job_id)
        farm.send_task(TASK, filled, words, task_id=f"{job_id}:1")
    fault = farm.fault("messages of a newer version")
    fault.times, fault.limit_s = len(NEWER), LOST_MESSAGE_S
    time.sleep(0.5)
    dispatcher.wake()
    fault.at = time.time()
    farm.recovered(fault, lambda: farm.ended(job_ids))
