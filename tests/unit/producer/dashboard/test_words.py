"""Numbers and times as people read them."""

from datetime import UTC, datetime, timedelta, timezone

import pytest

from producer.dashboard import words


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (-3, "0 s"),
        (0.4, "0 s"),
        (59, "59 s"),
        (60, "1 min"),
        (95, "1 min 35 s"),
        (601, "10 min"),
        (3599.7, "1 h"),
        (7800, "2 h 10 min"),
        (36_000, "10 h"),
        (90_000, "1 d 1 h"),
        (9_000_000, "104 d"),
    ],
)
def test_a_span_is_said_in_its_largest_units(seconds: float, said: str) -> None:
    assert words.span(seconds) == said


def test_a_moment_is_said_as_its_distance_and_exactly() -> None:
    now = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert words.ago(now - timedelta(minutes=5), now) == "5 min ago"
    assert words.clock(now.astimezone(timezone(timedelta(hours=8)))) == "2026-01-02 03:04:05 UTC"


def test_thousands_are_set_apart_without_breaking_the_line() -> None:
    assert words.number(1234567) == "1\u202f234\u202f567"
