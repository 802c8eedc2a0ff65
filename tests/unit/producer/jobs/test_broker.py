import pytest
from kombu.exceptions import OperationalError

from producer.jobs.broker import LONGEST_PAUSE_S
from producer.jobs.queue import celery_app


def test_a_missing_redis_is_looked_for_every_few_seconds_however_long_it_is_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slept_s: list[float] = []
    monkeypatch.setattr("kombu.utils.functional.sleep", slept_s.append)
    pauses_s: list[float] = []
    connection = celery_app("redis://127.0.0.1:1/0").connection_for_read()
    with pytest.raises(OperationalError):
        connection.ensure_connection(lambda _error, pause_s: pauses_s.append(pause_s), 20)
    assert len(pauses_s) == 20
    assert max(pauses_s) == LONGEST_PAUSE_S
    assert slept_s
