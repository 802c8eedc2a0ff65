"""Images that kill their process, or do not fit the device."""

import time

from producer.jobs.contract import State
from tests.chaos.doomed import HUGE, POISON, Plan
from tests.chaos.farm import Farm
from tests.chaos.ledger import End

CHECKPOINT_STEPS = 2
"""So that a poisonous image leaves some, which nobody shall find when it has failed."""


# 9


def poison(farm: Farm) -> None:
    """Some requests kill every process that draws them: they fail, their neighbours do not.

    The limit of failures is the product's own: three deaths while alone.
    """
    farm.dispatcher()
    innocent = farm.submit(20)
    poisonous = farm.submit(2 if farm.long else 1, End(State.FAILED, "worker_lost"), prompt=f"a {POISON} banner")
    innocent += farm.submit(20)
    standing = [farm.worker(checkpoint_steps=CHECKPOINT_STEPS) for _ in range(2)]
    deadline = time.monotonic() + 300 * max(farm.time_scale, 0.2)
    while not farm.ended(farm.ledger.accepted) and time.monotonic() < deadline:
        for member in [member for member in standing if not member.alive]:
            standing.remove(member)
            farm.died(member, "killed by what it drew")
            standing.append(farm.worker(checkpoint_steps=CHECKPOINT_STEPS))  # as a supervisor does
        time.sleep(0.02)
    for job_id in poisonous:
        _expect_a_history_that_tells_where(farm, job_id)
    harmed = farm.rows("SELECT id FROM jobs WHERE failures > 0 AND id = ANY(%s)", innocent)
    farm.expect(not harmed, f"{len(harmed)} neighbours of a poisonous job were charged a failure")


def _expect_a_history_that_tells_where(farm: Farm, job_id: object) -> None:
    (row,) = farm.rows("SELECT failures, error_code, error_message FROM jobs WHERE id = %s", job_id)
    history = farm.rows(
        "SELECT c.outcome, c.ended_at, w.host, w.pid, w.device FROM claims c LEFT JOIN workers w ON w.id = c.worker_id"
        " WHERE c.job_id = %s ORDER BY c.claim",
        job_id,
    )
    farm.expect(row["failures"] == farm.max_failures, f"a poisonous job was charged {row['failures']} failures")
    farm.expect(len(history) in (3, 4, 5), f"a poisonous job was drawn {len(history)} times")
    farm.expect(all(claim["host"] and claim["device"] and claim["ended_at"] for claim in history), "no place is told")


# 10


def out_of_memory(farm: Farm) -> None:
    """The device has no memory for a pack, which shrinks; and none for one image at all, which fails alone."""
    farm.dispatcher()
    too_large = End(State.FAILED, "exhausted")
    for engine in ("blank", "tiny"):
        worker = farm.live_worker(Plan(engine, pack_limit=2))
        for count in (3, 1, 2) if farm.long else (3, 1):
            farm.submit(4, width=64, height=64, steps=4)
            fault = farm.fault(f"{engine}: an image that never fits")
            farm.submit(count, too_large, prompt=f"a {HUGE} banner", width=512, height=512, steps=4)
            fault.times = count
            farm.submit(4, width=64, height=64, steps=4)
            farm.recovered(fault, farm.going_on())
        farm.until_ended()
        farm.expect(worker.alive, "a worker ended for want of memory")
        farm.stop(worker)
    charged = farm.count("SELECT count(*) AS n FROM jobs WHERE failures > 0 AND state = 'succeeded'")
    farm.expect(not charged, f"{charged} neighbours of a huge image were charged a failure")
