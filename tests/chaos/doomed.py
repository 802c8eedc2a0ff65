"""A worker and a dispatcher that end, stop or fail at a point which their environment names.

The product's code has no hook for this: its Store, Storage, Queue and engine are wrapped here, and all else is its own.
What a member is to do comes as JSON in the variable ``CHAOS``.
"""

import io
import json
import os
import random
import resource
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import torch

from pipeline.engine import DrawnImage, Engine, Finished, Progress
from pipeline.errors import Exhausted
from pipeline.model import load_model
from pipeline.request import ImageRequest
from pipeline.transformer import PackedTransformer
from producer.jobs.contract import Claim, Fence, Message, Outgoing, Recorded, Submission, SubmissionKey
from producer.jobs.postgres import Database
from producer.jobs.queue import Queue
from producer.jobs.settings import Settings
from producer.jobs.storage import IMAGES, Storage
from producer.jobs.store import Store
from tests.blank_worker import BlankEngine
from worker.app import Drawer

VARIABLE = "CHAOS"
SUBMISSION_VARIABLE = "CHAOS_SUBMISSION"
"""Of a producer: the path of a file with its key and its rows."""
POISON = "poison"
"""A prompt that holds this word kills the process that draws it, in this step."""
POISON_STEP = 5
HUGE = "huge"
"""A prompt that holds this word does not fit the device's memory, however small the pack is."""
HUGE_TOKENS = 64


@dataclass(frozen=True)
class Plan:
    """What one member does besides its work."""

    engine: str = "blank"  # or tiny
    step_s: float = 0.01  # blank alone: of a step of all images
    steps_file: str = ""  # where each step that was drawn is noted
    point: str = ""  # where the fault is: see the wrappers' calls of Doom.at
    at_pass: int = 1  # at the so manyeth passing of that point
    action: str = "kill"  # or freeze
    pack_limit: int | None = None  # images that a step may hold before the device is out of memory
    file_limit_bytes: int | None = None  # no file of the process grows beyond this: its disk is full
    noisy: bool = False  # blank alone: images that no encoder can make small

    def with_fault(self, point: str, at_pass: int) -> "Plan":
        return replace(self, point=point, at_pass=at_pass)

    def environment(self) -> dict[str, str]:
        return {VARIABLE: json.dumps(asdict(self))}

    @classmethod
    def here(cls) -> "Plan":
        return cls(**json.loads(os.environ.get(VARIABLE, "{}")))


class Doom:
    """Does the plan's fault when its point is passed for the so manyeth time."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._left = plan.at_pass
        self._counting = threading.Lock()

    def at(self, point: str) -> None:
        """The process passes ``point``: whether anything follows is the plan's to say."""
        if self.strikes(point):
            self.strike()

    def strikes(self, point: str) -> bool:
        """Whether this passing of ``point`` is the one."""
        if point != self._plan.point:
            return False
        with self._counting:
            self._left -= 1
            return self._left == 0

    def strike(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP if self._plan.action == "freeze" else signal.SIGKILL)

    def strike_soon(self, within_s: float) -> None:
        """From another thread, so that this one is in the midst of what it does next."""
        timer = threading.Timer(random.uniform(0, within_s), self.strike)
        timer.daemon = True
        timer.start()


class DoomedStore(Store):
    """Postgres, with points before and after what a worker writes."""

    doom: Doom

    @classmethod
    def with_doom(cls, doom: Doom, database_url: str, **options: Any) -> "DoomedStore":
        store = cls(Database.at(database_url, **options))
        store.doom = doom
        return store

    def claim(self, message: Message, worker_id: UUID) -> Claim | None:
        self.doom.at("received")
        claim = super().claim(message, worker_id)
        if claim is not None:
            self.doom.at("claimed")
        return claim

    def note_checkpoint(self, fence: Fence, key: str, step: int) -> None:
        self.doom.at("checkpoint put")
        super().note_checkpoint(fence, key, step)
        self.doom.at("checkpoint noted")

    def record(self, claim: Claim, recorded: Recorded) -> None:
        self.doom.at("uploaded")
        super().record(claim, recorded)
        self.doom.at("recorded")


class DoomedStorage(Storage):
    """The bucket, with points before and in the midst of an upload."""

    doom: Doom

    @classmethod
    def with_doom(cls, doom: Doom, settings: Settings) -> "DoomedStorage":
        storage = cls(settings)
        storage.doom = doom
        return storage

    def put(self, key: str, body: bytes, media_type: str) -> None:
        if key.startswith(IMAGES):
            self.doom.at("drawn")
            if self.doom.strikes("uploading"):
                with self._reaching():
                    torn = Torn(body, self.doom)
                    self._client.put_object(Bucket=self.bucket, Key=key, Body=torn, ContentType=media_type)
        super().put(key, body, media_type)


class Torn(io.BytesIO):
    """A body of which the server gets the first half. It is read twice: to be signed, and to be sent."""

    def __init__(self, body: bytes, doom: Doom) -> None:
        super().__init__(body)
        self._half = len(body) // 2
        self._size = len(body)
        self._signed = False
        self._doom = doom

    def read(self, size: int | None = -1) -> bytes:
        if not self._signed:
            chunk = super().read(size)
            self._signed = self.tell() == self._size and not chunk
            return chunk
        if self.tell() >= self._half:
            time.sleep(0.05)  # what was sent shall have arrived
            self._doom.strike()
        return super().read(self._half)


class Witness:
    """An engine that notes each step it has really drawn, and dies of a poisonous prompt. Else it is the one inside."""

    def __init__(self, engine: Any, plan: Plan, doom: Doom) -> None:
        self._engine = engine
        self._doom = doom
        self._notes = os.open(plan.steps_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def step(self) -> list[Finished]:
        before = {ticket: (self._request(ticket), done.done) for ticket, done in self._engine.progress().items()}
        if any(POISON in request.prompt and step >= POISON_STEP for request, step in before.values()):
            os.kill(os.getpid(), signal.SIGKILL)
        if self._doom.strikes("drawing"):
            self._doom.strike_soon(within_s=0.02)
        finished: list[Finished] = self._engine.step()
        self._note(before, self._engine.progress(), finished)
        self._doom.at("stepped")
        return finished

    def _note(
        self, before: dict[int, tuple[ImageRequest, int]], after: dict[int, Progress], finished: Sequence[Finished]
    ) -> None:
        now = {ticket: progress.done for ticket, progress in after.items()}
        now |= {end.ticket: end.image.steps for end in finished if end.image is not None}
        drawn = [
            f"{request.seed} {step}\n"
            for ticket, (request, done) in before.items()
            for step in range(done, now.get(ticket, done))
        ]
        os.write(self._notes, "".join(drawn).encode())  # appended as a whole, whoever else writes

    def _request(self, ticket: int) -> ImageRequest:
        inside = self._engine._inside[ticket]
        request: ImageRequest = inside[0] if isinstance(inside, tuple) else inside.request
        return request


class CrampedEngine(BlankEngine):
    """A blank engine on a device without the memory for a huge image."""

    def step(self) -> list[Finished]:
        huge = [ticket for ticket, inside in self._inside.items() if HUGE in inside[0].prompt]
        finished = [
            Finished(ticket, error=Exhausted(request.width, request.height, "asked for by the test"))
            for ticket in huge
            for request in [self._inside.pop(ticket)[0]]
        ]
        return finished + super().step()


class NoisyEngine(BlankEngine):
    """A blank engine whose pictures are of many bytes."""

    def step(self) -> list[Finished]:
        return [replace(end, image=_noise(end.image)) if end.image else end for end in super().step()]


def _noise(image: DrawnImage) -> DrawnImage:
    chance = np.random.default_rng(int(image.pixels.flat[0]))
    return replace(image, pixels=chance.integers(0, 256, image.pixels.shape, dtype=np.uint8))


class CrampedTransformer:
    """torch reports an exhausted device for every forward of more branches, and for each of a huge image."""

    def __init__(self, transformer: Any, pack_limit: int) -> None:
        self._transformer = transformer
        self._pack_limit = pack_limit

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transformer, name)

    def __call__(self, pack: Sequence[Any]) -> Any:
        if len(pack) > self._pack_limit or any(branch.latents.shape[0] > HUGE_TOKENS for branch in pack):
            raise torch.OutOfMemoryError("CUDA out of memory: asked for by the test")
        return self._transformer(pack)


def drawer_of(plan: Plan, doom: Doom, settings: Settings) -> Drawer:
    """The plan's engine, watched."""
    if plan.engine == "tiny":
        model = load_model("tiny", device="cpu", models_dir=settings.models_dir)
        transformer: Any = PackedTransformer(model.transformer, model.modulations)
        if plan.pack_limit is not None:
            transformer = CrampedTransformer(transformer, plan.pack_limit)
        engine = Engine(model, transformer=transformer)  # without measuring its budget, which takes seconds
        return Drawer(Witness(engine, plan, doom), "cpu", model.name, model.revision)
    kind = NoisyEngine if plan.noisy else CrampedEngine if plan.pack_limit is not None else BlankEngine
    blank = kind(plan.step_s)
    return Drawer(Witness(blank, plan, doom), device="none", model="blank", revision="0")


class DoomedQueue(Queue):
    """Redis, with points around the publishing of what is already noted in Postgres."""

    doom: Doom

    def publish(self, messages: Sequence[Outgoing]) -> None:  # type: ignore[override]
        if messages:
            self.doom.at("noted")
        super().publish(messages)
        if messages:
            self.doom.at("published")


def fill_disk(limit_bytes: int) -> None:
    """The kernel refuses what would make a file larger: the nearest thing to a full disk that needs no root."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))


def submit(doom: Doom, store: Store) -> None:
    """As a producer: hand in what the environment says, in one batch with its key."""
    content = json.loads(Path(os.environ[SUBMISSION_VARIABLE]).read_text())
    rows = [Submission.model_validate(row) for row in content["rows"]]

    def dying_before_the_commit() -> Iterator[Submission]:
        yield from rows
        doom.at("before the commit")

    store.submit_batch("first", dying_before_the_commit(), max_failures=3, key=SubmissionKey(**content["key"]))
    doom.at("after the commit")
