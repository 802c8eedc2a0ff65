"""The fair order over lanes that are lists of work: what each tenant, batch and priority gets while others wait."""

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from random import Random
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer.jobs.contract import Lane, Message, Next, Priority
from producer.jobs.fairness import MOST_WEIGHT, FairOrder

JOB = 10.0
"""The work of a job where all are alike."""
HOME = UUID(int=0)


@dataclass
class Backlog:
    """Lanes and the work that waits in each; hands out jobs as the store does, and keeps what each lane was given."""

    lanes: dict[int, Lane] = field(default_factory=dict)
    waiting: dict[int, deque[float]] = field(default_factory=dict)
    given: Counter[int] = field(default_factory=Counter)
    order: FairOrder = field(default_factory=FairOrder)

    def lane(
        self,
        jobs: Iterable[float],
        tenant: str = "t",
        *,
        weight: float = 1.0,
        batch: UUID | None = None,
        batch_weight: float = 1.0,
        priority: Priority = Priority.STANDARD,
    ) -> int:
        lane = Lane(len(self.lanes) + 1, tenant, weight, batch, batch_weight, priority)
        self.lanes[lane.id], self.waiting[lane.id] = lane, deque(jobs)
        return lane.id

    def take(self, room: int) -> list[Next]:
        """One round: what the lanes really held of what was picked, charged."""
        open_lanes = [self.lanes[lane_id] for lane_id, jobs in self.waiting.items() if jobs]
        taken = [
            Next(Message(HOME, 1), self.lanes[lane_id].priority, lane_id, self.waiting[lane_id].popleft())
            for lane_id, count in Counter(self.order.pick(open_lanes, room)).items()
            for _ in range(min(count, len(self.waiting[lane_id])))
        ]
        self.order.charge(taken)
        for job in taken:
            self.given[job.lane_id] += job.work  # type: ignore[assignment]
        return taken

    def work(self, jobs: int, room: int = 1) -> list[int]:
        """Takes so many jobs, ``room`` at a time; returns the lanes in the order in which they were served."""
        served: list[int] = []
        while len(served) < jobs:
            taken = self.take(room)
            assert taken, "somebody waits and nobody is served"
            served += [job.lane_id for job in taken]
        return served

    def shares(self, *lane_ids: int) -> list[float]:
        total = sum(self.given[lane_id] for lane_id in lane_ids)
        return [self.given[lane_id] / total for lane_id in lane_ids]


@pytest.mark.parametrize("room", [1, 7, 60])
def test_tenants_share_by_their_weights(room: int) -> None:
    backlog = Backlog()
    lanes = [backlog.lane([JOB] * 5000, name, weight=weight) for name, weight in (("a", 1), ("b", 2), ("c", 5))]
    backlog.work(1600, room)
    assert backlog.shares(*lanes) == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=0.01)


def test_the_batches_of_a_tenant_share_what_the_tenant_gets() -> None:
    backlog = Backlog()
    first = backlog.lane([JOB] * 5000, "a", batch=uuid4(), batch_weight=3)
    second = backlog.lane([JOB] * 5000, "a", batch=uuid4(), batch_weight=1)
    other = backlog.lane([JOB] * 5000, "b")
    backlog.work(1600, 5)
    assert backlog.shares(first, second, other) == pytest.approx([3 / 8, 1 / 8, 4 / 8], abs=0.01)


def test_who_splits_its_jobs_into_many_batches_gets_no_more() -> None:
    backlog = Backlog()
    many = [backlog.lane([JOB] * 500, "greedy", batch=uuid4()) for _ in range(50)]
    one = backlog.lane([JOB] * 5000, "modest")
    backlog.work(1000, 10)
    assert sum(backlog.given[lane] for lane in many) == pytest.approx(backlog.given[one], rel=0.02)


@pytest.mark.parametrize("room", [1, 30])
def test_priorities_share_sixteen_to_four_to_one_while_all_wait(room: int) -> None:
    backlog = Backlog()
    lanes = [backlog.lane([JOB] * 20_000, priority=priority) for priority in Priority]
    backlog.work(2100, room)
    assert backlog.shares(*lanes) == pytest.approx([16 / 21, 4 / 21, 1 / 21], abs=0.01)


def test_bulk_gets_its_part_however_many_tenants_are_urgent() -> None:
    backlog = Backlog()
    for number in range(100):
        backlog.lane([JOB] * 1000, f"urgent {number}", priority=Priority.INTERACTIVE)
    bulk = backlog.lane([JOB] * 1000, "patient", priority=Priority.BULK)
    backlog.work(1700)
    assert backlog.given[bulk] / sum(backlog.given.values()) == pytest.approx(1 / 17, abs=0.005)


def test_what_nobody_urgent_asks_for_goes_to_the_others() -> None:
    backlog = Backlog()
    standard = backlog.lane([JOB] * 5000)
    bulk = backlog.lane([JOB] * 5000, priority=Priority.BULK)
    backlog.work(1000)
    assert backlog.shares(standard, bulk) == pytest.approx([4 / 5, 1 / 5], abs=0.01)


@pytest.mark.parametrize("room", [1, 20])
def test_shares_are_of_work_and_not_of_rows(room: int) -> None:
    backlog = Backlog()
    large = backlog.lane([400.0] * 1000, "large images")
    small = backlog.lane([2.0] * 200_000, "small images")
    backlog.work(40_000, room)
    assert backlog.shares(large, small) == pytest.approx([0.5, 0.5], abs=0.02)


@given(
    weights=st.lists(st.floats(min_value=0.2, max_value=5), min_size=2, max_size=6),
    room=st.integers(min_value=1, max_value=40),
    seed=st.integers(min_value=0, max_value=1000),
)
def test_whatever_the_weights_and_sizes_no_tenant_is_further_behind_than_a_round(
    weights: list[float], room: int, seed: int
) -> None:
    """The bound of fair queueing: work over weight differs by no more than one round's jobs."""
    random, backlog = Random(seed), Backlog()
    lanes = [
        backlog.lane([random.uniform(1, 30) for _ in range(1500)], f"t{n}", weight=weight)
        for n, weight in enumerate(weights)
    ]
    backlog.work(150, room)
    clocks = [backlog.given[lane] / weight for lane, weight in zip(lanes, weights, strict=True)]
    assert max(clocks) - min(clocks) <= (room + 1) * 30 / min(weights)


def test_a_new_tenant_gets_its_turn_within_two_jobs_beside_one_with_twenty_thousand() -> None:
    backlog = Backlog()
    old = backlog.lane([JOB] * 20_000, "old")
    backlog.work(5000)
    new = backlog.lane([JOB] * 10, "new")
    served = backlog.work(20)
    assert new in served[:2]
    assert Counter(served) == {old: 10, new: 10}


def test_an_urgent_job_is_next() -> None:
    backlog = Backlog()
    backlog.lane([JOB] * 1000)
    backlog.lane([JOB] * 1000, priority=Priority.BULK)
    backlog.work(100)
    urgent = backlog.lane([JOB], priority=Priority.INTERACTIVE)
    assert backlog.work(1) == [urgent]


def test_nobody_saves_up_while_it_is_idle() -> None:
    backlog = Backlog()
    idle, busy = backlog.lane([JOB] * 2, "idle"), backlog.lane([JOB] * 5000, "busy")
    backlog.work(1000)
    backlog.waiting[idle].extend([JOB] * 1000)
    served = Counter(backlog.work(200))
    assert served[busy] == pytest.approx(100, abs=1)


def test_nobody_is_punished_for_having_used_a_farm_that_was_free() -> None:
    backlog = Backlog()
    early = backlog.lane([JOB] * 1000, "early")
    backlog.work(1000, 50)
    late = backlog.lane([JOB] * 1000, "late")
    backlog.waiting[early].extend([JOB] * 1000)
    served = Counter(backlog.work(200))
    assert served[early] == pytest.approx(served[late], abs=1)


def test_who_submits_one_large_job_after_another_gets_no_more_than_its_share() -> None:
    """Its lane is empty between two jobs; were its debt forgotten, it would have every second job, a hundred fold."""
    backlog = Backlog()
    steady = backlog.lane([JOB] * 20_000, "steady")
    single = backlog.lane([100 * JOB], "single")
    for _ in range(5000):
        if not backlog.waiting[single]:
            backlog.take(1)
            backlog.waiting[single].append(100 * JOB)
        backlog.take(1)
    assert backlog.shares(steady, single) == pytest.approx([0.5, 0.5], abs=0.02)


@given(st.lists(st.sampled_from(list(Priority)), min_size=3, max_size=30), st.integers(min_value=1, max_value=10))
def test_everybody_who_waits_is_served_and_nothing_is_left(priorities: list[Priority], room: int) -> None:
    backlog = Backlog()
    lanes = [
        backlog.lane([JOB] * (1 + n % 4), f"t{n % 5}", weight=1 + n % 3, batch=UUID(int=n), priority=priority)
        for n, priority in enumerate(priorities)
    ]
    total = sum(len(jobs) for jobs in backlog.waiting.values())
    assert len(backlog.work(total, room)) == total
    assert set(backlog.given) == set(lanes)


def test_nobody_starves_while_new_tenants_keep_coming() -> None:
    backlog = Backlog()
    old = backlog.lane([JOB] * 1000, "old")
    for number in range(300):
        backlog.lane([JOB] * 2, f"new {number}")
        backlog.work(2)
    # Each of 300 came with two jobs, and two are served per arrival: the old one is among them all the while.
    assert backlog.given[old] >= 10 * JOB


def test_whose_turn_is_next_is_named_first() -> None:
    backlog = Backlog()
    first, second = backlog.lane([JOB] * 10, "first"), backlog.lane([JOB] * 10, "second")
    assert backlog.work(1) == [first]
    assert list(dict.fromkeys(backlog.order.pick(list(backlog.lanes.values()), 3))) == [second, first]


def test_those_whose_turn_comes_later_are_named_behind_the_others_for_one_job_each() -> None:
    backlog = Backlog()
    first, second = (backlog.lane([JOB] * 10, name, weight=3) for name in ("first", "second"))
    late = [backlog.lane([JOB] * 10, f"late {n}", weight=1) for n in range(3)]
    backlog.work(5)  # each of them has a clock of its own now
    lanes = list(backlog.lanes.values())
    assert backlog.order.pick(lanes, 4) == [first, second, first, second]
    assert backlog.order.pick(lanes, 4, 3) == [first, second, first, second, late[0]]
    assert backlog.order.pick(lanes, 4, 100) == [first, second, first, second, *late]


@pytest.mark.parametrize("priority", [Priority.STANDARD, Priority.BULK])
def test_a_batch_keeps_its_debt_while_its_tenant_is_away_for_a_moment(priority: Priority) -> None:
    """With the tenant away its whole priority may be: nobody else need wait there."""
    backlog = Backlog()
    backlog.lane([JOB] * 1000, "other")
    greedy = backlog.lane([20 * JOB], "t", batch=uuid4(), priority=priority)
    while backlog.waiting[greedy]:
        backlog.work(1)
    backlog.work(1)
    modest = backlog.lane([JOB] * 30, "t", batch=uuid4(), priority=priority)
    backlog.waiting[greedy].extend([JOB] * 30)
    served = [lane for lane in backlog.work(300) if lane in (greedy, modest)]
    assert set(served[:15]) == {modest}


def test_a_pick_that_is_not_charged_changes_nothing() -> None:
    order = FairOrder()
    lanes = [Lane(1, "a", 1.0, None, 1.0, Priority.STANDARD), Lane(2, "b", 1.0, None, 1.0, Priority.STANDARD)]
    assert all(order.pick(lanes, 4) == [1, 2, 1, 2] for _ in range(5))
    assert order.pick([], 4) == []


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan"), 1e300])
def test_no_weight_stops_the_farm_for_anybody(weight: float) -> None:
    backlog = Backlog()
    odd = backlog.lane([JOB] * 5000, "odd", weight=weight, batch_weight=weight)
    even = backlog.lane([JOB] * 5000, "even")
    served = Counter(backlog.work(2 * int(MOST_WEIGHT) + 2))
    assert served[odd] >= 1
    assert served[even] >= 1


def test_what_is_kept_of_lanes_that_are_gone_does_not_grow() -> None:
    backlog = Backlog()
    backlog.lane([JOB] * 50_000, "steady")
    for number in range(2000):
        backlog.lane([JOB] * 2, f"t{number}", batch=uuid4(), priority=list(Priority)[number % 3])
        backlog.work(4, 2)
    while len([jobs for jobs in backlog.waiting.values() if jobs]) > 1:
        backlog.work(10, 10)
    backlog.work(100, 10)
    assert len(backlog.order._leaves) <= 5
    assert sum(len(priority.children) for priority in backlog.order._root.children.values()) <= 5
