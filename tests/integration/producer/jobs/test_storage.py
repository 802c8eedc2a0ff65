import socket
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import httpx
import pytest
from botocore.awsrequest import AWSPreparedRequest

from pipeline.request import ImageFormat
from producer.jobs.errors import NotFound, SettingsError, Unavailable
from producer.jobs.settings import Settings
from producer.jobs.storage import Storage, checkpoint_key, object_key
from tests.canned_s3 import answering
from tests.waiting import until


def test_what_was_put_comes_back(storage: Storage) -> None:
    key = object_key(None, uuid4(), 1, ImageFormat.PNG)
    storage.put(key, b"\x00picture", "image/png")
    assert storage.get(key) == b"\x00picture"


def test_a_key_holds_batch_job_and_claim() -> None:
    batch, job = uuid4(), uuid4()
    assert object_key(batch, job, 3, ImageFormat.JPEG) == f"images/{batch}/{job}/3.jpg"
    assert object_key(None, job, 1, ImageFormat.WEBP) == f"images/single/{job}/1.webp"


def test_a_checkpoint_s_key_holds_job_claim_and_step() -> None:
    job = uuid4()
    assert checkpoint_key(job, 2, 40) == f"checkpoints/{job}/2-40.safetensors"


def test_keys_are_listed_by_their_beginning_a_page_at_a_time(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("producer.jobs.storage.PAGE", 3)
    keys = [f"images/{number}.png" for number in range(7)]
    for key in [*keys, "imagesque.png", "checkpoints/1"]:
        storage.put(key, b"", "image/png")
    assert list(storage.pages("images/")) == [keys[:3], keys[3:6], keys[6:]]
    assert list(storage.pages("nothing/")) == []


@pytest.mark.parametrize("name", ["a b+c&d.png", "春 <ü>.png", "100%.png", "quo\"te'.png"])
def test_a_strange_key_is_listed_and_removed_as_it_is(storage: Storage, name: str) -> None:
    storage.put(f"images/{name}", b"picture", "image/png")
    assert list(storage.pages("images/")) == [[f"images/{name}"]]
    storage.delete([f"images/{name}"])
    assert list(storage.pages("")) == []


def test_what_is_deleted_is_gone_and_all_else_stays(storage: Storage) -> None:
    for key in "abc":
        storage.put(key, b"picture", "image/png")
    storage.delete(["a", "c", "never there"])
    storage.delete(["a"])
    storage.delete([])
    assert list(storage.pages("")) == [["b"]]
    with pytest.raises(NotFound):
        storage.get("a")


def test_an_upload_whose_sender_died_half_way_leaves_no_half_object(storage: Storage) -> None:
    class Died(Exception):
        pass

    sent: list[AWSPreparedRequest] = []

    def die(request: AWSPreparedRequest, **_event: Any) -> None:
        sent.append(request)
        raise Died

    storage._client.meta.events.register("before-send.s3.PutObject", die)
    with pytest.raises(Died):
        storage.put("a.png", b"x" * 100_000, "image/png")
    _send_half(sent[0])
    storage.ping()  # the server has come past it
    with pytest.raises(NotFound):
        storage.get("a.png")


def _send_half(request: AWSPreparedRequest) -> None:
    """The request as botocore signed it, with half of its body; then hang up, and wait until the server has too."""
    to = urlsplit(request.url)
    headers = {name: value.decode() if isinstance(value, bytes) else value for name, value in request.headers.items()}
    lines = [f"PUT {to.path} HTTP/1.1", f"Host: {to.netloc}", *(f"{name}: {value}" for name, value in headers.items())]
    with socket.create_connection((to.hostname or "", to.port or 0)) as connection:
        connection.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + b"x" * 50_000)
        connection.shutdown(socket.SHUT_WR)
        until(lambda: not connection.recv(1 << 16))


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\npict",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\npict\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nrubbish\r\n",
        b"HTTP/1.1 200 OK\r\n\r\npict",
        b"HTTP/1.1 2",
        b"rubbish\r\n\r\n",
        b"",
    ],
)
def test_an_answer_that_breaks_off_is_unavailable_and_never_half_an_object(settings: Settings, answer: bytes) -> None:
    with answering(answer) as url:
        storage = Storage(settings.model_copy(update={"s3_endpoint_url": url}))
        with pytest.raises(Unavailable, match="S3"):
            storage.get("a.png")
        storage.close()


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 2",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 100\r\n\r\n<Error>",
        b"HTTP/1.1 400 Bad Request\r\nContent-Length: 43\r\n\r\n<Error><Code>BadDigest</Code></Error>       ",
    ],
)
def test_an_upload_without_a_whole_answer_is_unavailable(settings: Settings, answer: bytes) -> None:
    with answering(answer) as url:
        storage = Storage(settings.model_copy(update={"s3_endpoint_url": url}))
        with pytest.raises(Unavailable, match="S3"):
            storage.put("a.png", b"picture", "image/png")
        storage.close()


def test_a_deletion_of_which_the_server_left_something_is_unavailable(settings: Settings) -> None:
    body = b"<DeleteResult><Error><Key>a</Key><Code>InternalError</Code></Error></DeleteResult>"
    with answering(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)) as url:
        storage = Storage(settings.model_copy(update={"s3_endpoint_url": url}))
        with pytest.raises(Unavailable, match="InternalError on DeleteObjects of a"):
            storage.delete(["a", "b"])
        storage.close()


def test_a_link_opens_without_keys_and_a_changed_one_does_not(storage: Storage) -> None:
    storage.put("a.png", b"picture", "image/png")
    link = storage.link("a.png", 'ban"ner 春.png')
    answer = httpx.get(link)
    assert (answer.content, answer.headers["content-type"]) == (b"picture", "image/png")
    assert "ban'ner" in answer.headers["content-disposition"]
    assert httpx.get(link.replace("a.png", "b.png")).status_code in {403, 404}
    assert httpx.get(link.partition("?")[0]).status_code == 403


def test_an_object_that_is_not_there_is_not_found(storage: Storage) -> None:
    with pytest.raises(NotFound):
        storage.get("nothing")


def test_a_bucket_is_made_once_and_found_again(storage: Storage) -> None:
    storage.ensure_bucket()
    storage.ping()


def test_keys_that_the_server_refuses_say_which_settings_to_check(settings: Settings) -> None:
    wrong = Storage(settings.model_copy(update={"s3_secret_access_key": settings.s3_access_key_id}))
    with pytest.raises(SettingsError, match="OVIS_S3_SECRET_ACCESS_KEY"):
        wrong.ensure_bucket()
    wrong.close()


def test_a_server_that_is_away_is_unavailable(settings: Settings) -> None:
    away = Storage(settings.model_copy(update={"s3_endpoint_url": "http://127.0.0.1:1"}))
    for ask in (away.ping, away.ensure_bucket, lambda: away.put("a", b"", "image/png"), lambda: away.delete(["a"])):
        with pytest.raises(Unavailable, match="S3"):
            ask()
    away.close()
