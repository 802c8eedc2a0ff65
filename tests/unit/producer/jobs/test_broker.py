from ssl import CERT_NONE

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


@pytest.mark.parametrize(
    ("url", "ssl"),
    [
        ("redis://:p@h:1/0", None),
        ("rediss://:p@h:1/0", {"ssl_cert_reqs": "required"}),
        ("rediss://:p@h:1/0?ssl_cert_reqs=none", {"ssl_cert_reqs": CERT_NONE}),
    ],
)
def test_workers_speak_tls_where_the_address_says_so(url: str, ssl: object) -> None:
    assert celery_app(url).connection_for_read().ssl == ssl
