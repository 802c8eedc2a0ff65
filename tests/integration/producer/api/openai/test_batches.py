"""Batches by OpenAI's package: what is refused, how far they are, how they end."""

import json
from contextlib import closing
from typing import Any
from uuid import UUID

import httpx
import openai
import psycopg
import pytest
from openai import OpenAI

from producer.jobs.contract import Job
from producer.jobs.search import Search
from producer.jobs.settings import Settings
from producer.manifest.record import ROW_MAX_BYTES
from tests.farm import Farmhand
from tests.integration.producer.api.openai.conftest import ENDPOINT, batch_of, line, read
from tests.waiting import until


def draw_all(hand: Farmhand, jobs: list[Job]) -> None:
    for job in jobs:
        hand.succeed(job)


def completed(client: OpenAI, batch_id: str) -> openai.types.Batch:
    until(lambda: client.batches.retrieve(batch_id).status == "completed")
    return client.batches.retrieve(batch_id)


def native_id(batch_id: str) -> str:
    return batch_id.removeprefix("batch_")


def test_each_fault_of_an_input_is_named_with_its_line_and_nothing_is_drawn(client: OpenAI, hand: Farmhand) -> None:
    hand.beat()
    batch = batch_of(
        client,
        line("good"),
        b"{not json",
        b"",
        b"[1]",
        line("good"),
        line("url") | {"url": "/v1/embeddings"},
        line("method") | {"method": "GET"},
        {"custom_id": "body", "method": "POST", "url": ENDPOINT},
        line("model", model="dall-e-2"),
        line("\x00"),
        line("extra") | {"nul\x00": 1},
    )
    assert (batch.status, batch.output_file_id, batch.error_file_id) == ("failed", None, None)
    assert batch.failed_at == batch.created_at
    assert batch.errors is not None
    assert [(fault.line, fault.code, fault.param) for fault in batch.errors.data or []] == [
        (2, "invalid_json_line", None),
        (4, "invalid_json_line", None),
        (5, "duplicate_custom_id", "custom_id"),
        (6, "invalid_url", "url"),
        (7, "invalid_method", "method"),
        (8, "missing_required_parameter", "body"),
        (9, "model_not_found", "body.model"),
        (10, "invalid_custom_id", "custom_id"),
        (11, "unknown_parameter", "nul\\x00"),
    ]
    assert Search(hand.store.database).jobs().found == []


def test_a_line_that_names_one_of_several_models_is_refused(client: OpenAI, hand: Farmhand, settings: Settings) -> None:
    hand.beat()
    assert batch_of(client, line("one", model="tiny")).status == "in_progress"
    with closing(Farmhand(settings)) as other:
        other.beat(model="other")
    faults = errors_of(batch_of(client, line("one", model="tiny"), line("two"), line("three", model="other")))
    assert [(fault.line, fault.code, fault.param) for fault in faults] == [
        (1, "model_not_promised", "body.model"),
        (3, "model_not_promised", "body.model"),
    ]
    assert "several models at the moment (other, tiny)" in faults[0].message
    assert batch_of(client, line("two")).status == "in_progress"


def test_each_image_of_a_line_carries_no_more_of_it_than_a_row_of_a_manifest(client: OpenAI, hand: Farmhand) -> None:
    batch = batch_of(client, line("long", n=3, user="u" * 500_000))
    jobs = hand.store.batch_jobs(UUID(native_id(batch.id)))
    assert len(jobs) == 3
    assert all((job.source or {})["custom_id"] == "long" for job in jobs)
    assert all(len(json.dumps(job.source)) < ROW_MAX_BYTES for job in jobs)


def test_an_input_without_a_line_or_with_too_many_is_refused(client: OpenAI) -> None:
    (fault,) = errors_of(batch_of(client, b" \n\n"))
    assert fault.code == "empty_file"
    (fault,) = errors_of(batch_of(client, b'{"custom_id": "' + b"x" * 1_000_000))
    assert (fault.code, fault.line) == ("line_too_long", 1)
    (fault,) = errors_of(batch_of(client, *(line(str(number)) for number in range(50_001))))
    assert (fault.code, fault.line) == ("too_many_lines", 50_001)


def errors_of(batch: openai.types.Batch) -> list[Any]:
    assert batch.errors is not None
    assert batch.status == "failed"
    return list(batch.errors.data or [])


def test_a_line_is_done_when_all_of_its_images_are(client: OpenAI, hand: Farmhand) -> None:
    batch = batch_of(client, line("three", n=3, seed=4), line("one"), line("bad", size="1x1"))
    jobs = hand.store.batch_jobs(hand.store.batches()[0].id)
    assert [(job.line, job.request.seed) for job in jobs[:3]] == [(1, 4), (1, 5), (1, 6)]
    assert counts(batch) == (3, 0, 1)
    draw_all(hand, jobs[:2])
    assert counts(client.batches.retrieve(batch.id)) == (3, 0, 1)
    hand.succeed(jobs[2])
    found = client.batches.retrieve(batch.id)
    assert (counts(found), found.status, found.output_file_id) == ((3, 1, 1), "in_progress", None)
    hand.fail(jobs[3], "out of memory", "exhausted")
    found = completed(client, batch.id)
    assert (counts(found), found.completed_at is not None) == ((3, 1, 2), True)
    (good,) = read(client, found.output_file_id)
    assert [image["seed"] for image in good["response"]["body"]["data"]] == [4, 5, 6]
    one, bad = read(client, found.error_file_id)
    assert (one["custom_id"], one["response"]["status_code"], one["response"]["body"]["error"]["message"]) == (
        "one",
        500,
        "out of memory",
    )
    assert (bad["custom_id"], bad["response"]["body"]["error"]["param"]) == ("bad", "size")


def counts(batch: openai.types.Batch) -> tuple[int, int, int]:
    found = batch.request_counts
    assert found is not None
    return found.total, found.completed, found.failed


def test_what_is_drawn_of_a_cancelled_batch_is_in_its_output(client: OpenAI, hand: Farmhand) -> None:
    batch = batch_of(client, line("drawn"), line("not"))
    first, _ = hand.store.batch_jobs(hand.store.batches()[0].id)
    hand.succeed(first)
    cancelled = client.batches.cancel(batch.id)
    assert (cancelled.status, cancelled.cancelled_at is not None) == ("cancelled", True)
    assert client.batches.cancel(batch.id).cancelled_at == cancelled.cancelled_at
    assert [found["custom_id"] for found in read(client, cancelled.output_file_id)] == ["drawn"]
    (not_drawn,) = read(client, cancelled.error_file_id)
    assert (not_drawn["custom_id"], not_drawn["response"], not_drawn["error"]["code"]) == (
        "not",
        None,
        "batch_cancelled",
    )


def test_a_batch_is_cancelled_when_its_last_job_has_ended(client: OpenAI, hand: Farmhand, settings: Settings) -> None:
    batch = client.batches.cancel(batch_of(client, line("one")).id)
    until(lambda: hand.store.batches()[0].finished_at)
    with psycopg.connect(settings.require("database_url")) as connection:
        connection.execute("UPDATE batches SET finished_at = cancelled_at + interval '7 seconds'")
    found = client.batches.retrieve(batch.id)
    assert (found.cancelling_at, found.cancelled_at) == (batch.cancelling_at, (batch.cancelling_at or 0) + 7)


def test_a_batch_that_has_ended_is_not_cancelled(client: OpenAI, hand: Farmhand) -> None:
    batch = batch_of(client, line("one"))
    draw_all(hand, hand.store.batch_jobs(hand.store.batches()[0].id))
    completed(client, batch.id)
    with pytest.raises(openai.ConflictError, match="completed"):
        client.batches.cancel(batch.id)


def test_a_size_that_is_too_small_is_told_once_with_its_sides(client: OpenAI, hand: Farmhand) -> None:
    batch_of(client, line("both", size="9x9"), line("one", size="64x9"))
    (batch,) = hand.store.batches()
    both, one = hand.store.rejections(batch.id)
    assert both.message == "size: width and height: Input should be greater than or equal to 64"
    assert one.message == "size: height: Input should be greater than or equal to 64"
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(prompt="a", size="10x10")  # type: ignore[call-overload]
    assert (refused.value.body["message"], refused.value.param) == (both.message, "size")  # type: ignore[index]


def test_a_batch_is_found_by_the_native_apis_id_too(client: OpenAI, hand: Farmhand) -> None:
    made = batch_of(client, line("one"))
    (batch,) = hand.store.batches()
    for name in (str(batch.id), batch.id.hex, f"batch_{batch.id}"):
        assert client.batches.retrieve(name).id == made.id
    assert list(client.batches.list(after=str(batch.id))) == []
    assert client.batches.cancel(str(batch.id)).status == "cancelled"


@pytest.mark.parametrize("name", [f"batch_{'0' * 32}", str(UUID(int=0)), "batch_1", f"batch-{'0' * 32}"])
def test_a_batch_that_is_not_there_is_told_by_the_id_that_was_given(client: OpenAI, name: str) -> None:
    for ask in (client.batches.retrieve, client.batches.cancel):
        with pytest.raises(openai.NotFoundError, match=f"no batch {name}$"):
            ask(name)


def test_batches_are_listed_from_the_newest_back_page_by_page(client: OpenAI) -> None:
    made = [batch_of(client, line("one")).id for _ in range(5)]
    assert [found.id for found in client.batches.list(limit=2)] == made[::-1]
    with pytest.raises(openai.NotFoundError):
        list(client.batches.list(after="batch_" + "0" * 32))


def test_the_same_key_makes_one_batch(client: OpenAI, hand: Farmhand) -> None:
    file = client.files.create(file=("a.jsonl", json.dumps(line("one")).encode()), purpose="batch")
    asked: dict[str, Any] = {"input_file_id": file.id, "endpoint": ENDPOINT, "completion_window": "24h"}
    first, second = (client.batches.create(**asked, extra_headers={"Idempotency-Key": "autumn"}) for _ in range(2))
    assert (first.id, len(hand.store.batches())) == (second.id, 1)


def test_what_a_batch_cannot_be_is_refused(client: OpenAI) -> None:
    file = client.files.create(file=("a.jsonl", b"{}"), purpose="batch")
    asked: dict[str, Any] = {"input_file_id": file.id, "endpoint": ENDPOINT, "completion_window": "24h"}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"metadata": {"k": "\x00"}}, "metadata.k"),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 3600}}, "output_expires_after"),
    ]
    for changes, param in wrong:
        with pytest.raises(openai.BadRequestError) as refused:
            client.batches.create(**asked | changes)
        assert refused.value.param == param


def test_another_tenant_sees_neither_batch_nor_file(client: OpenAI, api: httpx.Client, settings: Settings) -> None:
    batch = batch_of(client, line("one"))
    key = api.post("/api/v1/keys", json={"name": "other", "tenant": "other", "scopes": ["read", "submit"]}).json()
    with psycopg.connect(settings.require("database_url")) as connection:
        assert connection.execute("SELECT count(*) FROM files").fetchone() == (1,)
    stranger = client.with_options(api_key=key["key"])
    assert (list(stranger.batches.list()), list(stranger.files.list())) == ([], [])
    asks: list[Any] = [
        lambda: stranger.batches.retrieve(batch.id),
        lambda: stranger.batches.cancel(batch.id),
        lambda: stranger.files.retrieve(batch.input_file_id),
        lambda: stranger.files.content(batch.input_file_id),
        lambda: stranger.files.delete(batch.input_file_id),
        lambda: stranger.batches.create(
            input_file_id=batch.input_file_id, endpoint="/v1/images/generations", completion_window="24h"
        ),
    ]
    for ask in asks:
        with pytest.raises(openai.NotFoundError):
            ask()
    made = batch_of(stranger, line("own"))
    assert [found.id for found in stranger.batches.list()] == [made.id]
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="ovis_" + "0" * 38).models.list()
