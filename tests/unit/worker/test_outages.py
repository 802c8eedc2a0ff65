import logging

import pytest

from producer.jobs.errors import NotFound, Unavailable
from worker.outages import SAME_OUTAGE_S, Outages


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def outages(clock: Clock) -> Outages:
    return Outages(clock)


def fail(outages: Outages) -> None:
    with pytest.raises(Unavailable), outages.watching("S3"):
        raise Unavailable("S3", "503 on PutObject")


def succeed(outages: Outages) -> None:
    with outages.watching("S3"):
        pass


def test_an_outage_is_one_line_when_it_begins_and_one_when_it_ends(
    outages: Outages, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for _ in range(5):
        fail(outages)
    assert outages.away("S3")
    for _ in range(5):
        succeed(outages)
    assert not outages.away("S3")
    assert caplog.messages == ["waiting for S3: 503 on PutObject", "S3 answers again"]


def test_a_server_that_comes_and_goes_is_told_once(
    outages: Outages, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for _ in range(5):
        fail(outages)
        clock.now += SAME_OUTAGE_S / 3
        succeed(outages)
    assert len(caplog.messages) == 2
    clock.now += SAME_OUTAGE_S
    fail(outages)
    assert len(caplog.messages) == 3


def test_each_server_has_an_outage_of_its_own(outages: Outages, caplog: pytest.LogCaptureFixture) -> None:
    fail(outages)
    outages.begin("Postgres", "Postgres: gone")
    assert (outages.away("S3"), outages.away("Postgres"), outages.away("Redis")) == (True, True, False)
    assert len(caplog.messages) == 2


def test_an_answer_that_nobody_hoped_for_is_an_answer(outages: Outages) -> None:
    fail(outages)
    with pytest.raises(NotFound), outages.watching("S3"):
        raise NotFound("object", "key")
    assert not outages.away("S3")


def test_an_error_of_the_programs_own_tells_nothing_of_the_server(outages: Outages) -> None:
    fail(outages)
    with pytest.raises(KeyError), outages.watching("S3"):
        raise KeyError
    assert outages.away("S3")


def test_an_answer_that_proves_nothing_ends_no_outage_and_a_failure_begins_one(outages: Outages) -> None:
    with pytest.raises(Unavailable), outages.watching("S3", proving=False):
        raise Unavailable("S3", "503 on GetObject")
    with outages.watching("S3", proving=False):
        pass
    with pytest.raises(NotFound), outages.watching("S3", proving=False):
        raise NotFound("object", "key")
    assert outages.away("S3")
    succeed(outages)
    assert not outages.away("S3")
