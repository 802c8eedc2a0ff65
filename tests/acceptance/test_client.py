"""The client against the real API: what somebody else's Python does with a farm."""

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import pytest

from pipeline.request import ImageRequest
from producer import client as farm_client
from producer.client import Client, Corrupt, NotDone, NotFound, Refused, ServerError, Unreachable
from producer.jobs.settings import Settings
from tests.cut_connections import cutting
from tests.farm import Farmhand, free_port, serving

SMALL = {"prompt": "a paper boat", "width": 64, "height": 64}


@pytest.fixture
def farm(settings: Settings) -> Iterator[Client]:
    with serving(settings) as url, Client(url) as client:
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
    monkeypatch.setattr(farm_client.time, "sleep", waits.append)
    monkeypatch.setattr(farm_client.random, "uniform", lambda _, longest: longest)
    return waits


def test_a_batch_goes_in_is_waited_for_and_comes_back_as_images(farm: Client, hand: Farmhand) -> None:
    rows: list[Any] = [SMALL | {"name": "first"}, ImageRequest(prompt="茶", width=80, height=64)]
    batch = farm.submit_batch("boats", rows)
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
    batch = farm.submit_batch("boats", [SMALL, SMALL, SMALL])
    hand.succeed(hand.store.batch_jobs(batch.id)[0])
    assert farm.cancel_batch(batch).counts == batch.counts | {"queued": 0, "cancelled": 2, "succeeded": 1}


def test_one_job_goes_in_and_is_cancelled(farm: Client) -> None:
    job = farm.submit(ImageRequest(**SMALL), name="boat", priority="interactive")
    assert (job.name, job.priority, job.done) == ("boat", "interactive", False)
    assert farm.cancel(job).state == "cancelled"
    assert farm.wait(job).done
    assert farm.farm().counts["cancelled"] == 1


def test_pages_are_one_sequence(farm: Client) -> None:
    batch = farm.submit_batch("many", ({**SMALL, "seed": seed} for seed in range(25)))
    assert [job.request["seed"] for job in farm.batch_jobs(batch, page=10)] == list(range(25))
    assert len({job.id for job in farm.jobs(page=7)}) == 25
    assert list(farm.jobs(state="failed")) == []


def test_a_refusal_names_the_fields(farm: Client) -> None:
    with pytest.raises(Refused, match="width") as refused:
        farm.submit(SMALL, width=0)
    assert [fault.field for fault in refused.value.problem.errors or []] == ["width"]
    with pytest.raises(Refused, match="line 3: steps") as refused:
        farm.submit_batch("b", [SMALL, SMALL, SMALL | {"steps": 0}])
    assert [fault.line for fault in refused.value.problem.errors or []] == [3]
    with pytest.raises(Refused, match="surrogate"):
        farm.submit({"prompt": "\ud800"})
    assert farm.batches() == []


def test_what_the_rows_raise_passes_on_and_submits_nothing(farm: Client) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield SMALL
        raise LookupError("row 2")

    with pytest.raises(LookupError, match="row 2"):
        farm.submit_batch("b", rows())
    assert farm.batches() == []


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
    schemas = farm._http.get(f"{farm.base_url}/openapi.json").json()["components"]["schemas"]
    for name in ("Job", "Batch", "Tenant", "Worker", "Farm", "Problem", "Fault"):
        model = getattr(farm_client, name)
        assert set(model.model_fields) == set(schemas[name]["properties"]), name


def test_a_farm_that_is_away_is_said_after_a_few_attempts(quick: list[float]) -> None:
    with Client(f"http://127.0.0.1:{free_port()}") as client:
        for ask in (client.farm, lambda: client.submit(SMALL)):
            with pytest.raises(Unreachable) as away:
                ask()
            assert not away.value.heard
    assert quick == [0.25, 0.5, 1.0, 2.0] * 2


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_everything_is_asked_again_while_the_farm_is_unavailable(status: int, quick: list[float]) -> None:
    asked: list[Asked] = []

    def answer(one: Asked) -> Answer:
        asked.append(one)
        problem = {"type": "about:blank", "title": "away", "status": status, "detail": "Postgres"}
        return (200, {}, {"batches": []}) if len(asked) == 3 else (status, {"Retry-After": "2"}, problem)

    with answering(answer) as url, Client(url) as client:
        assert client.batches() == []
        assert quick == [2.25, 2.5]
        with pytest.raises((ServerError, Refused)) as away:
            client.submit_batch("boats", [SMALL])
    assert away.value.problem.status == status
    assert [one.method for one in asked] == ["GET"] * 3 + ["POST"] * 5
    assert len({(one.key, one.body) for one in asked[3:]}) == 1
    assert asked[3].key
    assert json.loads(asked[3].body) == SMALL


def test_a_farm_that_wants_to_be_left_alone_for_long_is(quick: list[float]) -> None:
    problem = {"type": "about:blank", "title": "full", "status": 503, "detail": "come back tomorrow"}
    full = answering(lambda _: (503, {"Retry-After": "3600"}, problem))
    with full as url, Client(url) as client, pytest.raises(ServerError) as away:
        client.submit(SMALL)
    assert (away.value.retry_after_s, quick) == (3600, [])


def test_an_answer_that_is_lost_on_its_way_costs_nothing_and_submits_once(farm: Client) -> None:
    """The proxy cuts each connection when the commit is done and the answer begins to come."""
    with cutting(farm.base_url, cuts=2) as proxy, Client(proxy.url) as client:
        batch = client.submit_batch("boats", ({**SMALL, "seed": seed} for seed in range(5_000)))
        assert proxy.left == 0
    assert [found.id for found in farm.batches()] == [batch.id]
    assert (batch.jobs, farm.farm().counts["queued"]) == (5_000, 5_000)
    with cutting(farm.base_url, cuts=1) as proxy, Client(proxy.url) as client:
        job = client.submit(SMALL)
        assert proxy.left == 0
    assert farm.job(job).request == job.request
    assert farm.farm().counts["queued"] == 5_001


def test_whoever_lost_the_connection_for_good_asks_again_with_the_key(farm: Client, quick: list[float]) -> None:
    with cutting(farm.base_url, cuts=99) as proxy, Client(proxy.url) as client, pytest.raises(Unreachable) as lost:
        client.submit_batch("boats", [SMALL, SMALL], key="autumn")
    assert lost.value.heard
    (batch,) = farm.batches()
    assert farm.submit_batch("boats", [SMALL, SMALL], key="autumn").id == batch.id
    with pytest.raises(Refused, match="Idempotency-Key"):
        farm.submit_batch("boats", [SMALL], key="autumn")
    assert len(farm.batches()) == 1
    for key in ("秋", ""):
        with pytest.raises(Refused, match="Idempotency-Key: must be 1 to 255 visible ASCII"):
            farm.submit(SMALL, key=key)


def test_a_batch_and_a_job_are_a_tenants(farm: Client) -> None:
    batch = farm.submit_batch("boats", [SMALL], tenant="acme", weight=2)
    assert (batch.tenant, batch.weight) == ("acme", 2)
    assert [farm.submit(SMALL, **whose).tenant for whose in ({}, {"tenant": "acme"})] == ["default", "acme"]
    assert farm.weigh_tenant("acme", 3).weight == 3
    assert [(tenant.name, tenant.weight) for tenant in farm.tenants()] == [("acme", 3)]
    with pytest.raises(Refused, match="tenant"):
        farm.submit(SMALL, tenant="a b")
    with pytest.raises(Refused, match="weight"):
        farm.weigh_tenant("acme", 0)


def test_another_server_at_that_address_is_told_from_a_farm() -> None:
    stranger = answering(lambda _: (200, {}, {"hello": "there"}))
    with stranger as url, Client(url) as client, pytest.raises(Unreachable, match="no ovis-batch API"):
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
