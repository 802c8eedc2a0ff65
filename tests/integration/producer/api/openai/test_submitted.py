"""What goes wrong once a submission is committed: it is named, and OpenAI's package does not submit it again."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import openai
import pytest
from openai import OpenAI
from pydantic import SecretStr

from producer.jobs.contract import Job
from producer.jobs.errors import Unavailable
from producer.jobs.search import Search
from producer.jobs.settings import Settings
from tests.chaos.proxy import Kind, Proxy, Trouble
from tests.farm import Farmhand, serving
from tests.integration.producer.api.openai.conftest import ENDPOINT, line
from tests.integration.producer.api.openai.test_images import Drawer
from tests.waiting import until

BUCKET = ("s3_endpoint_url", Trouble(Kind.REFUSE, b"GET /"))
POSTGRES = ("database_url", Trouble(Kind.RESET, b"FROM jobs WHERE id = $1"))
ONE: dict[str, Any] = {"prompt": "a", "size": "64x64", "response_format": "b64_json"}


@contextmanager
def farm_behind(settings: Settings, address: str, image_wait_s: float = 60) -> Iterator[tuple[OpenAI, Proxy]]:
    """A client of an API, and what stands between this and its server at ``address``."""
    parts = urlsplit(settings.require(address))
    assert parts.port is not None
    proxy = Proxy(parts.port)
    proxy.start()
    url = urlunsplit(parts._replace(netloc=parts.netloc.replace(f":{parts.port}", f":{proxy.port}")))
    changes = {address: SecretStr(url) if address == "database_url" else url, "image_wait_s": image_wait_s}
    try:
        with (
            serving(settings.model_copy(update=changes)) as base_url,
            OpenAI(base_url=f"{base_url}/v1", api_key="-", max_retries=2) as client,
        ):
            yield client, proxy
    finally:
        proxy.stop()


@contextmanager
def drawn_amid(hand: Farmhand, proxy: Proxy, trouble: Trouble) -> Iterator[None]:
    """Draws the first job that is submitted meanwhile; from its submission on there is trouble."""
    over = threading.Event()

    def draw() -> None:
        until(lambda: submitted(hand))
        with proxy.doing(trouble):
            hand.succeed(submitted(hand)[0])
            over.wait(60)

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def submitted(hand: Farmhand) -> list[Job]:
    return Search(hand.store.database).jobs().found


@pytest.mark.parametrize(("address", "trouble"), [BUCKET, POSTGRES], ids=["bucket", "postgres"])
def test_a_call_draws_once_though_what_its_answer_is_made_of_is_away(
    settings: Settings, hand: Farmhand, address: str, trouble: Trouble
) -> None:
    with farm_behind(settings, address) as (client, proxy):
        with drawn_amid(hand, proxy, trouble), pytest.raises(openai.InternalServerError) as away:
            client.images.generate(**ONE)
        (job,) = submitted(hand)
        assert (away.value.status_code, away.value.code) == (503, "unanswered")
        assert f"/api/v1/jobs/{job.id}" in away.value.message
        assert proxy.done


@pytest.mark.parametrize(("address", "trouble"), [BUCKET, POSTGRES], ids=["bucket", "postgres"])
def test_a_stream_names_the_job_when_its_image_cannot_be_read(
    settings: Settings, hand: Farmhand, address: str, trouble: Trouble
) -> None:
    with farm_behind(settings, address) as (client, proxy):
        with drawn_amid(hand, proxy, trouble), pytest.raises(openai.APIError) as away:
            list(client.images.generate(**ONE, stream=True))
        (job,) = submitted(hand)
        assert f"/api/v1/jobs/{job.id}" in away.value.message
        assert proxy.done


def test_images_that_cannot_be_told_after_their_submission_are_submitted_once(
    settings: Settings, hand: Farmhand
) -> None:
    with farm_behind(settings, "database_url") as (client, proxy):
        with proxy.doing(Trouble(Kind.RESET, b"position > ")), pytest.raises(openai.InternalServerError) as away:
            client.images.generate(**ONE, n=2)
        assert proxy.done == 1
    (batch,) = hand.store.batches()
    assert f"/api/v1/batches/{batch.id}" in away.value.message


def test_a_submission_that_breaks_off_is_asked_for_again_and_is_there_once(settings: Settings, hand: Farmhand) -> None:
    away = Trouble(Kind.RESET, b"FROM jobs WHERE id = $1", times=1)
    with farm_behind(settings, "database_url", image_wait_s=1) as (client, proxy):
        with proxy.doing(away), pytest.raises(openai.InternalServerError) as late:
            client.images.generate(**ONE)
        assert (proxy.done, late.value.status_code) == (1, 504)
    (job,) = submitted(hand)
    assert str(job.id) in late.value.message


def test_a_mistake_of_the_server_draws_nothing_twice(
    client: OpenAI, hand: Farmhand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("producer.api.openai.pictures.Pictures.of", mistaken)
    drawer = Drawer(hand, 1, "succeed")
    with pytest.raises(openai.InternalServerError) as mistake:
        client.images.generate(**ONE)
    drawer.join()
    (job,) = submitted(hand)
    assert (mistake.value.status_code, str(job.id) in mistake.value.message) == (500, True)
    assert "secret" not in mistake.value.message


def mistaken(*_: Any) -> None:
    raise RuntimeError("secret")


def test_a_batch_that_cannot_be_counted_after_its_submission_is_made_once(
    client: OpenAI, hand: Farmhand, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any) -> None:
        raise Unavailable("Postgres", "gone for a moment")

    file = client.files.create(file=("a.jsonl", json.dumps(line("one")).encode()), purpose="batch")
    monkeypatch.setattr("producer.jobs.lines.Lines.counts", away)
    with pytest.raises(openai.InternalServerError) as uncounted:
        client.batches.create(input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h")  # type: ignore[arg-type]
    (batch,) = hand.store.batches()
    assert f"/v1/batches/batch_{batch.id.hex}" in uncounted.value.message
