"""What a dispatcher tells Prometheus, in an API process and as a role of its own."""

import errno
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from producer.jobs.dispatcher import Dispatcher
from producer.jobs.errors import PortTaken, SettingsError
from producer.jobs.sweep import Sweeper


class DispatcherCollector(Collector):
    """One dispatcher at the moment of a scrape."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    def collect(self) -> Iterable[Metric]:
        leads = float(self._dispatcher.leading)
        yield GaugeMetricFamily("ovis_dispatcher_leads", "1 if this process's dispatcher leads.", leads)
        for what, count in vars(self._dispatcher.counts).items():
            yield CounterMetricFamily(f"ovis_dispatcher_{what}", f"Jobs that this dispatcher {what}.", count)


class SweeperCollector(Collector):
    """One dispatcher's sweep of the bucket at the moment of a scrape."""

    def __init__(self, sweeper: Sweeper) -> None:
        self._sweeper = sweeper

    def collect(self) -> Iterable[Metric]:
        yield CounterMetricFamily("ovis_swept_objects", "Objects that nothing pointed to.", self._sweeper.swept)


def serve_metrics(registry: CollectorRegistry, host: str, port: int) -> int:
    """Answer ``/metrics`` from a thread; returns the port, a free one for port 0.

    Raises:
        PortTaken: somebody listens there already.
        SettingsError: the host is no address of this machine, or the port is not for this user.
    """
    try:
        server, _thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PortTaken(host, port, "OVIS_METRICS_PORT") from error
        raise SettingsError(
            f"{host}:{port} cannot be listened on ({error.strerror}): set OVIS_METRICS_HOST and OVIS_METRICS_PORT"
        ) from error
    return int(server.server_port)
