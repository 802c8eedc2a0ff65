"""Where the API listens."""

from contextlib import closing

import pytest

from producer.api.server import listen, url_of
from producer.jobs.errors import PortTaken, SettingsError


def test_a_taken_port_is_said_with_the_setting_to_change() -> None:
    with closing(listen("127.0.0.1", 0)) as first:
        port = first.getsockname()[1]
        with pytest.raises(PortTaken, match="OVIS_API_PORT") as refused:
            listen("127.0.0.1", port)
    assert refused.value.port == port


def test_a_host_that_is_not_this_machine_is_said() -> None:
    with pytest.raises(SettingsError, match="OVIS_API_HOST"):
        listen("192.0.2.1", 0)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_the_url_is_one_that_a_browser_can_open(host: str) -> None:
    with closing(listen(host, 0)) as listener:
        assert url_of(listener).startswith("http://127.0.0.1:")
