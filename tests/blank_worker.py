"""A worker process whose drawing costs nothing, for benchmarks and tests of everything around the drawing.

    python tests/blank_worker.py [--no-upload]

All but the engine (and, if so told, the bucket) is the product's own: claim, encode, upload, record, lease, Celery.
"""

import logging
import sys

import numpy as np

from pipeline.engine import DrawnImage, Finished, Progress
from pipeline.errors import Drained
from pipeline.request import ImageRequest
from producer.jobs.settings import Settings, load_settings
from producer.jobs.storage import Storage
from worker.app import Drawer, run

CAPACITY = 8


class BlankEngine:
    """Every image is done after one step, and is one flat colour that its seed chooses."""

    capacity = CAPACITY

    def __init__(self) -> None:
        self._inside: dict[int, ImageRequest] = {}
        self._tickets = 0
        self._drained = False

    @property
    def idle(self) -> bool:
        return not self._inside

    def submit(self, request: ImageRequest) -> int:
        if self._drained:
            raise Drained("the engine takes no more images in")
        self._tickets += 1
        self._inside[self._tickets] = request
        return self._tickets

    def step(self) -> list[Finished]:
        finished = [Finished(ticket, image=_blank(request)) for ticket, request in self._inside.items()]
        self._inside.clear()
        return finished

    def cancel(self, ticket: int) -> bool:
        return self._inside.pop(ticket, None) is not None

    def drain(self) -> list[int]:
        self._drained = True
        tickets = sorted(self._inside)
        self._inside.clear()
        return tickets

    def progress(self) -> dict[int, Progress]:
        return {ticket: Progress(0, request.steps) for ticket, request in self._inside.items()}


class NoStorage(Storage):
    """A bucket that keeps nothing: what is measured without it is the rest."""

    def put(self, key: str, body: bytes, media_type: str) -> None:
        return


def _blank(request: ImageRequest) -> DrawnImage:
    shade = (request.seed or 0) % 256
    pixels = np.full((request.height, request.width, 3), shade, dtype=np.uint8)
    return DrawnImage(pixels=pixels, steps=request.steps, drawing_s=0.0)


def _load(_settings: Settings) -> Drawer:
    return Drawer(BlankEngine(), device="none", model="blank", revision="0")


if __name__ == "__main__":
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    storage = NoStorage if "--no-upload" in sys.argv else Storage
    sys.exit(run(load_settings(), load=_load, storage_at=storage))
