"""``/metrics`` for Prometheus: the farm's state, read from the store at each scrape, and this process's requests.

Seconds by phase are the workers' own. Labels are closed sets: route templates, states, priorities, never ids.
"""

import time
from collections.abc import Iterable, Iterator

from fastapi import APIRouter, Request, Response
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from producer.api.services import Admin, Services
from producer.jobs.contract import Farm
from producer.jobs.errors import Unavailable

METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

router = APIRouter()


@router.get("/metrics", include_in_schema=False)
def metrics(request: Request, here: Admin) -> Response:
    """Everything in this process's registry: it counts all tenants together."""
    return Response(generate_latest(request.app.state.registry), media_type=CONTENT_TYPE_LATEST)


class FarmCollector(Collector):
    """The farm at the moment of a scrape. A dependency that is away costs its own gauges, not the scrape."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def collect(self) -> Iterable[Metric]:
        up = GaugeMetricFamily("ovis_dependency_up", "1 if it answered this scrape.", labels=["dependency"])
        for dependency, gauges in (("Postgres", self._of_store), ("Redis", self._of_queue)):
            try:
                found = list(gauges())
            except Unavailable:
                up.add_metric([dependency], 0)
            else:
                up.add_metric([dependency], 1)
                yield from found
        yield up

    def _of_store(self) -> Iterator[Metric]:
        store, lease_s = self._services.store, self._services.settings.durations.lease_s
        yield from _farm_gauges(store.farm(lease_s=lease_s))
        depth = GaugeMetricFamily("ovis_backlog_jobs", "Jobs that are not at an end.", labels=["priority", "standing"])
        for row in store.backlog():
            for standing in ("waiting", "delayed", "running"):
                depth.add_metric([row["priority"], standing], row[standing])
        yield depth

    def _of_queue(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("ovis_redis_messages", "Messages that wait in Redis.", self._services.queue.depth())


def _farm_gauges(farm: Farm) -> Iterator[Metric]:
    jobs = GaugeMetricFamily("ovis_jobs", "Jobs by state.", labels=["state"])
    for state, count in farm.counts.items():
        jobs.add_metric([state.value], count)
    yield jobs
    workers = GaugeMetricFamily("ovis_workers", "Worker processes; silent ones for an hour.", labels=["heartbeat"])
    live = sum(worker.live for worker in farm.workers)
    workers.add_metric(["fresh"], live)
    workers.add_metric(["silent"], len(farm.workers) - live)
    yield workers
    yield GaugeMetricFamily("ovis_oldest_queued_seconds", "Age of the oldest waiting job.", farm.oldest_queued_s or 0)
    yield GaugeMetricFamily("ovis_images_last_minute", "Images recorded in the last minute.", farm.images_last_minute)
    yield GaugeMetricFamily("ovis_published_messages", "Messages published and not claimed yet.", farm.published)


class RequestMetrics:
    """ASGI middleware: counts requests and their seconds by method, route template and status."""

    def __init__(self, app: ASGIApp, registry: CollectorRegistry) -> None:
        self._app = app
        self._count = Counter(
            "ovis_api_requests", "Requests answered.", ["method", "route", "status"], registry=registry
        )
        self._seconds = Histogram(
            "ovis_api_request_seconds", "Until the last byte.", ["method", "route"], buckets=SECONDS, registry=registry
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500
        began = time.perf_counter()

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            method = scope["method"] if scope["method"] in METHODS else "other"
            route = getattr(scope.get("route"), "path", "unknown")
            self._count.labels(method, route, str(status)).inc()
            self._seconds.labels(method, route).observe(time.perf_counter() - began)
