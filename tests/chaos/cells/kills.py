"""Worker processes that are killed, paused and told to stop."""

import itertools
import math
import random
import time
from dataclasses import dataclass
from uuid import UUID

from tests.chaos.doomed import Plan
from tests.chaos.farm import LOST_MESSAGE_S, Farm, Fault
from tests.chaos.nursery import Member
from tests.waiting import until

BY_HAND = ""
POINTS = (
    "received",
    "claimed",
    "drawing",
    "stepped",
    "checkpoint put",
    "checkpoint noted",
    "drawn",
    "uploading",
    "uploaded",
    "recorded",
)
CHECKPOINT_STEPS = 5
ON_ITS_WAY_STEPS = 2
"""Drawn while a checkpoint is written to the bucket and noted in the row."""


# 1


def at_random(farm: Farm) -> None:
    """SIGKILL to workers at any moment and at each point of a job's way; first to the tiny model amid a step.

    A job that is drawn alone is charged when its process dies, and here processes die by chance, not by the job: so
    jobs may fail as often as it takes.
    """
    farm.max_failures = 1000
    farm.dispatcher()
    tiny = Fire(
        kills=55 if farm.long else 3,
        jobs=300 if farm.long else 8,
        portion=20 if farm.long else 4,
        places=2,
        steps=10,
        plan=Plan("tiny", point="drawing"),
        points=("drawing",),
    )
    blank = Fire(
        kills=1000 if farm.long else 30,
        jobs=20_000 if farm.long else 300,
        portion=20_000 if farm.long else 100,
        steady=2 if farm.long else 1,
        steps=10,
        places=4,
        plan=Plan(step_s=0.005),
        points=POINTS + (BY_HAND,) * len(POINTS),
    )
    for fire in (tiny, blank):
        _fire(farm, fire)
        for _ in range(fire.places):
            farm.worker(fire.plan_of(BY_HAND), checkpoint_steps=CHECKPOINT_STEPS)
        _kill_a_single_one(farm, fire)
        farm.until_ended(timeout_s=300)
        if fire is tiny:
            _expect_little_redrawn(farm)
            farm.stop_workers()


@dataclass(frozen=True)
class Fire:
    """So many kills, while so many jobs at least are drawn by so many workers at once."""

    kills: int
    jobs: int
    portion: int  # of jobs: submitted whenever fewer are left
    places: int
    plan: Plan
    points: tuple[str, ...]
    steady: int = 0  # workers beside them that nobody kills, so that there is something to lose
    steps: int = 20
    longest_life_s: float = 2.0

    def plan_of(self, point: str) -> Plan:
        return self.plan.with_fault(point, at_pass=random.randint(1, 2 * CHECKPOINT_STEPS))


class Target:
    """A worker under fire: it kills itself at its point, or is killed after some time of work."""

    def __init__(self, member: Member, point: str, life_s: float) -> None:
        self.member = member
        self.point = point
        self._life_s = life_s
        self._takes_jobs_since: float | None = None

    def is_due(self) -> bool:
        """Whether it has worked for its time."""
        if self._takes_jobs_since is None and self.member.takes_jobs():
            self._takes_jobs_since = time.monotonic()
        return self._takes_jobs_since is not None and time.monotonic() - self._takes_jobs_since > self._life_s


def _fire(farm: Farm, fire: Fire) -> None:
    points = itertools.cycle(random.sample(fire.points, len(fire.points)))
    for _ in range(fire.steady):
        farm.worker(fire.plan_of(BY_HAND), checkpoint_steps=CHECKPOINT_STEPS)
    targets: list[Target] = []
    submitted = killed = 0
    while killed < fire.kills:
        if farm.open_jobs() < fire.portion:
            submitted += len(farm.submit(fire.portion, steps=fire.steps))
        while len(targets) < fire.places:
            point = next(points)
            life_s = random.uniform(0.05, fire.longest_life_s) * (1 if point == BY_HAND else 2)
            worker = farm.worker(fire.plan_of(point), checkpoint_steps=CHECKPOINT_STEPS)
            targets.append(Target(worker, point, life_s))
        for target in list(targets):
            if not target.member.alive:
                fault = farm.died(target.member, f"SIGKILL: {target.point}")
            elif target.is_due():
                fault = farm.kill(target.member, "SIGKILL: at any moment")
            else:
                continue
            fault.limit_s = math.inf  # kills and starts of processes take all the cores: no single fault
            targets.remove(target)
            killed += 1
        time.sleep(0.01)
    for target in targets:
        farm.kill(target.member, "SIGKILL: at any moment").limit_s = math.inf
    if submitted < fire.jobs:
        farm.submit(fire.jobs - submitted, steps=fire.steps)


def _kill_a_single_one(farm: Farm, fire: Fire) -> None:
    """When all that the others left has been drawn: the one kill of this cell by which recovery is judged."""
    until(lambda: not farm.rows("SELECT 1 FROM jobs WHERE suspect AND state IN ('queued', 'running')"), timeout_s=300)
    worker = farm.worker(fire.plan_of(BY_HAND), checkpoint_steps=CHECKPOINT_STEPS)

    def holds_jobs() -> bool:
        farm.submit(fire.places, steps=fire.steps)
        return bool(
            farm.rows(
                "SELECT 1 FROM jobs JOIN workers ON workers.id = worker_id WHERE state = 'running' AND pid = %s",
                worker.process.pid,
            )
        )

    until(holds_jobs, pause_s=0.1)
    farm.kill(worker, "SIGKILL: a single one")


def _expect_little_redrawn(farm: Farm) -> None:
    """At most so many steps for each kill as lie between two checkpoints."""
    for seed, redrawn, kills in farm.redrawn_by_job():
        allowed = kills * (CHECKPOINT_STEPS + ON_ITS_WAY_STEPS)
        farm.expect(redrawn <= allowed, f"seed {seed}: {redrawn} steps redrawn after {kills} kills")


# 2


def around_the_claim(farm: Farm) -> None:
    """A message that dies with its worker: handed to a frozen idle one, received and not claimed, claimed just now.

    Redis has forgotten such a message, as if its visibility timeout were for ever. What is measured is how long Redis
    lacks a message that it should hold; there is nobody else to take it.
    """
    farm.dispatcher()
    for _ in range(3 if farm.long else 1):
        _kill_an_idle_one(farm)
        _kill_at_its_point(farm, "received", LOST_MESSAGE_S)
    _kill_at_its_point(farm, "claimed", None)


def _kill_at_its_point(farm: Farm, point: str, limit_s: float | None) -> None:
    doomed = farm.live_worker(Plan(point=point))
    farm.submit(3)
    fault = farm.died(doomed, f"SIGKILL: {point}")
    fault.limit_s = limit_s
    farm.recovered(fault, lambda: not farm.running() and farm.all_in_redis())
    _finish_with_another(farm)


def _kill_an_idle_one(farm: Farm) -> None:
    """Redis hands the next message to whoever waits, and does not see that it stands still."""
    idle = farm.live_worker()
    while not _freeze_with_a_message(farm, idle):
        idle.wake()
        farm.until_ended()
    fault = farm.kill(idle, "SIGKILL: idle and frozen, with a message")
    fault.limit_s = LOST_MESSAGE_S
    farm.recovered(fault, farm.all_in_redis)
    _finish_with_another(farm)


def _freeze_with_a_message(farm: Farm, idle: Member) -> bool:
    """Whether it worked: for a moment in each second an idle worker does not wait at Redis."""
    idle.freeze()
    farm.submit(1)
    until(farm.unclaimed)
    return not farm.all_in_redis()


def _finish_with_another(farm: Farm) -> None:
    survivor = farm.live_worker()
    farm.until_ended()
    farm.stop(survivor)


# 3


def paused_past_the_lease(farm: Farm) -> None:
    """A worker stands still for longer than its lease, at each point of a job's way; woken, it may write nothing."""
    farm.dispatcher()
    for point in ("drawn", "uploaded", "stepped", "claimed"):
        sleeper = farm.live_worker(Plan(point=point, action="freeze"))
        job_ids = farm.submit(2)
        fault = farm.froze(sleeper, f"SIGSTOP: {point}")
        other = farm.live_worker()
        farm.recovered(fault, lambda job_ids=job_ids: farm.ended(job_ids))
        before = farm.history_of(job_ids)
        sleeper.wake()
        time.sleep(farm.durations.claim_check_s * 2 + 1)
        farm.expect(farm.history_of(job_ids) == before, f"{point}: a woken worker's write did not bounce")
        farm.expect(sleeper.alive, f"{point}: a woken worker ended")
        farm.stop(sleeper)
        farm.stop(other)


# 11


def told_to_stop(farm: Farm) -> None:
    """SIGTERM: what does not fit in the grace time is written down and gone on with by another, no step drawn twice."""
    farm.dispatcher()
    for _ in range(2 if farm.long else 1):
        _stop_with_grace(farm)
        _stop_without_grace(farm)
        _stop_and_kill(farm)
    farm.expect(not farm.charged(), "a stop was charged as a failure")


def _stop_with_grace(farm: Farm) -> None:
    """Enough: all that is being drawn is finished."""
    worker = farm.live_worker(Plan(step_s=0.02))
    job_ids = farm.submit(4, steps=20)
    until(farm.running)
    fault = farm.terminate(worker, "SIGTERM: enough grace")
    farm.expect(worker.ended() == 0, "a worker that had time to finish did not end in order")
    farm.expect(not farm.running(), "a worker ended in order and left a job running")
    _go_on(farm, fault, job_ids)


def _stop_without_grace(farm: Farm) -> None:
    """Too little: it gives back what it cannot finish, and the next goes on at that step."""
    wasted = farm.steps_wasted()
    worker = farm.live_worker(Plan(step_s=0.05), grace_s=0.3)
    job_ids = farm.submit(4, steps=60)
    until(lambda: len(farm.steps_drawn_of(job_ids)) > 4 * 8)
    fault = farm.terminate(worker, "SIGTERM: too little grace")
    farm.expect(worker.ended() == 0, "a worker with little grace did not end in order")
    _go_on(farm, fault, job_ids)
    farm.expect(farm.steps_wasted() == wasted, f"a drain cost {farm.steps_wasted() - wasted} steps")


def _stop_and_kill(farm: Farm) -> None:
    """As an impatient operator: SIGKILL soon after SIGTERM. What was drawn until the SIGTERM is kept."""
    wasted = farm.steps_wasted()
    worker = farm.live_worker(Plan(step_s=0.05))
    job_ids = farm.submit(4, steps=60)
    until(lambda: len(farm.steps_drawn_of(job_ids)) > 4 * 8)
    farm.terminate(worker, "SIGTERM, SIGKILL a second later")
    time.sleep(1)
    fault = farm.kill(worker)
    _go_on(farm, fault, job_ids)
    late = len(job_ids) * (20 + ON_ITS_WAY_STEPS)  # what it drew in that second
    farm.expect(farm.steps_wasted() - wasted <= late, f"a kill cost {farm.steps_wasted() - wasted} steps")


def _go_on(farm: Farm, fault: Fault, job_ids: list[UUID]) -> None:
    successor = farm.live_worker(Plan(step_s=0.01))
    farm.recovered(fault, lambda: farm.taken_on(job_ids))
    farm.until_ended(job_ids)
    farm.stop(successor)
