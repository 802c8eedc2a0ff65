"""A worker without Celery and without a process of its own, and servers that can be taken away from it."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import pytest
from pydantic import SecretStr

from pipeline.request import ImageRequest
from producer.jobs.contract import Job, Message
from producer.jobs.settings import Settings
from producer.jobs.storage import Storage
from producer.jobs.store import Store
from tests.blank_worker import BlankEngine
from tests.chaos.proxy import Kind, Proxy, Trouble
from worker.app import Drawer, Worker
from worker.device import DrawingEngine
from worker.metrics import Metrics


class Workshop:
    """The parts of a worker, put together by the product and fed by hand. Counts the steps that it draws."""

    THREADS = 8

    def __init__(self, settings: Settings, step_s: float, engine: DrawingEngine | None) -> None:
        self.drawn: list[tuple[str, int]] = []  # prompt, steps done
        self.store = Store.at(settings.require("database_url"), connections=8)
        self.storage = Storage(settings)
        drawer = Drawer(engine or BlankEngine(step_s, self._drew), device="none", model="blank", revision="0")
        self.worker = Worker(settings, drawer, self.store, self.storage, Metrics())
        self._threads = ThreadPoolExecutor(self.THREADS)
        self._give_back_s = settings.give_back_s

    def _drew(self, request: ImageRequest, step: int) -> None:
        self.drawn.append((request.prompt, step))

    def start(self) -> None:
        for part in (self.worker._device, self.worker._checkpoints, self.worker._previews, self.worker._lease):
            part.start()
        self.worker._held.open()

    def take(self, job: Job) -> "Future[None]":
        """As if the job's next message had come."""
        return self._threads.submit(self.worker._executor.execute, Message(job.id, job.claim + 1))

    def give_back(self) -> None:
        """As when the grace time is over."""
        self.worker._executor.drain()
        self.worker._executor.hold_drawn()
        self.worker._executor.give_up(endings_s=2 * self._give_back_s)
        self.worker._device.drain()

    def stop(self) -> None:
        self.give_back()
        self._threads.shutdown()
        assert self.worker._device.stop(timeout_s=10)
        self.worker._checkpoints.stop(timeout_s=10)
        self.worker._previews.stop(timeout_s=10)
        self.worker._lease.stop()
        self.store.close()
        self.storage.close()


@pytest.fixture
def workshops(settings: Settings, tmp_path: Path) -> Iterator[Callable[..., Workshop]]:
    """Opens a worker of this host, whose settings may differ; all are closed at the end."""
    own = settings.model_copy(update={"data_dir": tmp_path})
    with ExitStack() as stack:

        def opened(*, step_s: float = 0.01, engine: DrawingEngine | None = None, **changes: object) -> Workshop:
            workshop = Workshop(own.model_copy(update=changes), step_s, engine)
            workshop.start()
            stack.callback(workshop.stop)
            return workshop

        yield opened


class Gate:
    """A server behind a door that can be shut: then every request is reset; or that swallows what comes."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.port is not None
        self._proxy = Proxy(parts.port)
        self._proxy.start()
        self.url = urlunsplit(parts._replace(netloc=parts.netloc.replace(f":{parts.port}", f":{self._proxy.port}")))

    @contextmanager
    def shut(self) -> Iterator[None]:
        with self._proxy.doing(Trouble(Kind.RESET)):
            yield

    @contextmanager
    def swallowing(self) -> Iterator[None]:
        """Requests get no answer, neither a bad one nor a reset. All connections end with the body."""
        with self._proxy.doing(Trouble(Kind.SLOW, slow_s=300)):
            yield
        self.cut()

    @contextmanager
    def full(self) -> Iterator[None]:
        """What is written is refused; what is read is not."""
        with self._proxy.doing(Trouble(Kind.REFUSE, b"PUT /", status=b"507 Insufficient Storage", code=b"StorageFull")):
            yield

    def cut(self) -> None:
        """Reset every connection that stands."""
        self._proxy.cut()

    @property
    def refused(self) -> int:
        """Requests that met the shut door."""
        return self._proxy.done

    def stop(self) -> None:
        self._proxy.stop()


@pytest.fixture
def bucket_gate(settings: Settings) -> Iterator[Gate]:
    assert settings.s3_endpoint_url is not None
    gate = Gate(settings.s3_endpoint_url)
    yield gate
    gate.stop()


@pytest.fixture
def postgres_gate(settings: Settings) -> Iterator[Gate]:
    gate = Gate(settings.require("database_url"))
    yield gate
    gate.stop()


@pytest.fixture
def behind_bucket_gate(workshops: Callable[..., Workshop], bucket_gate: Gate) -> Callable[..., Workshop]:
    return partial(workshops, s3_endpoint_url=bucket_gate.url)


@pytest.fixture
def behind_postgres_gate(workshops: Callable[..., Workshop], postgres_gate: Gate) -> Callable[..., Workshop]:
    return partial(workshops, database_url=SecretStr(postgres_gate.url))
