"""Where a dispatcher or worker that cannot serve its metrics says so."""

import socket

import pytest
from prometheus_client import CollectorRegistry

from producer.jobs.errors import PortTaken, SettingsError
from producer.jobs.metrics import serve_metrics


def test_a_taken_port_of_the_metrics_is_said_with_the_setting_to_change() -> None:
    with socket.create_server(("127.0.0.1", 0)) as first:
        port = first.getsockname()[1]
        with pytest.raises(PortTaken, match="OVIS_METRICS_PORT") as refused:
            serve_metrics(CollectorRegistry(), "127.0.0.1", port)
    assert refused.value.port == port


def test_a_host_of_the_metrics_that_is_not_this_machine_is_said() -> None:
    with pytest.raises(SettingsError, match="OVIS_METRICS_HOST"):
        serve_metrics(CollectorRegistry(), "192.0.2.1", 0)
