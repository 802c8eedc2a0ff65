"""The speed that a worker tells."""

import pytest

from worker.speed import Speed


def test_nothing_is_told_before_anything_was_drawn() -> None:
    speed = Speed()
    assert speed.now is None
    speed.note(0.0, 2.0)
    assert speed.now is None


def test_it_is_work_over_the_time_of_drawing() -> None:
    speed = Speed()
    for _ in range(5):
        speed.note(8.0, 2.0)
    assert speed.now == pytest.approx(4.0)


def test_what_was_drawn_long_ago_counts_little() -> None:
    speed = Speed(memory_s=10.0)
    speed.note(1000.0, 10.0)
    for _ in range(60):
        speed.note(2.0, 1.0)
    assert speed.now == pytest.approx(2.0, rel=0.2)
