"""Celery's own lines, made by Celery's own loggers."""

import logging
from collections.abc import Iterator

import pytest
from celery.worker.consumer.consumer import CONNECTION_ERROR, CONNECTION_RETRY

from worker.celery_log import CONNECTION, CONSUMER, REQUEST, WARNINGS, quieten
from worker.outages import Outages


@pytest.fixture
def outages() -> Outages:
    return Outages()


@pytest.fixture(autouse=True)
def _quiet(outages: Outages) -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("celery", CONSUMER, CONNECTION, REQUEST, WARNINGS)]
    before = [(logger.level, list(logger.filters)) for logger in loggers]
    quieten(outages)
    yield
    for logger, (level, filters) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.filters = filters


def test_an_outage_of_redis_is_one_line_and_its_end_another(outages: Outages, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "worker")
    consumer = logging.getLogger(CONSUMER)
    consumer.warning("%s (%r)", CONNECTION_RETRY, ConnectionResetError("by peer"))
    for _ in range(5):
        consumer.error(CONNECTION_ERROR, "redis://:**@host/0", ConnectionRefusedError("refused"), "Trying again")
    assert outages.away("Redis")
    logging.getLogger(CONNECTION).info("Connected to %s", "redis://:**@host/0")
    assert caplog.messages == ["waiting for Redis: by peer", "Redis answers again"]


def test_a_message_that_could_not_be_acknowledged_is_told_without_a_traceback_and_not_within_an_outage(
    outages: Outages, caplog: pytest.LogCaptureFixture
) -> None:
    request = logging.getLogger(REQUEST)
    request.critical("Couldn't ack %r, reason:%r", "tag", OSError("gone"), exc_info=OSError("gone"))
    assert "Traceback" not in caplog.text
    assert len(caplog.records) == 1
    outages.begin("Redis", "Redis: gone")
    caplog.clear()
    request.critical("Couldn't ack %r, reason:%r", "tag", OSError("gone"), exc_info=OSError("gone"))
    assert not caplog.records


def test_celerys_paragraph_on_a_setting_that_is_made_on_purpose_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    for warning in ("CPendingDeprecationWarning: In Celery 5.1", "ResourceWarning: unclosed"):
        logging.getLogger(WARNINGS).warning("%s", f"consumer.py:427: {warning}")
    assert caplog.messages == ["consumer.py:427: ResourceWarning: unclosed"]


def test_what_else_goes_wrong_is_told_as_celery_tells_it(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger(CONSUMER).error("something %s", "else")
    assert caplog.messages == ["something else"]
