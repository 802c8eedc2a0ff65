import signal
import subprocess
import sys

import httpx

from producer.jobs.contract import Submission
from producer.jobs.settings import Settings
from producer.jobs.store import Store
from tests.farm import environment, free_port
from tests.waiting import until


def test_a_dispatcher_of_its_own_publishes_tells_prometheus_and_ends_in_order(settings: Settings, store: Store) -> None:
    port = free_port()
    dispatcher = subprocess.Popen(
        [sys.executable, "-m", "producer.cli", "dispatcher"],
        env=environment(settings) | {"OVIS_METRICS_PORT": str(port)},
    )
    try:
        store.submit(Submission(prompt="a"), max_failures=3)
        until(lambda: store.window(lease_s=60) == (1, 0))
        numbers = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    finally:
        dispatcher.send_signal(signal.SIGTERM)
        assert dispatcher.wait(30) == 0
    assert "ovis_dispatcher_leads 1.0" in numbers
    assert "ovis_dispatcher_published_total 1.0" in numbers
