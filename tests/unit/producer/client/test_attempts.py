"""When a question is asked again, what a lost answer means, and how long a key at work is waited for."""

from collections.abc import Iterator

import httpx
import pytest

from producer.client import Client, NotFound, Overloaded, Refused
from producer.client import attempts as attempts_module
from producer.client._sync import transport
from producer.client.attempts import AT_WORK, Attempts

BATCH = "00000000-0000-0000-0000-000000000001"
NOT_FOUND = httpx.Response(404, json={"type": "t", "title": "no", "status": 404, "detail": "no", "instance": "/"})


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(attempts_module, "time", clock)
    return clock


def client_that_hears(answers: Iterator[httpx.Response | httpx.HTTPError], heard: list[httpx.Request]) -> Client:
    def answer(request: httpx.Request) -> httpx.Response:
        heard.append(request)
        given = next(answers)
        if isinstance(given, httpx.HTTPError):
            raise given
        return given

    client = Client("http://farm")
    client._http.close()
    client._http = httpx.Client(base_url="http://farm/api/v1/", transport=httpx.MockTransport(answer))
    return client


@pytest.mark.parametrize("lost", [httpx.ReadTimeout("late"), httpx.Response(502)])
@pytest.mark.parametrize("delete", [Client.delete_batch, Client.delete_webhook])
def test_what_is_gone_when_it_is_deleted_again_was_deleted(
    lost: httpx.Response | httpx.HTTPError, delete: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "pause", lambda seconds: None)
    heard: list[httpx.Request] = []
    with client_that_hears(iter([lost, NOT_FOUND]), heard) as client:
        delete(client, BATCH)  # type: ignore[operator]
    assert [request.method for request in heard] == ["DELETE", "DELETE"]


@pytest.mark.parametrize("before", [[], [httpx.ConnectError("refused")]])
def test_what_was_never_there_is_not_found(before: list[httpx.HTTPError], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "pause", lambda seconds: None)
    with client_that_hears(iter([*before, NOT_FOUND]), []) as client, pytest.raises(NotFound):
        client.delete_batch(BATCH)


def test_what_changes_a_whole_batch_is_waited_for_as_long_as_a_submission() -> None:
    batch = httpx.Response(404)
    for change in (Client.cancel_batch, Client.retry_batch, lambda client, id: client.prioritise(id, "bulk")):
        heard: list[httpx.Request] = []
        with client_that_hears(iter([batch]), heard) as client, pytest.raises(NotFound):
            change(client, BATCH)
        assert heard[0].extensions["timeout"]["read"] == 900
        assert heard[0].extensions["timeout"]["connect"] == 30


def test_a_key_at_work_is_waited_for_from_the_first_time_that_it_is(clock: Clock) -> None:
    problem = {"type": AT_WORK, "title": "t", "status": 409, "detail": "d", "instance": "/"}
    at_work = httpx.Response(409, json=problem, headers={"Retry-After": "1"})
    attempts = Attempts("http://farm", 30)
    clock.now += 40
    attempts.lost(httpx.ReadTimeout("late"))
    assert attempts.refused(at_work) == 1
    clock.now += 29
    assert attempts.refused(at_work) == 1
    clock.now += 2
    with pytest.raises(Refused):
        attempts.refused(at_work)


@pytest.mark.parametrize(("lost", "perhaps"), [(httpx.ReadTimeout("late"), True), (httpx.ConnectError("no"), False)])
def test_a_limit_behind_a_lost_answer_says_that_it_may_be_done(lost: httpx.HTTPError, perhaps: bool) -> None:
    attempts = Attempts("http://farm", 30)
    attempts.lost(lost)
    with pytest.raises(Overloaded) as limited:
        attempts.refused(httpx.Response(429, headers={"Retry-After": "60"}, request=httpx.Request("POST", "http://f")))
    assert (limited.value.perhaps_done, limited.value.retry_after_s) == (perhaps, 60)


def test_what_is_wrong_with_the_whole_is_told_without_an_empty_fields_name() -> None:
    fault = {"field": "", "message": "holds no rows"}
    problem = {"type": "t", "title": "no", "status": 422, "detail": "no", "instance": "/", "errors": [fault]}
    refusals = iter([httpx.Response(422, json=problem)])
    with client_that_hears(refusals, []) as client, pytest.raises(Refused) as refused:
        client.submit_many("b", [])
    assert str(refused.value) == "no (422): holds no rows"
