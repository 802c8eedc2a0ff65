"""Who draws the next step, as pure logic."""

from pipeline.planner import Candidate, FirstComeFirstServed


def candidate(ticket: int, steps_left: int = 5) -> Candidate:
    return Candidate(ticket, tokens=1064, steps_left=steps_left)


def test_nobody_draws_when_nobody_waits() -> None:
    assert FirstComeFirstServed().pick([]) == []


def test_the_oldest_draws_whatever_the_order_it_is_told_in() -> None:
    assert FirstComeFirstServed().pick([candidate(7), candidate(3), candidate(5)]) == [3]


def test_the_oldest_draws_until_it_is_done_even_if_a_newer_one_is_nearer_its_end() -> None:
    assert FirstComeFirstServed().pick([candidate(1, steps_left=99), candidate(2, steps_left=1)]) == [1]


def test_everyone_is_served_in_the_order_of_arrival() -> None:
    planner, left, order = FirstComeFirstServed(), {1: 2, 2: 1, 3: 3}, []
    while left:
        (ticket,) = planner.pick([candidate(*one) for one in left.items()])
        order.append(ticket)
        left[ticket] -= 1
        if not left[ticket]:
            del left[ticket]
    assert order == [1, 1, 2, 3, 3, 3]
