"""README's Python, run as it stands there against a real farm with a worker that draws blanks."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from uuid import uuid4

import pytest

from producer.jobs.contract import EventKind, Submission
from producer.jobs.settings import Settings
from producer.jobs.store import Store
from producer.jobs.webhooks import Webhooks
from tests.farm import Farmhand, environment, serving

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
ADDRESS = "http://127.0.0.1:8000"
PRODUCTS = """sku,style,product,headline
4711,minimal,tea,Slow down
4712,bold,coffee,"Wake up, now"
"""
REQUESTS = json.dumps(
    {"custom_id": "a", "method": "POST", "url": "/v1/images/generations", "body": {"prompt": "a", "size": "64x64"}}
)
INPUTS = {"products.csv": PRODUCTS, "requests.jsonl": REQUESTS}
LEFT = (
    {"requests.jsonl"},
    {"000001.png"},
    {"products.csv", "results.csv", "images.zip"},
    set(),
)
"""The files that each example leaves."""
LIMIT_S = 240
KINDS = dict(re.findall(r"^\| `((?:job|batch)\.\w+)` \| .* \| (.*) \|$", README, re.MULTILINE))
"""What README says that a webhook is told of each kind."""


@pytest.fixture
def url(settings: Settings) -> Iterator[str]:
    """Of a farm whose worker draws blanks."""
    worker = subprocess.Popen((sys.executable, ROOT / "tests" / "blank_worker.py"), env=environment(settings), cwd=ROOT)
    try:
        with serving(settings) as base_url:
            yield base_url
    finally:
        worker.terminate()
        worker.wait(LIMIT_S)


def test_every_example_runs_as_it_stands_there(url: str, tmp_path: Path) -> None:
    assert len(EXAMPLES) == len(LEFT)
    for number, (example, left) in enumerate(zip(EXAMPLES, LEFT, strict=True)):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name in left & INPUTS.keys():
            (folder / name).write_text(INPUTS[name])
        assert ADDRESS in example
        program = example.replace(ADDRESS, url)
        ended = subprocess.run(
            (sys.executable, "-W", "error", "-c", program),
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
        assert ended.returncode == 0, f"{example}\n{ended.stdout}\n{ended.stderr}"
        assert {path.name for path in folder.iterdir()} == left
        assert ended.stdout


def test_each_kind_that_a_webhook_is_told_is_listed_with_what_it_carries(settings: Settings, store: Store) -> None:
    told = set(EventKind) - {EventKind.JOB_PROGRESS}
    webhook, _ = Webhooks(store.database).create("default", "https://127.0.0.1:1/", sorted(told))
    batch = store.submit_batch("b", [Submission(prompt="a", name=str(n)) for n in range(3)], max_failures=3)
    with closing(Farmhand(settings)) as hand:
        first, second, third = store.batch_jobs(batch.id)
        store.retry(hand.claim(first), "away", "S3", delay_s=0)
        hand.succeed(first)
        hand.fail(second)
        store.cancel(third.id)
    assert store.lead(leader := uuid4(), leader_s=600)
    assert store.finish_batches(leader) == 1
    carried: dict[str, set[str]] = {}
    for delivery in Webhooks(store.database).deliveries(webhook.id, limit=100):
        carried.setdefault(delivery.kind, set()).update(delivery.data)
    assert carried == {kind: set(re.findall(r"`(\w+)`", told)) for kind, told in KINDS.items()}
    assert carried.keys() == told
