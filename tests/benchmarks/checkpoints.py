"""What checkpoints cost while nothing goes wrong: the same images with and without, in turn, in one run.

    python tests/benchmarks/checkpoints.py [--images 4] [--side 512] [--steps 60] [--rounds 5]

The tiny model draws through the worker's ``Device``; its checkpoints go to the embedded S3 and Postgres by the worker's
own saver, as in the product. A round is: the images without any checkpoint, then with one every N steps for each N. The
first round is thrown away. What counts is the median over rounds of (with - without) / without, next to what differs
between two runs without any.

Seconds are CPU seconds of the whole process, the saver's thread with it.
A checkpoint's cost is that of one image and the same at every step, so the slower a step is, the smaller its part: the
table gives it in milliseconds too, and says what part of a step of 100 ms that would be.
"""

import argparse
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from uuid import uuid4

import torch

from pipeline.engine import Engine
from pipeline.model import Model, load_model
from pipeline.request import ImageRequest
from producer.jobs.contract import Claim, Job, Message, Submission
from producer.jobs.local import local_servers
from producer.jobs.schema import upgrade
from producer.jobs.settings import Settings
from producer.jobs.storage import Storage
from producer.jobs.store import Store
from worker.checkpoints import Checkpoints
from worker.device import Device
from worker.held import Held
from worker.outages import Outages

EVERY = (0, 20, 5, 1)
"""Steps between two checkpoints of an image; 0: none."""
STEP_MS = 100.0
"""Of what a real step takes, for the last column."""


class Bench:
    """The worker's parts between a claim and its image."""

    def __init__(self, model: Model, store: Store, storage: Storage, folder: Path) -> None:
        self._model = model
        self._store = store
        self._worker_id = uuid4()
        self._held = Held(folder / "held", most_bytes=10**9)
        self._checkpoints = Checkpoints(store, storage, Outages(), self._held)
        self._held.open()
        self._checkpoints.start()
        self.taken = 0

    def seconds(self, request: ImageRequest, images: int, checkpoint_steps: int) -> float:
        """CPU seconds of this process while it draws ``images`` of them at once, first step to last pixel.

        Those of all its threads: on a CPU the saver takes its time from the engine, and another process's does not
        count.
        """
        jobs = [self._submit(request, number) for number in range(images)]
        device = Device(
            Engine(self._model),
            step_limit_s=600,
            checkpoint_steps=checkpoint_steps,
            on_checkpoint=self._take,
        )
        device.start()
        with ThreadPoolExecutor(images) as threads:
            began = time.process_time()
            list(threads.map(lambda job: self._draw(device, job), jobs))
            seconds = time.process_time() - began
        device.stop()
        return seconds

    def close(self) -> None:
        self._checkpoints.stop(timeout_s=10)

    def _take(self, message: Message, latents: object) -> None:
        self.taken += 1
        self._checkpoints.take(message, latents)  # type: ignore[arg-type]

    def _submit(self, request: ImageRequest, number: int) -> Job:
        fields = request.model_dump() | {"seed": number}
        return self._store.submit(Submission.model_validate(fields), max_failures=3)

    def _draw(self, device: Device, job: Job) -> None:
        claim = self._store.claim(Message(job.id, 1), self._worker_id)
        assert isinstance(claim, Claim)
        with self._checkpoints.following(claim):
            device.draw(claim.message, job.request)
            self._checkpoints.discard(claim)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    request = ImageRequest(
        prompt='A poster that says "LATE"', width=options.side, height=options.side, steps=options.steps
    )
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        farm = stack.enter_context(local_servers(Settings(data_dir=folder)))
        upgrade(farm.settings.require("database_url"))
        store, storage = Store.at(farm.settings.require("database_url")), Storage(farm.settings)
        stack.callback(store.close)
        stack.callback(storage.close)
        storage.ensure_bucket()
        bench = Bench(load_model("tiny", device="cpu", models_dir=folder), store, storage, folder)
        stack.callback(bench.close)
        _report(bench, request, options.images, options.rounds)


def _report(bench: Bench, request: ImageRequest, images: int, rounds: int) -> None:
    print(f"tiny, {images} images of {request.width}², {request.steps} steps, {torch.get_num_threads()} threads")
    contestants = [*EVERY, 0]  # the last one shows what differs by chance
    seconds: list[list[float]] = [[] for _ in contestants]
    taken = [0] * len(contestants)
    for number in range(rounds + 1):
        for place, every in enumerate(contestants):
            before = bench.taken
            measured_s = bench.seconds(request, images, every)
            if number:
                seconds[place].append(measured_s)
                taken[place] = bench.taken - before
    without_s = seconds[0]
    for every, with_s, count in zip(contestants[1:], seconds[1:], taken[1:], strict=True):
        parts = [(more - less) / less for more, less in zip(with_s, without_s, strict=True)]
        line = f"every {every:2d} steps" if every else "none, again   "
        line += f": {100 * median(parts):+6.2f} % of {median(without_s):.2f} s (of each round: "
        line += " ".join(f"{100 * part:+.1f}" for part in parts) + ")"
        if count:
            each_ms = 1000 * median(parts) * median(without_s) / count
            line += f"; {count} checkpoints, {each_ms:.2f} ms each: every {every} steps of {STEP_MS:.0f} ms"
            line += f" {100 * each_ms / (every * STEP_MS):.3f} %"
        print(line)


if __name__ == "__main__":
    main()
