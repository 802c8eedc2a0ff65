"""OpenAI's own package as the client of a farm: an API process, a worker process that draws blanks, real servers."""

import asyncio
import base64
import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types import Batch
from PIL import Image

from producer.jobs.settings import Settings
from producer.jobs.storage import Storage
from tests.conftest import fresh_settings
from tests.farm import environment, free_port
from tests.waiting import until

ROOT = Path(__file__).parents[2]
BODY: dict[str, Any] = {"prompt": "a teal square", "size": "64x64", "num_inference_steps": 2}
MORE: dict[str, Any] = {"num_inference_steps": 2}


@pytest.fixture(scope="module")
def base_url(servers: Settings, migrated: str, bucket_maker: Storage) -> Iterator[str]:
    """Of ``/v1`` of a farm that draws."""
    port = free_port()
    with fresh_settings(servers, migrated, bucket_maker) as settings:
        variables = environment(settings) | {"OVIS_API_PORT": str(port)}
        api = (sys.executable, "-m", "producer.cli", "api")
        worker = (sys.executable, str(ROOT / "tests" / "blank_worker.py"), "--step-s", "0.01")
        with _running(api, variables) as api_process, _running(worker, variables) as worker_process:
            url = f"http://127.0.0.1:{port}"
            until(lambda: _draws(url) or api_process.poll() or worker_process.poll(), timeout_s=120, pause_s=0.1)
            assert (api_process.poll(), worker_process.poll()) == (None, None)
            yield f"{url}/v1"


@contextmanager
def _running(command: tuple[str, ...], variables: dict[str, str]) -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen(command, env=variables, cwd=ROOT)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(60)


def _draws(url: str) -> bool:
    try:
        return bool(httpx.get(f"{url}/v1/models", timeout=10).json()["data"])
    except httpx.TransportError:
        return False


@pytest.fixture
def client(base_url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=base_url, api_key="none is needed here", max_retries=0) as client:
        yield client


def jsonl(lines: list[Any]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def line(custom_id: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/images/generations", "body": BODY | body}


def read(client: OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    return [json.loads(found) for found in client.files.content(file_id).text.splitlines()]


def ended(client: OpenAI, batch: Batch) -> Batch:
    deadline = time.monotonic() + 120
    while batch.status not in {"completed", "failed", "cancelled"}:
        assert time.monotonic() < deadline, batch
        time.sleep(0.1)
        batch = client.batches.retrieve(batch.id)
    return batch


def picture(url: str | None) -> Image.Image:
    assert url is not None
    return Image.open(io.BytesIO(httpx.get(url, timeout=60).raise_for_status().content))


def test_two_hundred_lines_with_three_bad_ones_are_uploaded_polled_and_read_back(client: OpenAI) -> None:
    lines = [line(f"banner-{number}", seed=number) for number in range(200)]
    lines[20]["body"]["size"] = "65x9000"
    lines[100]["body"] = {"size": "64x64"}
    lines[199]["body"]["sampler"] = "euler"
    lines[7]["body"] |= {"n": 3, "response_format": "b64_json"}
    uploaded = client.files.create(file=("banners.jsonl", jsonl(lines)), purpose="batch")
    assert (uploaded.filename, uploaded.bytes, uploaded.purpose) == ("banners.jsonl", len(jsonl(lines)), "batch")

    batch = client.batches.create(
        input_file_id=uploaded.id,
        endpoint="/v1/images/generations",
        completion_window="24h",
        metadata={"season": "autumn"},
    )
    assert batch.errors is None
    batch = ended(client, batch)

    assert (batch.status, batch.metadata) == ("completed", {"season": "autumn"})
    assert batch.request_counts is not None
    assert batch.request_counts.to_dict() == {"total": 200, "completed": 197, "failed": 3}
    output = read(client, batch.output_file_id)
    good = [number for number in range(200) if number not in {20, 100, 199}]
    assert [found["custom_id"] for found in output] == [f"banner-{number}" for number in good]
    assert {found["response"]["status_code"] for found in output} == {200}
    assert picture(output[0]["response"]["body"]["data"][0]["url"]).size == (64, 64)
    assert {found["response"]["body"]["usage"]["total_tokens"] for found in output} == {0}
    images = output[7]["response"]["body"]["data"]
    shades = [Image.open(io.BytesIO(base64.b64decode(image["b64_json"]))).getpixel((0, 0)) for image in images]
    assert shades == [(7, 7, 7), (8, 8, 8), (9, 9, 9)], "the seeds of a line's images follow on each other"
    errors = read(client, batch.error_file_id)
    assert [found["custom_id"] for found in errors] == ["banner-20", "banner-100", "banner-199"]
    faults = [found["response"]["body"]["error"] for found in errors]
    assert [fault["param"] for fault in faults] == ["size", "prompt", "sampler"]
    assert {found["response"]["status_code"] for found in errors} == {400}
    for file_id in (batch.output_file_id, batch.error_file_id):
        assert file_id is not None
        assert client.files.retrieve(file_id).bytes == len(client.files.content(file_id).content)


def test_images_are_drawn_while_the_caller_waits(client: OpenAI) -> None:
    drawn = client.images.generate(
        prompt="a teal square",
        n=2,
        size="64x64",
        output_format="webp",
        output_compression=80,
        response_format="url",
        extra_body=MORE | {"seed": 11, "guidance_scale": 3.5, "negative_prompt": "red"},
    )
    assert drawn.data is not None
    pictures = [picture(image.url) for image in drawn.data]
    assert [(one.format, one.size) for one in pictures] == [("WEBP", (64, 64))] * 2
    assert [getattr(image, "seed", None) for image in drawn.data] == [11, 12]
    assert (drawn.size, drawn.output_format) == ("64x64", "webp")
    assert drawn.usage is not None
    assert drawn.usage.total_tokens == 0

    (inline,) = (
        client.images.generate(
            prompt="a teal square", size="64x64", response_format="b64_json", extra_body=MORE | {"seed": 5}
        ).data
        or []
    )
    assert inline.b64_json is not None
    assert Image.open(io.BytesIO(base64.b64decode(inline.b64_json))).getpixel((0, 0)) == (5, 5, 5)


def test_a_streamed_image_ends_with_the_image(client: OpenAI) -> None:
    with client.images.generate(
        prompt="a teal square", size="64x64", stream=True, partial_images=2, extra_body={"num_inference_steps": 50}
    ) as stream:
        events = list(stream)
    assert [event.type for event in events[:-1]] == ["image_generation.partial_image"] * (len(events) - 1)
    assert events[-1].type == "image_generation.completed"
    assert Image.open(io.BytesIO(base64.b64decode(events[-1].b64_json))).size == (64, 64)
    assert events[-1].usage.total_tokens == 0


def test_wrong_requests_raise_the_packages_own_errors(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as wrong:
        client.images.generate(prompt="a", size="12x12")
    assert (wrong.value.param, wrong.value.code, wrong.value.type) == ("size", "invalid_value", "invalid_request_error")
    with pytest.raises(openai.BadRequestError, match=r"background: .*opaque"):
        client.images.generate(prompt="a", background="transparent")
    with pytest.raises(openai.NotFoundError) as unknown:
        client.images.generate(prompt="a", model="gpt-image-2")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.batches.retrieve("batch_1")
    with pytest.raises(openai.BadRequestError) as purpose:
        client.files.create(file=b"{}", purpose="fine-tune")
    assert purpose.value.param == "purpose"
    with pytest.raises(openai.BadRequestError, match="empty"):
        client.files.create(file=b"", purpose="batch")


def test_the_model_that_workers_draw_with_is_the_one_to_ask_for(client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, client.models.retrieve("blank").id) == ("blank", "blank")
    drawn = client.images.generate(prompt="a teal square", model="blank", size="64x64", extra_body=MORE)
    assert drawn.data is not None
    assert picture(drawn.data[0].url).size == (64, 64)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("org/none")


def test_many_wait_at_once_through_the_async_client(base_url: str) -> None:
    async def draw() -> list[tuple[int, ...]]:
        async with AsyncOpenAI(base_url=base_url, api_key="-", max_retries=0) as client:
            asked = [
                client.images.generate(
                    prompt="a", size="64x64", response_format="b64_json", extra_body=MORE | {"seed": seed}
                )
                for seed in range(60)
            ]
            answers = await asyncio.gather(*asked)
        files = [base64.b64decode(answer.data[0].b64_json) for answer in answers]  # type: ignore[index,arg-type]
        return [Image.open(io.BytesIO(file)).getpixel((0, 0)) for file in files]  # type: ignore[misc]

    assert asyncio.run(draw()) == [(seed, seed, seed) for seed in range(60)]


def test_a_batch_goes_its_way_through_the_async_client(base_url: str) -> None:
    async def go() -> list[str]:
        async with AsyncOpenAI(base_url=base_url, api_key="-", max_retries=0) as client:
            lines = jsonl([line("first"), line("second")])
            file = await client.files.create(file=("two.jsonl", lines), purpose="batch")
            assert [found.id async for found in client.files.list(limit=1)][:1] == [file.id]
            batch = await client.batches.create(
                input_file_id=file.id, endpoint="/v1/images/generations", completion_window="24h"
            )
            while batch.status != "completed":
                await asyncio.sleep(0.1)
                batch = await client.batches.retrieve(batch.id)
            assert [found.id async for found in client.batches.list(limit=1)][:1] == [batch.id]
            content = await client.files.content(batch.output_file_id or "")
            deleted = await client.files.delete(file.id)
            assert (deleted.id, deleted.deleted) == (file.id, True)
        return [json.loads(found)["custom_id"] for found in content.text.splitlines()]

    assert asyncio.run(asyncio.wait_for(go(), 120)) == ["first", "second"]
