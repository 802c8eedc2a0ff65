"""Small requests are answered however much that takes long is asked for at once."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager

import httpx
import psycopg
import pytest

from producer.api import services
from producer.api.bodies import NDJSON
from producer.jobs.contract import Batch
from producer.jobs.settings import Settings
from tests.farm import Farmhand
from tests.integration.producer.api.conftest import SlowBucket
from tests.integration.producer.api.test_jobs import assert_problem
from tests.integration.producer.api.test_results import hand_in, submission
from tests.waiting import until

BATCHES = "/api/v1/batches"
LINE = b'{"prompt": "a", "width": 64, "height": 64}\n'
OPENAI_LINE = (
    b'{"custom_id": "a", "method": "POST", "url": "/v1/images/generations", "body": {"prompt": "a", "size": "64x64"}}'
)
MOST_S = 8.0
"""In which a small request is answered, on a machine that does much else. One that found no connection took ten."""


def in_lines(api: httpx.Client) -> httpx.Response:
    return api.post(BATCHES, params={"name": "b"}, content=LINE, headers={"Content-Type": NDJSON})


def as_document(api: httpx.Client) -> httpx.Response:
    return api.post(BATCHES, json={"name": "b", "jobs": [{"prompt": "a", "width": 64, "height": 64}] * 2_000})


def by_file(api: httpx.Client) -> httpx.Response:
    file = api.post("/v1/files", files={"file": ("a", OPENAI_LINE)}, data={"purpose": "batch"}).json()
    asked = {"input_file_id": file["id"], "endpoint": "/v1/images/generations", "completion_window": "24h"}
    return api.post("/v1/batches", json=asked)


class Locked:
    """Whoever writes into the table waits in Postgres, with connection and thread, until somebody lets go."""

    def __init__(self, settings: Settings, table: str) -> None:
        self._table = table
        self._holding = psycopg.connect(settings.require("database_url"))
        self._holding.execute(f"LOCK TABLE {table} IN SHARE MODE")
        self._watching = psycopg.connect(settings.require("database_url"), autocommit=True)

    def waiting(self) -> int:
        counting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = %s::regclass"
        counted = self._watching.execute(counting, [self._table]).fetchone()
        assert counted is not None
        return int(counted[0])

    def let_go(self) -> None:
        self._holding.close()

    def close(self) -> None:
        self.let_go()
        self._watching.close()


@pytest.fixture
def locked(settings: Settings) -> Iterator[Callable[[str], Locked]]:
    """Locks a table of the farm's."""
    with ExitStack() as held:
        yield lambda table: held.enter_context(closing(Locked(settings, table)))


@contextmanager
def asking(count: int, ask: Callable[[], httpx.Response]) -> Iterator[list[Future[httpx.Response]]]:
    with ThreadPoolExecutor(count) as pool:
        yield [pool.submit(ask) for _ in range(count)]


@pytest.mark.parametrize("hand_over", [in_lines, as_document, by_file])
def test_many_bulk_submissions_leave_connections_to_small_requests(
    api: httpx.Client, locked: Callable[[str], Locked], hand_over: Callable[[httpx.Client], httpx.Response]
) -> None:
    batches = locked("batches")
    with asking(services.CONNECTIONS + 2, lambda: hand_over(api)) as answers:
        try:
            until(lambda: batches.waiting() >= services.BULK_PLACES)
            small = {"prompt": "a", "width": 64, "height": 64}
            assert api.post("/api/v1/jobs", json=small, timeout=MOST_S).status_code == 201
            assert api.get("/api/v1/jobs", timeout=MOST_S).status_code == 200
            assert batches.waiting() == services.BULK_PLACES
        finally:
            batches.let_go()
        assert {answer.result().status_code for answer in answers} <= {200, 201}
    assert len(api.get(BATCHES).json()["batches"]) == services.CONNECTIONS + 2


def test_who_waits_too_long_for_a_place_is_told_to_ask_again(
    api: httpx.Client, locked: Callable[[str], Locked], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = locked("batches")
    with asking(services.BULK_PLACES, lambda: in_lines(api)) as answers:
        try:
            until(lambda: batches.waiting() == services.BULK_PLACES)
            monkeypatch.setattr("producer.api.places.WAIT_S", 0.2)
            told = in_lines(api)
            assert assert_problem(told, 503)["type"].endswith(":busy")
            assert int(told.headers["Retry-After"]) > 0
            asked = by_file(api)
            assert (asked.status_code, asked.json()["error"]["code"]) == (503, "busy")
        finally:
            batches.let_go()
        assert {answer.result().status_code for answer in answers} == {201}
    assert in_lines(api).status_code == 201


def test_a_small_batch_waits_for_no_place(api: httpx.Client, locked: Callable[[str], Locked]) -> None:
    def with_a_bad_line() -> httpx.Response:
        asked = {"name": "b", "partial": "true"}
        return api.post(BATCHES, params=asked, content=LINE + b"{}\n", headers={"Content-Type": NDJSON})

    rejections = locked("rejections")
    with asking(services.BULK_PLACES, with_a_bad_line) as answers:
        try:
            until(lambda: rejections.waiting() == services.BULK_PLACES)
            jobs = [{"prompt": "a", "width": 64, "height": 64}] * 10
            assert api.post(BATCHES, json={"name": "s", "jobs": jobs}, timeout=MOST_S).status_code == 201
        finally:
            rejections.let_go()
        assert {answer.result().status_code for answer in answers} == {201}


@pytest.fixture
def drawn(hand: Farmhand) -> Batch:
    batch, jobs = hand_in(hand, [submission()])
    hand.succeed(jobs[0])
    return batch


def test_many_downloads_that_wait_for_the_bucket_leave_threads_to_small_requests(
    api: httpx.Client, drawn: Batch, slow_bucket: SlowBucket
) -> None:
    limits = httpx.Limits(max_connections=100)
    with (
        httpx.Client(base_url=api.base_url, timeout=120, limits=limits) as browsers,
        asking(45, lambda: browsers.get(f"{BATCHES}/{drawn.id}/images.zip")) as answers,
    ):
        try:
            for _ in range(services.TRANSFER_PLACES):
                assert slow_bucket.asked.acquire(timeout=30)
            assert api.get("/api/v1/jobs", timeout=MOST_S).status_code == 200
        finally:
            slow_bucket.there.set()
        assert {answer.result().status_code for answer in answers} == {200}
