"""A farm for tests: the real API in a thread, and a hand that plays the worker without drawing."""

import hashlib
import io
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from uuid import UUID, uuid4

from PIL import Image
from pydantic import SecretStr

from pipeline.request import ImageFormat
from producer.api.server import Server, listen
from producer.jobs.contract import Claim, Job, Message, Recorded
from producer.jobs.errors import LostClaim
from producer.jobs.settings import Settings
from producer.jobs.storage import Storage, object_key
from producer.jobs.store import Store


@contextmanager
def serving(settings: Settings) -> Iterator[str]:
    """The base URL of a real API on a free port, in a thread of this process."""
    answers = threading.Event()
    urls: list[str] = []

    def announced(url: str) -> None:
        urls.append(url)
        answers.set()

    server = Server(settings, announced)
    with closing(listen("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],), name="api")
        thread.start()
        try:
            assert answers.wait(20), "the API did not start"
            yield urls[0]
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive(), "the API did not stop"


def environment(settings: Settings) -> dict[str, str]:
    """The settings as another process reads them."""
    values = settings.model_dump(exclude_none=True)
    plain = {
        name: value.get_secret_value() if isinstance(value, SecretStr) else value for name, value in values.items()
    }
    return os.environ | {f"OVIS_{name.upper()}": str(value) for name, value in plain.items()}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Farmhand:
    """Plays a worker: beats, claims, and records pictures of one colour."""

    def __init__(self, settings: Settings) -> None:
        self.id: UUID = uuid4()
        self.store = Store.at(settings.require("database_url"))
        self.storage = Storage(settings)

    def close(self) -> None:
        self.store.close()
        self.storage.close()

    def beat(
        self,
        drawing: list[dict[str, object]] | None = None,
        device: str = "cpu",
        capacity: int = 4,
        model: str = "tiny",
    ) -> None:
        """A heartbeat of a worker that draws this."""
        description = {
            "host": "workbench",
            "pid": 4242,
            "device": device,
            "model": model,
            "revision": "0",
            "version": "0.1.0",
            "capacity": capacity,
        }
        self.store.beat(self.id, description, json.dumps(drawing or []))

    def claim(self, job: Job) -> Claim:
        """Take the job, as if its message had come."""
        claim = self.store.claim(Message(job.id, job.claim + 1), self.id)
        assert claim is not None, "the job could not be claimed"
        return claim

    def succeed(self, job: Job, picture: Image.Image | None = None) -> bytes:
        """Let the job succeed; returns its image file."""
        body = _png(picture or Image.new("RGB", (job.request.width, job.request.height), "teal"))

        def record(claim: Claim) -> None:
            key = object_key(job.batch_id, job.id, claim.claim, ImageFormat.PNG)
            self.storage.put(key, body, ImageFormat.PNG.media_type)
            self.store.record(claim, _recorded(job, key, body))

        self._end(job, record)
        return body

    def fail(self, job: Job, message: str = "the prompt has 300 tokens: 246 at most", code: str = "invalid") -> None:
        """Let the job fail for good."""
        self._end(job, lambda claim: self.store.fail(claim, code, message))

    def _end(self, job: Job, write: Callable[[Claim], None]) -> None:
        """Claim the job and end it: again, if a dispatcher took the claim from one who does not beat meanwhile."""
        while not self.store.job(job.id).state.terminal:
            with suppress(LostClaim):
                write(self.claim(self.store.job(job.id)))


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def _recorded(job: Job, key: str, body: bytes) -> Recorded:
    return Recorded(
        object_key=key,
        sha256=hashlib.sha256(body).hexdigest(),
        size_bytes=len(body),
        width_px=job.request.width,
        height_px=job.request.height,
        format=ImageFormat.PNG,
        drawing_s=1.5,
        encoding_s=0.1,
        uploading_s=0.05,
        warnings=[],
    )
