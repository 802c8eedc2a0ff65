"""A worker process whose drawing costs nothing, for benchmarks and tests of everything around the drawing.

    python tests/blank_worker.py [--no-upload] [--step-s SECONDS]

With ``--step-s`` each step of all images takes so long, and an image takes as many as it asks for. All but the engine
(and, if so told, the bucket) is the product's own: claim, encode, checkpoint, upload, record, lease, Celery.
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pipeline.engine import DrawnImage, Finished, Progress
from pipeline.errors import Drained, UnusableLatents
from pipeline.request import ImageRequest
from producer.jobs.settings import load_settings
from producer.jobs.storage import Storage
from worker.app import Drawer, run

CAPACITY = 12
CHECKPOINT = "blank"


class BlankEngine:
    """Every image is one flat colour that its seed chooses; without ``step_s`` it is done after one step.

    ``drew`` is told each step of each image, after it: the request, and how many steps are done.
    """

    capacity = CAPACITY

    def __init__(self, step_s: float, drew: Callable[[ImageRequest, int], None] = lambda request, step: None) -> None:
        self._step_s = step_s
        self._drew = drew
        self._inside: dict[int, tuple[ImageRequest, int]] = {}
        self._tickets = 0
        self._drained = False

    @property
    def idle(self) -> bool:
        return not self._inside

    def submit(self, request: ImageRequest, *, priority: int = 0) -> int:
        return self._admit(request, 0)

    def resume(self, checkpoint: bytes, *, priority: int = 0) -> int:
        try:
            name, request, step = json.loads(checkpoint)
        except ValueError as error:
            raise UnusableLatents("they are no checkpoint of a blank image") from error
        if name != CHECKPOINT:
            raise UnusableLatents(f"they are of {name!r}, and here is {CHECKPOINT!r}")
        return self._admit(ImageRequest.model_validate(request), int(step))

    def step(self) -> list[Finished]:
        time.sleep(self._step_s)
        finished = []
        for ticket, (request, step) in list(self._inside.items()):
            if step < request.steps:
                step += 1
                self._inside[ticket] = (request, step)
                self._drew(request, step)
            if not self._step_s or step == request.steps:
                finished.append(Finished(ticket, image=_blank(request)))
                del self._inside[ticket]
        return finished

    def checkpoint(self, ticket: int) -> bytes:
        request, step = self._inside[ticket]
        return json.dumps([CHECKPOINT, request.model_dump(mode="json"), step]).encode()

    def preview(self, ticket: int) -> NDArray[np.uint8]:
        """Ever lighter."""
        _, step = self._inside[ticket]
        return np.full((32, 64, 3), min(255, 10 * step), dtype=np.uint8)

    def cancel(self, ticket: int) -> bool:
        return self._inside.pop(ticket, None) is not None

    def drain(self) -> list[int]:
        self._drained = True
        tickets = sorted(self._inside)
        self._inside.clear()
        return tickets

    def progress(self) -> dict[int, Progress]:
        return {ticket: Progress(step, request.steps) for ticket, (request, step) in self._inside.items()}

    def request(self, ticket: int) -> ImageRequest:
        return self._inside[ticket][0]

    def _admit(self, request: ImageRequest, step: int) -> int:
        if self._drained:
            raise Drained("the engine takes no more images in")
        self._tickets += 1
        self._inside[self._tickets] = (request, step)
        return self._tickets


class NoStorage(Storage):
    """A bucket that keeps nothing: what is measured without it is the rest."""

    def put(self, key: str, body: bytes, media_type: str) -> None:
        return


def _blank(request: ImageRequest) -> DrawnImage:
    shade = (request.seed or 0) % 256
    pixels = np.full((request.height, request.width, 3), shade, dtype=np.uint8)
    return DrawnImage(pixels=pixels, steps=request.steps, drawing_s=0.0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-upload", action="store_true")
    parser.add_argument("--step-s", type=float, default=0.0)
    options = parser.parse_args()
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    drawer = Drawer(BlankEngine(options.step_s), device="none", model="blank", revision="0")
    storage = NoStorage if options.no_upload else Storage
    return run(load_settings(), load=lambda settings: drawer, storage_at=storage)


if __name__ == "__main__":
    sys.exit(main())
