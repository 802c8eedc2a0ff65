"""The real API on real servers, asked by OpenAI's own package, and a hand that plays the worker."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openai import OpenAI
from openai.types import Batch

from producer.jobs.settings import Settings
from tests.farm import Farmhand, serving

ENDPOINT = "/v1/images/generations"


@pytest.fixture
def api(settings: Settings) -> Iterator[httpx.Client]:
    """Speaks to the API of an empty farm."""
    quick = settings.model_copy(update={"image_wait_s": 2.0})
    with serving(quick) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture
def client(api: httpx.Client) -> Iterator[OpenAI]:
    """The same through OpenAI's package."""
    with OpenAI(base_url=f"{str(api.base_url).rstrip('/')}/v1", api_key="-", max_retries=2) as client:
        yield client


@pytest.fixture
def hand(settings: Settings) -> Iterator[Farmhand]:
    farmhand = Farmhand(settings)
    yield farmhand
    farmhand.close()


def line(custom_id: str, **body: Any) -> dict[str, Any]:
    """One that asks for a small image."""
    return {"custom_id": custom_id, "method": "POST", "url": ENDPOINT, "body": {"prompt": "a", "size": "64x64"} | body}


def batch_of(client: OpenAI, *lines: Any, metadata: dict[str, str] | None = None) -> Batch:
    """A batch of these lines; one that is bytes goes in as it is."""
    raw = b"\n".join(one if isinstance(one, bytes) else json.dumps(one).encode() for one in lines)
    file = client.files.create(file=("lines.jsonl", raw), purpose="batch")
    return client.batches.create(
        input_file_id=file.id, endpoint="/v1/images/generations", completion_window="24h", metadata=metadata
    )


def read(client: OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    """The lines of a file."""
    assert file_id is not None
    return [json.loads(found) for found in client.files.content(file_id).text.splitlines()]
