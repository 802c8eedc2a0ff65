"""Files by OpenAI's package: uploaded, listed, read, deleted, refused."""

import io
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from producer.jobs.settings import Settings
from producer.jobs.storage import Storage
from tests.farm import Farmhand
from tests.integration.producer.api.openai.conftest import batch_of, line
from tests.integration.producer.api.openai.test_batches import completed

FORM = {"Content-Type": "multipart/form-data; boundary=cut"}


def test_a_file_comes_back_as_it_was_and_goes_when_it_is_deleted(client: OpenAI, hand: Farmhand) -> None:
    body = b"\x00\xff any bytes\n" * 100_000
    file = client.files.create(file=("sw\u00e4n\u2028.jsonl", io.BytesIO(body)), purpose="batch")
    assert (file.bytes, file.filename, file.status) == (len(body), "swän_.jsonl", "processed")
    assert client.files.content(file.id).content == body
    assert client.files.retrieve(file.id) == file
    (keys,) = hand.storage.pages("files/default/")
    assert client.files.delete(file.id).deleted
    for ask in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            ask(file.id)
    ((_, prefixes),) = hand.store.deletions(after_s=-60)
    assert prefixes == keys


def test_what_a_crash_left_of_an_upload_is_to_be_deleted(
    api: httpx.Client, hand: Farmhand, monkeypatch: pytest.MonkeyPatch
) -> None:
    def died(*_: Any, **__: Any) -> None:
        raise RuntimeError("the process died here")

    monkeypatch.setattr("producer.jobs.files.Files.add", died)
    upload = {"files": {"file": ("a", b"{}")}, "data": {"purpose": "batch"}}
    assert api.post("/v1/files", **upload).status_code == 500
    (keys,) = hand.storage.pages("files/default/")
    ((_, prefixes),) = hand.store.deletions(after_s=-60)
    assert prefixes == keys
    monkeypatch.undo()
    assert api.post("/v1/files", **upload).status_code == 200
    assert len(hand.store.deletions(after_s=-60)) == 1


def test_files_are_listed_in_pages_from_either_end(client: OpenAI) -> None:
    made = [client.files.create(file=(f"{n}.jsonl", b"{}"), purpose="batch").id for n in range(5)]
    assert [file.id for file in client.files.list(limit=2)] == made[::-1]
    assert [file.id for file in client.files.list(limit=2, order="asc")] == made
    assert list(client.files.list(purpose="vision")) == []
    with pytest.raises(openai.BadRequestError, match="purpose"):
        client.files.list(purpose="\x00")


def test_ids_that_are_none_are_not_found(client: OpenAI) -> None:
    for file_id in ("file-1", "x", "file-" + "0" * 32, "file-" + "0" * 32 + "-output", "file-" + "0" * 32 + "-more"):
        for ask in (client.files.retrieve, client.files.content, client.files.delete):
            with pytest.raises(openai.NotFoundError, match=f"no file {file_id}$"):
                ask(file_id)
        with pytest.raises(openai.NotFoundError, match=f"no file {file_id}$"):
            client.files.list(after=file_id)
    for part in ("", "-input"):
        missing = f"file-{'0' * 32}{part}"
        with pytest.raises(openai.NotFoundError, match=f"no file {missing}$"):
            client.batches.create(input_file_id=missing, endpoint="/v1/images/generations", completion_window="24h")


def test_a_form_that_says_too_little_or_too_much_is_refused(api: httpx.Client) -> None:
    purpose, file = (None, "batch"), ("a", b"{}")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"purpose": purpose}, "file"),
        ({"purpose": purpose, "file": (None, "{}")}, "file"),
        ({"purpose": purpose, "file": ("a", b"")}, "file"),
        ({"file": file}, "purpose"),
        ({"file": file, "purpose": purpose, "expires_after[seconds]": (None, "60")}, "expires_after[seconds]"),
    ]
    for files, param in wrong:
        answer = api.post("/v1/files", files=files)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_what_is_no_form_is_refused(api: httpx.Client) -> None:
    wrong: list[tuple[dict[str, str], bytes]] = [
        ({"Content-Type": "application/json"}, b"{}"),
        ({"Content-Type": "multipart/form-data"}, b"{}"),
        (FORM, b"rubbish"),
        (FORM, b'--cut\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n{}'),
        (FORM, b"--cut\r\nContent-Disposition: form-data\r\n\r\n{}\r\n--cut--"),
        ({}, b""),
    ]
    for headers, body in wrong:
        answer = api.post("/v1/files", headers=headers, content=body)
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error"), body


def test_a_file_beyond_the_limit_is_refused_while_it_is_read(
    api: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("producer.api.openai.files.FILE_MAX_BYTES", 1000)
    monkeypatch.setattr("producer.api.openai.files.OVERHEAD_BYTES", 500)
    for size_bytes in (1001, 10_000_000):
        answer = api.post("/v1/files", files={"file": ("a", b"x" * size_bytes)}, data={"purpose": "batch"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")
    assert api.post("/v1/files", files={"file": ("a", b"x" * 1000)}, data={"purpose": "batch"}).status_code == 200


@pytest.mark.parametrize("delivery", ["b64_json", "url"])
def test_an_outputs_length_is_known_without_its_images(
    client: OpenAI, api: httpx.Client, hand: Farmhand, delivery: str
) -> None:
    batch = batch_of(client, line("two", n=2, response_format=delivery), line("one", response_format=delivery))
    for job in hand.store.batch_jobs(hand.store.batches()[0].id):
        hand.succeed(job)
    output = completed(client, batch.id).output_file_id
    assert output is not None
    said = client.files.retrieve(output).bytes
    content = api.get(f"/v1/files/{output}/content")
    assert said == len(content.content) > 0
    assert content.headers["content-type"] == "application/jsonl"


def test_what_goes_wrong_before_the_first_piece_is_no_half_file(
    client: OpenAI, api: httpx.Client, hand: Farmhand
) -> None:
    batch = batch_of(client, line("one", response_format="b64_json"))
    (job,) = hand.store.batch_jobs(hand.store.batches()[0].id)
    hand.succeed(job)
    output = completed(client, batch.id).output_file_id
    key = hand.store.job(job.id).object_key
    assert key is not None
    hand.storage.delete([key])
    refused = api.get(f"/v1/files/{output}/content")
    assert refused.status_code == 404
    assert "error" in refused.json()


def test_an_object_is_read_piece_by_piece_and_one_that_is_gone_is_missed_at_once(
    settings: Settings, storage: Storage
) -> None:
    body = bytes(range(256)) * 4_000
    storage.put_file("files/a", io.BytesIO(body), "application/jsonl")
    pieces = list(storage.pieces("files/a"))
    assert (b"".join(pieces), len(pieces) > 1) == (body, True)
    with pytest.raises(Exception, match="no object files/b"):
        storage.pieces("files/b")
