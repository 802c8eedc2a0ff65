"""What a worker tells Prometheus: how its jobs ended, and the seconds of each phase."""

from prometheus_client import CollectorRegistry, Counter, Histogram

from producer.jobs.contract import Outcome

PHASES = ("waiting", "drawing", "encoding", "uploading")
BUCKETS_S = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000, 10_000)


class Metrics:
    """One worker's numbers, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._ended = Counter("ovis_claims_ended", "Claims by how they ended.", ["outcome"], registry=self.registry)
        self._phases = Histogram(
            "ovis_phase_seconds",
            "Seconds that jobs spent in each phase.",
            ["phase"],
            buckets=BUCKETS_S,
            registry=self.registry,
        )
        for phase in PHASES:
            self._phases.labels(phase)

    def ended(self, outcome: Outcome) -> None:
        """One claim ended so."""
        self._ended.labels(outcome.value).inc()

    def phase(self, phase: str, seconds: float) -> float:
        """Note the seconds of one job's phase, and return them."""
        self._phases.labels(phase).observe(seconds)
        return seconds
