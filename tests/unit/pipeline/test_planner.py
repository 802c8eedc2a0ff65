"""Who draws the next step, as pure logic. What it is worth is in test_planner_simulation.py."""

from collections.abc import Callable
from dataclasses import replace
from timeit import repeat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.planner import FORGOTTEN_AFTER, GROW_AFTER, PATIENCE, Candidate, SharedSteps, StepCost

BUDGET_TOKENS = 8_192


def candidate(ticket: int, tokens: int = 1_064, steps_left: int = 20, priority: int = 0, waited: int = 0) -> Candidate:
    return Candidate(ticket, tokens, steps_left, priority, waited)


def measured(fixed_s: float, per_token_s: float) -> StepCost:
    """The cost of a device after some steps."""
    cost = StepCost()
    for tokens in (500, 1_000, 2_000, 4_000, 8_000) * 5:
        cost.observe(tokens, fixed_s + per_token_s * tokens)
    return cost


def planner(fixed_s: float = 10e-3, per_token_s: float = 10e-6, *, capacity: int = 100) -> SharedSteps:
    """Of a device on which a step costs as much as a thousand tokens."""
    return SharedSteps(BUDGET_TOKENS, capacity=capacity, cost=measured(fixed_s, per_token_s))


def unmeasured(budget_tokens: int = BUDGET_TOKENS) -> SharedSteps:
    return SharedSteps(budget_tokens, capacity=100)


# In order


def test_nobody_draws_when_nobody_waits() -> None:
    assert planner().pick([]) == []


def test_the_oldest_is_first_whatever_the_order_it_is_told_in() -> None:
    assert unmeasured().pick([candidate(7), candidate(3), candidate(5)]) == [3, 5, 7]


def test_a_more_urgent_newcomer_pauses_the_others_until_it_is_done() -> None:
    paused = [candidate(1, priority=2), candidate(2, priority=1)]
    assert planner().pick([*paused, candidate(3, priority=0)]) == [3]
    assert planner().pick(paused) == [2]


def test_a_less_urgent_image_never_makes_an_urgent_one_later_however_well_they_would_fit() -> None:
    urgent, idle = candidate(2, tokens=100), [candidate(ticket, tokens=100, priority=1) for ticket in range(3, 20)]
    assert planner().pick([candidate(1, tokens=100, priority=1), urgent, *idle]) == [2]


def test_the_oldest_of_a_class_that_waited_long_enough_draws_beside_the_class_above() -> None:
    urgent = candidate(9, tokens=8_000)
    for priority in (1, 2, 5):
        waiting = candidate(1, tokens=8_000, priority=priority, waited=PATIENCE * priority)
        assert planner().pick([urgent, waiting]) == [1]
        assert planner().pick([urgent, replace(waiting, waited=waiting.waited - 1)]) == [9]


def test_only_the_oldest_of_a_class_ages_so_that_a_long_queue_does_not_overtake_its_own_head() -> None:
    queue = [candidate(ticket, tokens=8_000, waited=0 if ticket == 1 else 10 * PATIENCE) for ticket in range(1, 20)]
    assert planner().pick(queue) == [1]
    less_urgent = [candidate(ticket, tokens=100, priority=1, waited=10 * PATIENCE) for ticket in range(1, 20)]
    assert planner().pick([*less_urgent, candidate(20, tokens=100)]) == [1, 20]


# Within the budget


def test_as_long_as_nothing_is_measured_a_pack_is_as_full_as_the_budget_allows() -> None:
    assert unmeasured(budget_tokens=3_000).pick([candidate(ticket, tokens=1_000) for ticket in range(5)]) == [0, 1, 2]


def test_an_image_above_the_budget_draws_alone() -> None:
    assert unmeasured(budget_tokens=3_000).pick([candidate(1, tokens=8_704), candidate(2, tokens=1)]) == [1]


def test_smaller_ones_fill_what_a_larger_one_leaves_until_it_is_first_itself() -> None:
    first, large, small = (candidate(*one) for one in ((1, 2_000), (2, 2_000), (3, 1_000)))
    chosen = unmeasured(budget_tokens=3_000)
    assert chosen.pick([first, large, small]) == [1, 3]
    assert chosen.pick([large, small]) == [2, 3]


def test_what_did_not_fit_halves_the_budget_and_again_until_nothing_is_left_to_halve() -> None:
    chosen = unmeasured(budget_tokens=3_000)
    waiting = [candidate(ticket, tokens=500) for ticket in range(6)]
    chosen.shrink(3_000)
    assert chosen.pick(waiting) == [0, 1, 2]
    chosen.shrink(1_500)
    assert chosen.pick(waiting) == [0]
    for _ in range(20):
        chosen.shrink(chosen.budget_tokens)
    assert chosen.budget_tokens == 1
    assert chosen.pick(waiting) == [0]


def test_an_image_alone_that_did_not_fit_never_raises_the_budget() -> None:
    chosen = unmeasured(budget_tokens=3_000)
    chosen.shrink(30_000)
    assert chosen.budget_tokens == 3_000


def test_a_budget_that_was_cut_grows_back_to_what_was_given_and_no_further() -> None:
    chosen = unmeasured(budget_tokens=3_000)
    chosen.shrink(3_000)
    held = []
    for _ in range(10 * GROW_AFTER):
        held.append(chosen.budget_tokens)
        chosen.observe(chosen.budget_tokens, 0.1)
    assert held[:GROW_AFTER] == [1_500] * GROW_AFTER
    assert held == sorted(held)
    assert len(set(held)) > 4, "it grows in small steps"
    assert max(held) == chosen.budget_tokens == 3_000


def test_packs_that_leave_most_of_a_cut_budget_free_say_nothing_about_the_rest() -> None:
    chosen = unmeasured(budget_tokens=3_000)
    chosen.shrink(3_000)
    for _ in range(10 * GROW_AFTER):
        chosen.observe(750, 0.1)
    assert chosen.budget_tokens == 1_500


# When sharing pays


@pytest.mark.parametrize(("tokens", "shared"), [(1_990, True), (2_010, False)])
def test_two_equal_images_share_if_the_work_of_one_is_at_most_twice_the_fixed_cost(tokens: int, shared: bool) -> None:
    assert planner().pick([candidate(1, tokens), candidate(2, tokens)]) == ([1, 2] if shared else [1])


def test_a_longer_queue_shares_where_two_alone_would_not() -> None:
    waiting = [candidate(ticket, tokens=2_500) for ticket in range(10)]
    assert planner().pick(waiting[:2]) == [0]
    assert planner().pick(waiting) == [0, 1, 2]


def test_a_full_engine_shares_more_because_a_queue_stands_outside_too() -> None:
    waiting = [candidate(ticket, tokens=1_000) for ticket in range(6)]
    assert len(planner(capacity=6).pick(waiting)) > len(planner(capacity=7).pick(waiting))


def test_where_a_step_costs_nothing_by_itself_equal_images_go_one_after_the_other_even_with_a_full_engine() -> None:
    waiting = [candidate(ticket, tokens=400) for ticket in range(32)]
    assert SharedSteps(BUDGET_TOKENS, capacity=32, cost=measured(0, 10e-6)).pick(waiting) == [0]


def test_even_there_a_short_image_does_not_wait_for_a_long_one_but_a_long_one_for_a_short_one() -> None:
    short, long = (400, 8), (4_000, 50)
    assert planner(fixed_s=0).pick([candidate(1, *long), candidate(2, *short)]) == [1, 2]
    assert planner(fixed_s=0).pick([candidate(1, *short), candidate(2, *long)]) == [1]


def test_where_tokens_cost_nothing_the_budget_alone_limits_a_pack() -> None:
    waiting = [candidate(ticket, tokens=1_000) for ticket in range(20)]
    assert len(planner(per_token_s=0).pick(waiting)) == BUDGET_TOKENS // 1_000


@pytest.mark.parametrize("tokens", [500, 2_000, 8_000])
@pytest.mark.parametrize("factor", [0.01, 10.0])
def test_one_step_that_was_far_too_slow_or_too_fast_changes_no_choice(tokens: int, factor: float) -> None:
    waiting = [candidate(ticket, tokens=2_500) for ticket in range(10)]
    chosen = planner()
    before = chosen.pick(waiting)
    chosen.observe(tokens, factor * (10e-3 + 10e-6 * tokens))
    for _ in range(GROW_AFTER):  # long enough for any fit to be made anew
        assert chosen.pick(waiting) == before
        chosen.observe(1_000, 20e-3)


def test_what_was_once_found_useless_is_tried_again_after_a_while() -> None:
    chosen = planner(fixed_s=0)
    waiting = [candidate(ticket) for ticket in range(4)]
    assert chosen.pick(waiting) == [0]
    for _ in range(FORGOTTEN_AFTER + 10):
        chosen.observe(1_064, 10.64e-3)
    assert chosen.pick(waiting) == [0, 1, 2, 3]


def test_a_choice_among_64_costs_well_below_a_millisecond() -> None:
    waiting = [candidate(ticket, tokens=400 + 10 * ticket, steps_left=50 - ticket % 40) for ticket in range(64)]
    chosen = SharedSteps(2 * BUDGET_TOKENS, capacity=64)
    for tokens in range(400, 16_000, 40):
        chosen.observe(tokens, 6e-3 + 14e-6 * tokens)

    def step() -> None:
        chosen.observe(sum(waiting[ticket].tokens for ticket in chosen.pick(waiting)), 0.2)

    assert min(repeat(step, number=20, repeat=10)) / 20 < 1e-3


# What a step costs


def test_the_cost_is_unknown_until_packs_of_twice_the_size_were_seen_three_times() -> None:
    cost = StepCost()
    for tokens in (1_000, 1_000, 1_000, 1_900, 1_900, 1_900, 2_400, 2_400):
        cost.observe(tokens, 1e-5 * tokens)
        assert cost.time() is None
    cost.observe(2_400, 1e-5 * 2_400)
    assert cost.time() is not None


def test_the_cost_is_the_line_through_what_was_measured() -> None:
    assert measured(6e-3, 14e-6).time() == pytest.approx((6e-3, 14e-6))


@pytest.mark.parametrize(("fixed_s", "per_token_s"), [(-1e-3, 14e-6), (6e-3, -0.5e-6)])
def test_no_part_of_the_cost_is_ever_negative(fixed_s: float, per_token_s: float) -> None:
    found = measured(fixed_s, per_token_s).time()
    assert found is not None
    assert min(found) == 0


def test_attention_that_makes_long_sequences_dearer_does_not_hide_the_fixed_cost() -> None:
    cost = StepCost()
    for tokens in (400, 1_064, 2_464, 4_352, 8_704) * 5:
        cost.observe(tokens, 6e-3 + 14e-6 * tokens + 2.9e-10 * tokens**2)  # a sixth of the whole at 8,704
    found = cost.time()
    assert found is not None
    assert found.fixed_s == pytest.approx(6e-3, rel=0.15)


def test_a_device_that_becomes_slower_is_learnt_anew() -> None:
    cost = StepCost()
    for slower in [1] * 40 + [2] * 9:
        for tokens in (500, 1_000, 2_000, 4_000, 8_000):
            cost.observe(tokens, slower * (6e-3 + 14e-6 * tokens))
    assert cost.time() == pytest.approx((12e-3, 28e-6))


# Nobody starves


def steps_until_done(chosen: SharedSteps, image: Candidate, others: Callable[[int], list[Candidate]]) -> int:
    """Steps until ``image`` is done, beside those that ``others`` gives for every step."""
    for step in range(1, 100_000):
        picked = chosen.pick([image, *others(step)])
        assert picked
        if image.ticket in picked:
            image = replace(image, steps_left=image.steps_left - 1, waited=0)
        else:
            image = replace(image, waited=image.waited + 1)
        if not image.steps_left:
            return step
    raise AssertionError("starved")


@pytest.mark.parametrize("priority", [1, 3])
@pytest.mark.parametrize("tokens", [400, 4_000, 20_000])
def test_an_endless_stream_of_urgent_images_leaves_a_step_in_fifty_for_each_class(priority: int, tokens: int) -> None:
    image = candidate(1, tokens, steps_left=8, priority=priority)
    taken = steps_until_done(planner(), image, lambda step: [candidate(2 * step), candidate(2 * step + 1)])
    assert taken == 8 * (PATIENCE * priority + 1)


@pytest.mark.parametrize("chosen", [planner(), planner(fixed_s=0), planner(per_token_s=0), unmeasured()])
def test_an_endless_stream_of_small_images_keeps_a_large_one_back_only_until_those_before_it_are_done(
    chosen: SharedSteps,
) -> None:
    def others(step: int) -> list[Candidate]:
        before = [candidate(1, 400, steps_left=21 - step)] if step <= 20 else []
        return before + [candidate(100 * step + extra, tokens=100, steps_left=1) for extra in range(20)]

    assert steps_until_done(chosen, candidate(2, tokens=20_000, steps_left=30), others) == 20 + 30


# Whatever comes

CANDIDATES = st.lists(
    st.builds(
        Candidate,
        ticket=st.integers(1, 10_000),
        tokens=st.integers(1, 40_000) | st.integers(260, 2_000),
        steps_left=st.integers(1, 100),
        priority=st.integers(-3, 9),
        waited=st.integers(0, 12 * PATIENCE),
    ),
    min_size=1,
    max_size=64,
    unique_by=lambda image: image.ticket,
)
STEPS = st.lists(st.tuples(st.integers(1, 60_000), st.floats(1e-4, 10)), max_size=40)


@given(candidates=CANDIDATES, steps=STEPS, capacity=st.integers(1, 64), cut=st.none() | st.integers(1, 60_000))
def test_whatever_comes_a_pack_holds_somebody_is_in_order_and_stays_within_the_budget(
    candidates: list[Candidate], steps: list[tuple[int, float]], capacity: int, cut: int | None
) -> None:
    chosen = SharedSteps(16_384, capacity=capacity)
    for tokens, seconds in steps:
        chosen.observe(tokens, seconds)
    if cut is not None:
        chosen.shrink(cut)
        assert chosen.budget_tokens <= max(1, cut // 2)
    picked = chosen.pick(candidates)

    by_ticket = {image.ticket: image for image in candidates}
    pack = [by_ticket[ticket] for ticket in picked]
    assert picked == sorted(set(picked))
    assert len(pack) == 1 or sum(image.tokens for image in pack) <= chosen.budget_tokens
    urgency = min(image.priority for image in candidates)
    oldest_urgent = min(image.ticket for image in candidates if image.priority == urgency)
    assert picked[0] <= oldest_urgent, "nobody passes the first of the most urgent but who is older"
    assert all(image.waited >= PATIENCE * (image.priority - urgency) for image in pack), "or waited for too long"
    assert chosen.pick(candidates[::-1]) == picked
