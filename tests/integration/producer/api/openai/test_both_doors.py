"""Batches of both doors: what comes in by one is seen through the other, counted and named as it came in."""

import csv
import io
import json

import httpx
import pytest
from openai import OpenAI

from producer.jobs.contract import Rejection, Submission
from producer.jobs.errors import Unavailable
from producer.jobs.lines import Lines
from producer.jobs.postgres import Database
from tests.farm import Farmhand
from tests.integration.producer.api.openai.conftest import batch_of, line, read
from tests.integration.producer.api.openai.test_batches import completed, counts, draw_all, native_id


def test_jobs_are_counted_only_while_some_of_a_batchs_images_are_there_and_some_are_not(
    client: OpenAI, hand: Farmhand
) -> None:
    batch_of(client, line("three", n=3), line("two", n=2), line("one"))
    (batch,) = hand.store.batches()
    away, here = Lines(Database.at("postgresql://127.0.0.1:1/none")), Lines(hand.store.database)
    jobs = hand.store.batch_jobs(batch.id)
    assert away.counts([batch]) == here.counts([batch]) == {batch.id: (3, 0, 0)}
    draw_all(hand, jobs[1:4])
    hand.fail(jobs[4])
    amid = hand.store.batch(batch.id)
    assert here.counts([amid]) == {batch.id: (3, 0, 1)}
    with pytest.raises(Unavailable):
        away.counts([amid])
    draw_all(hand, [jobs[0], jobs[5]])
    assert here.counts([hand.store.batch(batch.id)]) == {batch.id: (3, 2, 1)}
    hand.store.retry_batch(batch.id)
    hand.succeed(hand.store.job(jobs[4].id))
    done = hand.store.batch(batch.id)
    assert away.counts([done]) == here.counts([done]) == {batch.id: (3, 3, 0)}


def test_a_batch_of_either_door_is_seen_through_the_other(client: OpenAI, api: httpx.Client, hand: Farmhand) -> None:
    rows = [{"prompt": "茶", "width": 80, "height": 64, "seed": 9}, {"prompt": "b", "format": "jpeg", "quality": 71}]
    native = api.post("/api/v1/batches", json={"name": "teas", "jobs": rows}).json()
    made = batch_of(client, line("one"), metadata={"for": "autumn"})
    seen = api.get(f"/api/v1/batches/{native_id(made.id)}").json()
    assert (seen["name"], seen["jobs"], seen["metadata"]) == ("lines.jsonl", 1, {"for": "autumn"})
    assert [found.id for found in client.batches.list(limit=1)] == [made.id, f"batch_{native['id'].replace('-', '')}"]

    found = client.batches.retrieve(f"batch_{native['id'].replace('-', '')}")
    jobs = hand.store.batch_jobs(native["id"])
    lines = read(client, found.input_file_id)
    assert [one["custom_id"] for one in lines] == [f"job-{job.id}" for job in jobs]
    again = client.batches.create(
        input_file_id=found.input_file_id, endpoint="/v1/images/generations", completion_window="24h"
    )
    same = hand.store.batch_jobs(hand.store.batches(1)[0].id)
    assert [job.request for job in same] == [job.request for job in jobs]
    assert again.input_file_id == found.input_file_id
    draw_all(hand, jobs)
    done = completed(client, found.id)
    assert [one["custom_id"] for one in read(client, done.output_file_id)] == [f"job-{job.id}" for job in jobs]


@pytest.mark.parametrize("column", ["sku", "custom_id"])
def test_each_job_of_a_manifests_row_is_a_line_of_its_own(
    client: OpenAI, api: httpx.Client, hand: Farmhand, column: str
) -> None:
    row = {column: "cup", "prompt": "a", "width": 64, "height": 64, "response_format": "b64_json"}
    asked = {"name": "cups", "vary": ["seed=1..4"], "partial": "true"}
    manifest = "\n".join(json.dumps(one) for one in (row, row | {"width": 1}, row))
    media_type = {"Content-Type": "application/x-ndjson"}
    native = api.post("/api/v1/batches", params=asked, content=manifest, headers=media_type).json()
    jobs = hand.store.batch_jobs(native["id"])
    assert [(job.line, job.request.seed) for job in jobs] == [(line, seed) for line in (1, 3) for seed in (1, 2, 3, 4)]
    good, bad = jobs[:3] + jobs[4:], jobs[3]
    hand.fail(bad, "out of memory", "exhausted")
    assert counts(client.batches.retrieve(native["id"])) == (9, 0, 2)
    draw_all(hand, good)

    found = completed(client, native["id"])
    assert counts(found) == (9, 7, 2)
    inputs, output = read(client, found.input_file_id), read(client, found.output_file_id)
    assert [one["custom_id"] for one in inputs] == [f"job-{job.id}" for job in jobs]
    assert [one["custom_id"] for one in output] == [f"job-{job.id}" for job in good]
    assert [[image["seed"] for image in one["response"]["body"]["data"]] for one in output] == [
        [job.request.seed] for job in good
    ]
    assert "url" in output[0]["response"]["body"]["data"][0]
    errors = [one["custom_id"] for one in read(client, found.error_file_id)]
    assert errors == [f"job-{bad.id}", "line-2"]


def test_rejected_rows_of_a_native_batch_are_in_its_error_file(client: OpenAI, hand: Farmhand) -> None:
    entries = [Submission(prompt="a"), Rejection(2, {"prompt": ""}, "empty", "says nothing", "prompt")]
    batch = hand.store.submit_batch("partial", entries, max_failures=1)
    draw_all(hand, hand.store.batch_jobs(batch.id))
    found = completed(client, f"batch_{batch.id.hex}")
    assert counts(found) == (2, 1, 1)
    (rejected,) = read(client, found.error_file_id)
    assert (rejected["custom_id"], rejected["response"]["body"]["error"]["message"]) == ("line-2", "says nothing")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_the_results_of_good_and_bad_lines_hold_what_their_bodies_held(
    client: OpenAI, api: httpx.Client, hand: Farmhand, kind: str
) -> None:
    wrong = {"prompt": "oai bad\x00", "size": "9x9", "custom_id": "other"}
    batch_of(client, line("good", prompt="oai good"), line("bad") | {"body": wrong})
    (batch,) = hand.store.batches()
    table = api.get(f"/api/v1/batches/{batch.id}/results", params={"format": kind}).content.decode("utf-8-sig")
    rows = csv.DictReader(io.StringIO(table)) if kind == "csv" else map(json.loads, table.splitlines())
    good, bad = rows
    assert (good["custom_id"], good["prompt"], good["size"]) == ("good", "oai good", "64x64")
    assert (bad["custom_id"], bad["prompt"], bad["size"]) == ("bad", "oai bad\ufffd", "9x9")
