"""Images by OpenAI's package: waited for, streamed, refused, and what ends without one."""

import base64
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from producer.api import services
from producer.jobs.contract import Job, Priority
from producer.jobs.search import Search
from producer.jobs.settings import Settings
from tests.farm import Farmhand, serving
from tests.integration.producer.api.conftest import SlowBucket
from tests.waiting import until

WAITING = 45
"""Callers: more than there are threads."""


class Drawer(threading.Thread):
    """Ends the next jobs as it is told, while the caller waits."""

    def __init__(self, hand: Farmhand, jobs: int, how: str, before: int = 0) -> None:
        super().__init__()
        self.hand, self.count, self.how, self.before = hand, jobs, how, before
        self.seen: list[Job] = []
        self.start()

    def run(self) -> None:
        until(lambda: len(Search(self.hand.store.database).jobs().found) >= self.before + self.count)
        self.seen = Search(self.hand.store.database).jobs().found[: self.count]
        for job in self.seen:
            if self.how == "succeed":
                self.hand.succeed(job)
            elif self.how == "cancel":
                self.hand.store.cancel(job.id)
            else:
                self.hand.fail(job, "300 tokens: 246 at most", self.how)


def test_an_image_is_answered_when_its_job_has_ended(client: OpenAI, hand: Farmhand) -> None:
    drawer = Drawer(hand, 1, "succeed")
    answer = client.images.with_raw_response.generate(prompt="a", size="64x64", response_format="b64_json")
    drawer.join()
    (job,) = drawer.seen
    assert answer.headers["x-request-id"] == str(job.id)
    assert (job.priority, job.batch_id) == (Priority.INTERACTIVE, None)
    (image,) = answer.parse().data or []
    assert base64.b64decode(image.b64_json or "").startswith(b"\x89PNG")


def test_a_job_without_an_image_is_an_error_and_is_not_asked_for_again(client: OpenAI, hand: Farmhand) -> None:
    endings: list[tuple[str, type[openai.APIStatusError], str]] = [
        ("invalid_request", openai.BadRequestError, "300 tokens: 246 at most"),
        ("exhausted", openai.InternalServerError, "300 tokens: 246 at most"),
        ("cancel", openai.InternalServerError, "was cancelled"),
    ]
    for number, (how, error, words) in enumerate(endings, start=1):
        drawer = Drawer(hand, 2, how, before=2 * number - 2)
        with pytest.raises(error, match=words):
            client.images.generate(prompt="a", size="64x64", n=2)
        drawer.join()
        assert len(Search(hand.store.database).jobs().found) == 2 * number


def test_waiting_ends_at_its_limit_and_the_job_goes_on(client: OpenAI, hand: Farmhand) -> None:
    with pytest.raises(openai.InternalServerError) as late:
        client.images.generate(prompt="a", size="64x64")
    (job,) = Search(hand.store.database).jobs().found
    assert late.value.status_code == 504
    assert str(job.id) in late.value.message
    assert job.state == "queued"


def test_a_streamed_failure_is_an_error_of_the_package(client: OpenAI, hand: Farmhand) -> None:
    drawer = Drawer(hand, 1, "exhausted")
    stream = client.images.generate(prompt="a", size="64x64", stream=True)
    with pytest.raises(openai.APIError, match="246 at most"):
        list(stream)
    drawer.join()
    with pytest.raises(openai.APIError, match="not drawn within 2 s"):
        list(client.images.generate(prompt="a", size="64x64", stream=True))


def test_previews_are_streamed_as_partial_images(client: OpenAI, hand: Farmhand, settings: Settings) -> None:
    stream = client.images.generate(prompt="a", size="64x64", stream=True, partial_images=2)
    until(lambda: Search(hand.store.database).jobs().found)
    (job,) = Search(hand.store.database).jobs().found
    hand.storage.put("previews/first", b"first", "image/jpeg")
    with hand.store.database.begin() as connection:
        connection.exec_driver_sql("UPDATE jobs SET preview_key = 'previews/first'")
    first = next(stream)
    assert (first.type, base64.b64decode(first.b64_json)) == ("image_generation.partial_image", b"first")
    assert (first.output_format, first.partial_image_index) == ("jpeg", 0)
    hand.succeed(job)
    (last,) = list(stream)  # the preview is not sent again, though the job's state has changed
    assert last.type == "image_generation.completed"


REFUSED: list[tuple[dict[str, Any], str | None]] = [
    ({"prompt": "x" * 8_001}, "prompt"),
    ({"prompt": " "}, "prompt"),
    ({"n": 11}, "n"),
    ({"size": "1024"}, "size"),
    ({"size": "4096x64"}, "size"),
    ({"output_format": "gif"}, "output_format"),
    ({"output_compression": 50}, None),
    ({"partial_images": 1}, None),
    ({"quality": "best"}, "quality"),
    ({"style": "vivid"}, "style"),
    ({"background": "transparent"}, "background"),
    ({"extra_body": {"seed": -1}}, "seed"),
    ({"extra_body": {"num_inference_steps": 101}}, "num_inference_steps"),
    ({"extra_body": {"steps": 2}}, "steps"),
]


def test_what_cannot_be_drawn_is_refused_by_the_name_of_the_field(client: OpenAI, hand: Farmhand) -> None:
    for asked, param in REFUSED:
        with pytest.raises(openai.BadRequestError) as refused:
            client.images.generate(**{"prompt": "a"} | asked)
        assert (refused.value.param, refused.value.code) == (param, "invalid_value"), asked
    assert Search(hand.store.database).jobs().found == []


def test_no_rubbish_ends_in_an_error_of_the_server(api: httpx.Client) -> None:
    json_type = {"Content-Type": "application/json"}
    for body in (b"", b"{", b"[]", b"null", b'{"prompt": "\\ud800"}', b'{"n": NaN}', b'{"prompt": {}}', b"\xff"):
        answer = api.post("/v1/images/generations", content=body, headers=json_type)
        assert (answer.status_code, set(answer.json()["error"])) == (400, {"message", "type", "param", "code"}), body
    assert api.post("/v1/images/generations", content=b"{}").status_code == 400
    assert api.get("/v1/nothing").json()["error"]["type"] == "invalid_request_error"
    assert api.delete("/v1/models").status_code == 405


def test_what_else_openai_has_is_told_to_be_missing(client: OpenAI) -> None:
    asks: list[Callable[[], object]] = [
        lambda: client.images.edit(image=b"png", prompt="a"),
        lambda: client.post("/images/variations", cast_to=object),
        lambda: client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a"}]),
    ]
    for ask in asks:
        with pytest.raises(openai.NotFoundError, match="only images/generations is spoken"):
            ask()


def test_the_same_key_draws_once(client: OpenAI, hand: Farmhand) -> None:
    drawer = Drawer(hand, 1, "succeed")
    asked: dict[str, Any] = {"prompt": "a", "size": "64x64", "extra_headers": {"Idempotency-Key": "tea"}}
    first, second = client.images.generate(**asked), client.images.generate(**asked)
    drawer.join()
    assert len(Search(hand.store.database).jobs().found) == 1
    assert (first.data is not None, second.data is not None) == (True, True)
    with pytest.raises(openai.UnprocessableEntityError):
        client.images.generate(**asked | {"prompt": "b"})


def test_models_are_those_of_the_workers_that_were_seen(client: OpenAI, hand: Farmhand) -> None:
    assert client.models.list().data == []
    with pytest.raises(openai.NotFoundError) as unknown:
        client.images.generate(prompt="a", model="tiny")
    assert unknown.value.code == "model_not_found"
    hand.beat()
    hand.store.farewell(hand.id)
    (model,) = client.models.list().data
    assert (model.id, model.object, client.models.retrieve("tiny").id) == ("tiny", "model", "tiny")


def test_a_model_is_promised_only_while_there_is_no_other(client: OpenAI, hand: Farmhand, settings: Settings) -> None:
    asked: dict[str, Any] = {"prompt": "a", "size": "64x64"}
    hand.beat()
    with closing(Farmhand(settings)) as other:
        other.beat(model="other")
        assert [model.id for model in client.models.list()] == ["other", "tiny"]
        for name in ("tiny", "other"):
            with pytest.raises(openai.BadRequestError, match="cannot promise one: leave it out") as refused:
                client.images.generate(**asked, model=name)
            assert (refused.value.param, refused.value.code) == ("model", "invalid_value")
        with pytest.raises(openai.NotFoundError):
            client.images.generate(**asked, model="dall-e-2")
        assert Search(hand.store.database).jobs().found == []
        drawer = Drawer(hand, 1, "succeed")
        assert client.images.generate(**asked).data
        drawer.join()
        hand.beat()
        other.beat(model="other")
        other.store.farewell(other.id)  # it is the one that was seen last
    assert [model.id for model in client.models.list()] == ["tiny"]
    drawer = Drawer(hand, 1, "succeed", before=1)
    assert client.images.generate(**asked, model="tiny").data
    drawer.join()


def test_there_are_no_tokens_to_be_paid_for(client: OpenAI, hand: Farmhand) -> None:
    drawer = Drawer(hand, 1, "succeed")
    drawn = client.images.generate(prompt="a", size="64x64")
    drawer.join()
    assert drawn.usage is not None
    assert (drawn.usage.total_tokens, drawn.usage.input_tokens_details.text_tokens) == (0, 0)
    stream = client.images.generate(prompt="a", size="64x64", stream=True)
    drawer = Drawer(hand, 1, "succeed", before=1)
    (event,) = list(stream)
    drawer.join()
    assert event.type == "image_generation.completed"
    assert (event.usage.total_tokens, event.usage.input_tokens_details.image_tokens) == (0, 0)


@pytest.mark.parametrize("stream", [False, True])
def test_images_that_wait_for_the_bucket_leave_threads_to_small_requests(
    settings: Settings, hand: Farmhand, slow_bucket: SlowBucket, stream: bool
) -> None:
    body = {"prompt": "a", "size": "64x64", "response_format": "b64_json", "stream": stream}
    limits = httpx.Limits(max_connections=100)
    with (
        serving(settings) as url,
        httpx.Client(base_url=url, timeout=120, limits=limits) as callers,
        ThreadPoolExecutor(WAITING) as pool,
    ):
        try:
            answers = [pool.submit(callers.post, "/v1/images/generations", json=body) for _ in range(WAITING)]
            Drawer(hand, WAITING, "succeed").join()
            for _ in range(services.TRANSFER_PLACES):
                assert slow_bucket.asked.acquire(timeout=60)
            assert not slow_bucket.asked.acquire(timeout=0.5)
            assert callers.get("/v1/models", timeout=20).status_code == 200
        finally:
            slow_bucket.there.set()
        assert {answer.result().status_code for answer in answers} == {200}
