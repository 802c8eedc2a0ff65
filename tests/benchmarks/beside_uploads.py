"""The time of the engine's step with a worker's other threads beside it: ``engine.py``'s part ``beside``.

Sixteen threads encode a real picture as PNG and put it into the embedded S3 server by the code that a worker uses,
under the worker's switch interval: either as many pictures as the engine draws in that time, or without a pause. The
server is a process of its own on the same machine.
"""

import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import SecretStr

from pipeline.engine import Engine
from pipeline.image_file import encode
from pipeline.model import Model
from pipeline.request import ImageRequest
from producer.jobs.local import local_servers
from producer.jobs.settings import Settings
from producer.jobs.storage import Storage
from tests.benchmarks.banner_trace import at_once
from tests.benchmarks.beside_encoding import switching_every
from tests.benchmarks.contestants import PackedSteps, Pixels, play
from worker.app import SWITCH_INTERVAL_S

UPLOADERS = 16


@dataclass
class Rounds:
    """Seconds of a step, and PNGs uploaded a second, round by round."""

    step_s: list[float] = field(default_factory=list)
    uploads_per_s: list[float] = field(default_factory=list)


def steps_beside_uploads(model: Model, request: ImageRequest, *, steps: int, rounds: int) -> dict[str, Rounds]:
    """``steps`` steps of one image alone, beside uploads at the engine's own pace, and beside ceaseless ones, in turn.

    One more round comes first, and is thrown away.
    """
    measured = {"nothing": Rounds(), "uploads of what it draws": Rounds(), "uploads without a pause": Rounds()}
    picture = play(PackedSteps(model, capacity=1), at_once([request])).pictures[0]
    with _bucket() as storage, switching_every(SWITCH_INTERVAL_S):
        for number in range(rounds + 1):
            pauses_s = _pauses_s(request, step_s(model, request, steps))
            for name, pause_s in zip(measured, pauses_s, strict=True):
                began = time.perf_counter()
                with _uploading(storage, picture, request, model, pause_s) as sent_bytes:
                    seconds = step_s(model, request, steps)
                    uploads = len(sent_bytes)
                if number:
                    measured[name].step_s.append(seconds)
                    measured[name].uploads_per_s.append(uploads / (time.perf_counter() - began))
    return measured


def _pauses_s(request: ImageRequest, step_s: float) -> tuple[float | None, float, float]:
    """Of each thread after each upload; None: there are no uploads."""
    return None, UPLOADERS * request.steps * step_s, 0.0


def step_s(model: Model, request: ImageRequest, steps: int) -> float:
    """Mean seconds of ``steps`` steps, from the second on: the last, with the decoding, is not reached."""
    engine = Engine(model, capacity=1)
    ticket = engine.submit(request.model_copy(update={"steps": steps + 2}))
    engine.step()
    _synchronise(model.device)
    began = time.perf_counter()
    for _ in range(steps):
        engine.step()
    _synchronise(model.device)
    seconds = time.perf_counter() - began
    if not engine.cancel(ticket):
        raise RuntimeError("the image ended within the measured steps")
    return seconds / steps


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _uploading(
    storage: Storage, picture: Pixels, request: ImageRequest, model: Model, pause_s: float | None
) -> Iterator[list[int]]:
    """Threads that encode and put ``picture`` again and again; gives the sizes in bytes of what was put."""
    stop, sent_bytes = threading.Event(), list[int]()

    def upload(number: int, pause_s: float) -> None:
        stop.wait(pause_s * number / UPLOADERS)  # in turn, not all at once
        while not stop.is_set():
            body = encode(picture, request, model.name, model.revision)
            storage.put(f"beside/{number}.png", body, request.format.media_type)
            sent_bytes.append(len(body))
            stop.wait(pause_s)

    count = 0 if pause_s is None else UPLOADERS
    threads = [threading.Thread(target=upload, args=(number, pause_s)) for number in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield sent_bytes
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@contextmanager
def _bucket() -> Iterator[Storage]:
    """The bucket of an embedded S3 server. The other servers are named, so that none is started for them."""
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            data_dir=Path(folder),
            database_url=SecretStr("postgresql://nobody@localhost/none"),
            redis_url=SecretStr("redis://localhost/0"),
            upload_slots=UPLOADERS,
        )
        with local_servers(settings) as farm:
            storage = Storage(farm.settings)
            storage.ensure_bucket()
            yield storage
            storage.close()
