"""The client against the real API: what somebody else's Python does with a farm."""

import asyncio
import functools
import hashlib
import http.server
import io
import json
import os
import threading
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

import httpx
import pytest

from pipeline.request import ImageRequest
from producer import client as farm_client
from producer.client import (
    AsyncClient,
    Client,
    Corrupt,
    Forbidden,
    NotDone,
    NotFound,
    Overloaded,
    Refused,
    ServerError,
    Unauthorized,
    Unreachable,
    attempts,
)
from producer.client._async import transport as awaited
from producer.client._sync import transport as waited_for
from producer.jobs.contract import Scope
from producer.jobs.keys import Keys
from producer.jobs.settings import Settings
from producer.jobs.store import Store
from tests.cut_connections import cutting
from tests.farm import Farmhand, free_port, serving

SMALL = {"prompt": "a paper boat", "width": 64, "height": 64}


class AsyncClientInALoop:
    """An ``AsyncClient`` as these tests drive a ``Client``: whatever it awaits runs in an event loop of its own."""

    def __init__(self, *words: str, **options: Any) -> None:
        self._runner = asyncio.Runner()
        self._client = AsyncClient(*words, **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.run(self._client.aclose())
        self._runner.close()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._client, name)
        return functools.partial(self._call, found) if callable(found) else found

    def _call(self, method: Callable[..., Any], *words: Any, **options: Any) -> Any:
        result = method(*words, **options)
        if isinstance(result, AsyncIterator):
            return self._items(result)
        return self._runner.run(result)

    def _items(self, items: AsyncIterator[Any]) -> Iterator[Any]:
        async def following() -> Any:
            return await anext(items, None)

        while (item := self._runner.run(following())) is not None:
            yield item


Connect = Callable[..., Any]


@pytest.fixture(params=[Client, AsyncClientInALoop], ids=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Connect:
    """Makes the client under test: there are two, of one code path."""
    made: Connect = request.param
    return made


@pytest.fixture
def farm(settings: Settings, connect: Connect) -> Iterator[Client]:
    with serving(settings) as url, connect(url) as client:
        yield client


@pytest.fixture
def hand(settings: Settings) -> Iterator[Farmhand]:
    farmhand = Farmhand(settings)
    yield farmhand
    farmhand.close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between attempts, not waited, at their longest."""
    waits: list[float] = []

    async def pause(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(waited_for, "pause", waits.append)
    monkeypatch.setattr(awaited, "pause_async", pause)
    monkeypatch.setattr(attempts.random, "uniform", lambda _, longest: longest)
    return waits


def test_a_batch_goes_in_is_waited_for_and_comes_back_as_images(farm: Client, hand: Farmhand) -> None:
    rows: list[Any] = [SMALL | {"name": "first"}, ImageRequest(prompt="茶", width=80, height=64)]
    batch = farm.submit_many("boats", rows)
    assert (batch.jobs, batch.counts["queued"], batch.done) == (2, 2, False)
    looks: list[int] = []

    def work(seen: farm_client.Batch) -> None:
        looks.append(seen.finished)
        if not seen.done:
            hand.succeed(hand.store.batch_jobs(batch.id, state=None)[seen.finished])

    done = farm.wait(batch, poll_s=0.01, timeout_s=30, progress=work)
    assert (done.done, looks) == (True, [0, 1, 2])
    jobs = list(farm.batch_jobs(done))
    assert [job.file_name for job in jobs] == ["first.png", "000002.png"]
    for job in jobs:
        assert farm.download(job).startswith(b"\x89PNG")
    assert [found.id for found in farm.batches()] == [batch.id]


def test_a_batch_goes_in_and_what_is_not_drawn_yet_is_cancelled(farm: Client, hand: Farmhand) -> None:
    batch = farm.submit_many("boats", [SMALL, SMALL, SMALL])
    hand.succeed(hand.store.batch_jobs(batch.id)[0])
    assert farm.cancel_batch(batch).counts == batch.counts | {"queued": 0, "cancelled": 2, "succeeded": 1}


def test_one_job_goes_in_and_is_cancelled(farm: Client) -> None:
    job = farm.submit(ImageRequest(**SMALL), name="boat", priority="interactive")
    assert (job.name, job.priority, job.done) == ("boat", "interactive", False)
    assert farm.cancel(job).state == "cancelled"
    assert farm.wait(job).done
    assert farm.farm().counts["cancelled"] == 1


def test_previews_are_asked_for_and_their_place_is_told_while_the_job_is_drawn(farm: Client, hand: Farmhand) -> None:
    plain, shown = farm.submit(SMALL), farm.submit(SMALL, previews=2)
    claims = {job.id: hand.claim(hand.store.job(job.id)) for job in (plain, shown)}
    assert [claims[job.id].previews for job in (plain, shown)] == [0, 2]
    hand.store.note_preview(claims[shown.id], "previews/1")
    assert farm.job(shown).preview_url == f"/api/v1/jobs/{shown.id}/preview"
    with pytest.raises(Refused, match="previews"):
        farm.submit(SMALL, previews=4)
    batch = farm.submit_many("shown", [SMALL] * 2, previews=3)
    assert [hand.claim(job).previews for job in hand.store.batch_jobs(batch.id)] == [3, 3]


def test_pages_are_one_sequence(farm: Client) -> None:
    batch = farm.submit_many("many", ({**SMALL, "seed": seed} for seed in range(25)))
    assert [job.request["seed"] for job in farm.batch_jobs(batch, page=10)] == list(range(25))
    assert len({job.id for job in farm.jobs(page=7)}) == 25
    assert list(farm.jobs(state="failed")) == []


def test_a_refusal_names_the_fields(farm: Client) -> None:
    with pytest.raises(Refused, match="width") as refused:
        farm.submit(SMALL, width=0)
    assert [fault.field for fault in refused.value.problem.errors or []] == ["width"]
    with pytest.raises(Refused, match="line 3, column 'steps'") as refused:
        farm.submit_many("b", [SMALL, SMALL, SMALL | {"steps": 0}])
    assert [fault.line for fault in refused.value.problem.errors or []] == [3]
    with pytest.raises(Refused, match="surrogate"):
        farm.submit({"prompt": "\ud800"})
    assert list(farm.batches()) == []


def test_what_the_rows_raise_passes_on_and_submits_nothing(farm: Client) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield SMALL
        raise LookupError("row 2")

    with pytest.raises(LookupError, match="row 2"):
        farm.submit_many("b", rows())
    assert list(farm.batches()) == []


def test_an_unknown_job_is_not_found(farm: Client) -> None:
    with pytest.raises(NotFound):
        farm.job(uuid4())
    with pytest.raises(NotFound):
        list(farm.batch_jobs(uuid4()))


def test_an_image_that_is_not_there_yet_is_refused_with_the_state(farm: Client) -> None:
    job = farm.submit(SMALL)
    with pytest.raises(Refused) as refused:
        farm.download(job)
    assert refused.value.problem.state == "queued"


def test_an_image_that_is_not_the_recorded_one_is_not_handed_out(farm: Client, hand: Farmhand) -> None:
    job = farm.submit(SMALL)
    hand.succeed(hand.store.job(job.id))
    done = farm.job(job)
    assert done.object_key is not None
    hand.storage.put(done.object_key, b"something else", "image/png")
    with pytest.raises(Corrupt):
        farm.download(done)


def test_waiting_ends_at_its_limit_and_leaves_the_job_in_peace(farm: Client) -> None:
    job = farm.submit(SMALL)
    with pytest.raises(NotDone) as ended:
        farm.wait(job, poll_s=0.01, timeout_s=0.05)
    assert ended.value.last.id == job.id
    assert farm.job(job).state == "queued"


def test_the_clients_models_have_exactly_the_fields_of_the_api(farm: Client) -> None:
    schemas = httpx.get(f"{farm.base_url}/openapi.json").json()["components"]["schemas"]
    same = ("Job", "Batch", "Tenant", "Worker", "Farm", "Problem", "Fault", "Rejection", "ClaimRecord", "Estimate")
    more = {"Delivery": "Delivery", "NamedSize": "NamedSize", "Preview": "Preview", "Key": "NewKey"}
    for ours, theirs in {**dict.fromkeys(same), **more, "Webhook": "NewWebhook"}.items():
        model = getattr(farm_client, ours)
        assert set(model.model_fields) == set(schemas[theirs or ours]["properties"]), ours


def test_a_farm_that_is_away_is_said_after_a_few_attempts(connect: Connect, quick: list[float]) -> None:
    with connect(f"http://127.0.0.1:{free_port()}") as client:
        for ask in (client.farm, lambda: client.submit(SMALL)):
            with pytest.raises(Unreachable) as away:
                ask()
            assert not away.value.heard
    assert quick == [0.25, 0.5, 1.0, 2.0] * 2


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_everything_is_asked_again_while_the_farm_is_unavailable(
    connect: Connect, status: int, quick: list[float]
) -> None:
    asked: list[Asked] = []

    def answer(one: Asked) -> Answer:
        asked.append(one)
        problem = {"type": "about:blank", "title": "away", "status": status, "detail": "Postgres"}
        return (200, {}, {"batches": [], "next": None}) if len(asked) == 3 else (status, {"Retry-After": "2"}, problem)

    with answering(answer) as url, connect(url) as client:
        assert list(client.batches()) == []
        assert quick == [2.25, 2.5]
        with pytest.raises((ServerError, Refused)) as away:
            client.submit_many("boats", [SMALL])
    assert away.value.problem.status == status
    assert [one.method for one in asked] == ["GET"] * 3 + ["POST"] * 5
    assert len({(one.key, one.body) for one in asked[3:]}) == 1
    assert asked[3].key
    assert json.loads(asked[3].body) == SMALL


def test_a_farm_that_wants_to_be_left_alone_for_long_is(connect: Connect, quick: list[float]) -> None:
    problem = {"type": "about:blank", "title": "full", "status": 503, "detail": "come back tomorrow"}
    full = answering(lambda _: (503, {"Retry-After": "3600"}, problem))
    with full as url, connect(url) as client, pytest.raises(ServerError) as away:
        client.submit(SMALL)
    assert (away.value.retry_after_s, quick) == (3600, [])


def test_an_answer_that_is_lost_on_its_way_costs_nothing_and_submits_once(connect: Connect, farm: Client) -> None:
    """The proxy cuts each connection when the commit is done and the answer begins to come."""
    with cutting(farm.base_url, cuts=2) as proxy, connect(proxy.url) as client:
        batch = client.submit_many("boats", ({**SMALL, "seed": seed} for seed in range(5_000)))
        assert proxy.left == 0
    assert [found.id for found in farm.batches()] == [batch.id]
    assert (batch.jobs, farm.farm().counts["queued"]) == (5_000, 5_000)
    with cutting(farm.base_url, cuts=1) as proxy, connect(proxy.url) as client:
        job = client.submit(SMALL)
        assert proxy.left == 0
    assert farm.job(job).request == job.request
    assert farm.farm().counts["queued"] == 5_001


def test_whoever_lost_the_connection_for_good_asks_again_with_the_key(
    connect: Connect, farm: Client, quick: list[float]
) -> None:
    with cutting(farm.base_url, cuts=99) as proxy, connect(proxy.url) as client, pytest.raises(Unreachable) as lost:
        client.submit_many("boats", [SMALL, SMALL], key="autumn")
    assert lost.value.heard
    (batch,) = farm.batches()
    assert farm.submit_many("boats", [SMALL, SMALL], key="autumn").id == batch.id
    with pytest.raises(Refused, match="Idempotency-Key"):
        farm.submit_many("boats", [SMALL], key="autumn")
    assert len(list(farm.batches())) == 1
    for key in ("秋", ""):
        with pytest.raises(Refused, match="Idempotency-Key: must be 1 to 255 visible ASCII"):
            farm.submit(SMALL, key=key)


def test_a_batch_and_a_job_are_a_tenants(farm: Client) -> None:
    batch = farm.submit_many("boats", [SMALL], tenant="acme", weight=2)
    assert (batch.tenant, batch.weight) == ("acme", 2)
    assert [farm.submit(SMALL, **whose).tenant for whose in ({}, {"tenant": "acme"})] == ["default", "acme"]
    assert farm.set_tenant("acme", weight=3).weight == 3
    assert [(tenant.name, tenant.weight) for tenant in farm.tenants()] == [("acme", 3)]
    with pytest.raises(Refused, match="tenant"):
        farm.submit(SMALL, tenant="a b")
    with pytest.raises(Refused, match="weight"):
        farm.set_tenant("acme", weight=0)


def test_a_manifest_goes_in_with_its_options_from_a_path_a_file_and_a_pipe(farm: Client, tmp_path: Path) -> None:
    path = tmp_path / "boats.csv"
    path.write_text("what,sku\ntea,1\ncoffee,\n")
    options: Any = {
        "template": "a {what} boat",
        "vary": ["seed=1..2"],
        "default": {"width": 64, "height": 64},
        "file_name": "{sku}_{seed}",
        "partial": True,
    }
    preview = farm.preview_manifest(path, **options)
    assert (preview.jobs, preview.rejected, preview.rows[0]["prompt"]) == (2, 1, "a tea boat")
    assert [fault.line for fault in preview.problems] == [3]
    assert list(farm.batches()) == []
    with path.open("rb") as file:
        assert file.readline() == b"what,sku\n", "what is before the place that it stands at is not sent"
        with pytest.raises(Refused, match="what"):
            farm.submit_manifest(file, **options)
    batch = farm.submit_manifest(path, weight=2, **options)
    assert (batch.name, batch.weight, batch.jobs, batch.rejected) == ("boats", 2, 2, 1)
    assert [job.name for job in farm.batch_jobs(batch)] == ["1_1", "1_2"]
    assert [(line.line, line.source["what"]) for line in farm.rejections(batch, page=1)] == [(3, "coffee")]
    reading, writing = os.pipe()
    with open(reading, "rb") as pipe, open(writing, "wb") as end:  # noqa: PTH123  # they have no path
        end.write(json.dumps(SMALL).encode())
        end.close()
        assert farm.submit_manifest(pipe, kind="jsonl", name="piped").jobs == 1
    with pytest.raises(ValueError, match="csv, jsonl"):
        farm.submit_manifest(io.BytesIO(b"prompt\na boat\n"))


def test_a_manifest_is_sent_again_when_the_connection_breaks_and_submits_once(
    connect: Connect, farm: Client, tmp_path: Path
) -> None:
    path = tmp_path / "boats.csv"
    path.write_text("prompt,width,height\n" + "a boat,64,64\n" * 5_000)
    with cutting(farm.base_url, cuts=2) as proxy, connect(proxy.url) as client:
        assert client.submit_manifest(path).jobs == 5_000
        assert proxy.left == 0
    assert len(list(farm.batches())) == 1


def test_a_batch_is_steered_and_what_came_of_it_is_written_to_files(
    farm: Client, hand: Farmhand, tmp_path: Path
) -> None:
    batch = farm.submit_many("boats", [SMALL, SMALL, SMALL])
    assert farm.pause(batch).paused
    assert not farm.resume(batch).paused
    assert farm.prioritise(batch, "interactive").id == batch.id
    one, two, three = farm.batch_jobs(batch)
    assert {one.priority, two.priority, three.priority} == {"interactive"}
    hand.succeed(hand.store.job(one.id))
    hand.fail(hand.store.job(two.id))
    farm.cancel(three)
    assert farm.history(one)[-1].outcome == "succeeded"
    assert [job.id for job in farm.jobs(batch=batch, state="failed")] == [two.id]
    table, images = tmp_path / "results.csv", tmp_path / "images.zip"
    farm.write_results(batch, table)
    farm.write_images(batch, images)
    assert table.read_text("utf-8-sig").count("\n") == 4
    with zipfile.ZipFile(images) as archive:
        assert sorted(archive.namelist()) == ["000001.png", "results.csv"]
        assert hashlib.sha256(archive.read("000001.png")).hexdigest() == farm.job(one).sha256
    assert farm.retry(three).state == "queued"
    assert farm.retry_batch(batch).counts["queued"] == 2
    farm.cancel_batch(batch)
    farm.delete_batch(batch)
    with pytest.raises(NotFound):
        farm.write_results(batch, tmp_path / "gone.csv")
    assert {path.name for path in tmp_path.iterdir()} == {"results.csv", "images.zip"}


def test_a_stream_tells_what_happens_until_the_end_and_goes_on_where_it_was_cut(
    connect: Connect, farm: Client, hand: Farmhand
) -> None:
    batch = farm.submit_many("boats", [SMALL, SMALL])
    one, two = farm.batch_jobs(batch)
    told = []
    with cutting(farm.base_url, cuts=1) as proxy, connect(proxy.url) as client:
        hand.succeed(hand.store.job(one.id))
        for event in client.stream(batch):
            told.append(event)
            if (event.kind, event.job_id) == ("job.succeeded", one.id):
                hand.succeed(hand.store.job(two.id))
        assert proxy.left == 0
    # On a slow machine the hand loses a claim and takes the job again: then it is told, too.
    told = [event for event in told if event.kind != "job.progress"]
    assert len({event.id for event in told}) == len(told), "nothing is told twice"
    assert (told[0].kind, told[0].job_id) == ("job.running", one.id)
    ends = [(event.kind, event.job_id) for event in told if event.kind not in {"job.running", "job.queued"}]
    assert ends == [("job.succeeded", one.id), ("job.succeeded", two.id), ("batch.finished", None)]
    assert {event.job_id for event in farm.stream(two)} == {two.id}


def test_who_has_no_key_or_the_wrong_one_is_told_which(connect: Connect, settings: Settings) -> None:
    store = Store.at(settings.require("database_url"))
    _, master = Keys(store.database).create("default", "master", {Scope.ADMIN})
    store.close()
    with serving(settings.model_copy(update={"require_keys": True})) as url:
        with connect(url) as stranger, pytest.raises(Unauthorized):
            stranger.farm()
        with connect(url, api_key=master) as admin:
            reader = admin.create_key("reader", scopes=["read"], tenant="acme")
            assert admin.set_tenant("acme", max_requests_s=0.01).max_requests_s == 0.01
            assert {key.name for key in admin.keys()} == {"master", "reader"}  # noqa: SIM118
            with connect(url, api_key=reader.key) as client, pytest.raises(Forbidden):
                client.submit(SMALL)
            with connect(url, api_key=reader.key) as client, pytest.raises(Overloaded) as full:
                client.farm()
            assert (full.value.retry_after_s or 0) > 1
            assert admin.revoke_key(reader).revoked_at is not None


def test_webhooks_are_made_seen_and_removed(connect: Connect, settings: Settings) -> None:
    with serving(settings.model_copy(update={"webhook_private": True})) as url, connect(url) as farm:
        hook = farm.create_webhook("http://127.0.0.1:9/", kinds=["job.failed"])
        assert hook.secret
        assert [found.id for found in farm.webhooks()] == [farm.webhook(hook).id] == [hook.id]
        assert farm.enable_webhook(hook).disabled_at is None
        assert list(farm.deliveries(hook)) == []
        farm.delete_webhook(hook)
        with pytest.raises(NotFound):
            farm.webhook(hook)
        assert {size.name for size in farm.sizes()} >= {"leaderboard"}
        assert farm.estimate(100).gpu_s > 0


def test_an_attempt_that_is_still_at_work_is_waited_for(connect: Connect, quick: list[float]) -> None:
    asked: list[Asked] = []

    def answer(one: Asked) -> Answer:
        asked.append(one)
        problem = {"type": attempts.AT_WORK, "title": "at work", "status": 409, "detail": ""}
        return (200, {}, {"batches": [], "next": None}) if len(asked) > 9 else (409, {"Retry-After": "1"}, problem)

    with answering(answer) as url, connect(url) as client:
        assert list(client.batches()) == []
    assert quick == [1.0] * 9


def test_another_server_at_that_address_is_told_from_a_farm(connect: Connect) -> None:
    stranger = answering(lambda _: (200, {}, {"hello": "there"}))
    with stranger as url, connect(url) as client, pytest.raises(Unreachable, match="no ovis-batch API"):
        client.farm()


@dataclass(frozen=True)
class Asked:
    """A request, as a server that is no farm sees it."""

    method: str
    key: str | None
    body: bytes


Answer = tuple[int, dict[str, str], dict[str, Any]]
"""Status, headers, body."""


@contextmanager
def answering(answer: Callable[[Asked], Answer]) -> Iterator[str]:
    """A server that is no farm."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def _reply(self) -> None:
            status, headers, content = answer(Asked(self.command, self.headers["Idempotency-Key"], self._body()))
            body = json.dumps(content).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def _body(self) -> bytes:
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            pieces = []
            while size := int(self.rfile.readline(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)

        do_GET = do_POST = _reply  # noqa: N815  # http.server's names

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
