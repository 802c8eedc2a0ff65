from uuid import uuid4

import httpx
import pytest

from pipeline.request import ImageFormat
from producer.jobs.errors import NotFound, SettingsError, Unavailable
from producer.jobs.settings import Settings
from producer.jobs.storage import Storage, object_key


def test_what_was_put_comes_back(storage: Storage) -> None:
    key = object_key(None, uuid4(), 1, ImageFormat.PNG)
    storage.put(key, b"\x00picture", "image/png")
    assert storage.get(key) == b"\x00picture"


def test_a_key_holds_batch_job_and_claim() -> None:
    batch, job = uuid4(), uuid4()
    assert object_key(batch, job, 3, ImageFormat.JPEG) == f"images/{batch}/{job}/3.jpg"
    assert object_key(None, job, 1, ImageFormat.WEBP) == f"images/single/{job}/1.webp"


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
    for ask in (away.ping, away.ensure_bucket, lambda: away.put("a", b"", "image/png")):
        with pytest.raises(Unavailable, match="S3"):
            ask()
    away.close()
