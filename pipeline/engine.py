"""Draws images together, one denoising step at a time.

Images join and leave between two steps; each has its own size, steps, guidance and seed, and ends as the picture that
``OvisImagePipeline.__call__`` alone would have drawn, because every expression that rounds is written as upstream
writes it. Who shares the next step is the planner's to say; how they share a forward is ``transformer.py``'s; a
finished image's pixels are ``decoder.py``'s.

It may know no job, no claim and no bucket: a ticket is all that it gives its caller.

Invariants:
- one thread at a time uses an engine. Nothing is locked;
- a ticket is given once. It leaves by exactly one of: a Finished, ``cancel``, ``drain``;
- between two steps an image is its request, its step index and its latents, and nothing else that counts: so it may be
  paused for others, or go on in another engine (``checkpoint``, ``resume``);
- an image that fails, fails alone. A step that fails changes nobody's latents.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from math import prod
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline import latents_file
from pipeline.decoder import Decoder
from pipeline.errors import (
    BrokenImage,
    Drained,
    EngineFull,
    Exhausted,
    Fatal,
    InvalidRequest,
    PipelineError,
    UnusableLatents,
)
from pipeline.latents_file import UnfinishedImage
from pipeline.model import Model
from pipeline.noise import draw_noise
from pipeline.planner import Candidate, Planner, SharedSteps
from pipeline.prompt import TEXT_TOKENS, PromptEncoder
from pipeline.request import ImageRequest
from pipeline.schedule import Schedule, Schedules
from pipeline.torch_errors import classed
from pipeline.transformer import Branch, PackedTransformer

CAPACITY = 16
"""Images inside. With fewer, short images find too few others to share their steps with; and each is a claimed job, of
which a worker should not hold many that another could draw. Memory is not what limits it: an image that only waits
holds its latents and embeddings, some 4 MB at 1024²; what a step needs beside them is the planner's budget."""
BUDGET_TOKENS = 16_384
"""For who does not measure one (``budget.py``): two guided images of 1024², or some fifteen banners."""


@dataclass(frozen=True)
class DrawnImage:
    """A finished picture."""

    pixels: NDArray[np.uint8]  # [height, width, 3], as the request asked
    steps: int
    drawing_s: float  # of shared steps by its tokens; of decoding what the engine's thread spent on it


@dataclass(frozen=True)
class Finished:
    """How a ticket ended: exactly one of ``image`` and ``error`` is there."""

    ticket: int
    image: DrawnImage | None = None
    error: PipelineError | None = None


@dataclass(frozen=True)
class Progress:
    """How far an image is."""

    done: int
    of: int


@dataclass
class _Image:
    """An image on its way."""

    ticket: int
    request: ImageRequest
    seed: int
    priority: int
    schedule: Schedule
    height: int  # in latents
    width: int
    step: int = 0
    waited: int = 0  # steps of the engine since it last drew or came in
    drawing_s: float = 0.0
    latents: torch.Tensor | None = None  # [1, tokens, channels]; from its first step on
    velocity: torch.Tensor | None = None  # the last one, shaped as the latents
    texts: list[torch.Tensor] = field(default_factory=list)  # [256, D] for each branch, the prompt's first
    apart: bool = False  # its two branches do not fit into one forward: each has its own, as upstream draws
    decoding: bool = False

    @property
    def tokens(self) -> int:
        """Of all its sequences."""
        return len(self.prompts) * (TEXT_TOKENS + self.height * self.width // 4)

    @property
    def prompts(self) -> list[str]:
        """One for each branch."""
        return [self.request.prompt, self.request.negative_prompt] if self.request.guided else [self.request.prompt]

    @property
    def drawn(self) -> bool:
        return self.step == self.request.steps


class Engine:
    """Takes requests, gives pictures. See the module for what holds."""

    def __init__(
        self,
        model: Model,
        planner: Planner | None = None,
        capacity: int = CAPACITY,
        transformer: PackedTransformer | None = None,
    ) -> None:
        self.capacity = capacity
        self._model = model
        self._planner = planner or SharedSteps(BUDGET_TOKENS, capacity=capacity)
        self._prompts = PromptEncoder(model)
        self._schedules = Schedules(model.scheduler)
        self._transformer = transformer or PackedTransformer(model.transformer, model.modulations)
        self._decoder = Decoder(model)
        self._inside: dict[int, _Image] = {}
        self._ended: list[Finished] = []
        self._tickets = 0
        self._drained = False

    @property
    def idle(self) -> bool:
        """Whether nothing is inside, so that a step would do nothing."""
        return not self._inside

    def submit(self, request: ImageRequest, *, priority: int = 0) -> int:
        """Take ``request`` in and return its ticket; a smaller ``priority`` goes first. The device is not touched.

        Raises InvalidRequest (PromptTooLong among them), EngineFull, and Drained after ``drain``.
        """
        return self._admit(request, priority).ticket

    def resume(self, checkpoint: bytes, *, priority: int = 0) -> int:
        """Take in what an engine's ``checkpoint`` gave, here or elsewhere: the same image comes of it.

        Raises as ``submit`` does, and UnusableLatents if it is broken or of another model or engine's version.
        """
        unfinished = latents_file.read(checkpoint, self._model.name, self._model.revision)
        if unfinished.latents.dtype != self._model.dtype:
            raise UnusableLatents(f"they are {unfinished.latents.dtype}, and here is {self._model.dtype}")
        image = self._admit(unfinished.request, priority)
        image.step, image.latents = unfinished.step, unfinished.latents
        return image.ticket

    def step(self) -> list[Finished]:
        """One denoising step for the images that the planner picks; returns those that ended since the last one.

        Raises Fatal if the device is dead: nothing of this engine can be trusted from then on.
        """
        untried = self._schedule()
        while untried:
            pack = untried.pop(0)
            try:
                began = perf_counter()
                self._advance(pack, self._forward(pack))
                self._charge(pack, perf_counter() - began)
            except PipelineError as error:
                untried = self._after(pack, error) + untried
        return self._finish()

    def checkpoint(self, ticket: int) -> bytes:
        """An image as it is between two steps, for ``resume``. It stays inside.

        Raises KeyError if it is not inside, Fatal if the device is dead.
        """
        image = self._inside[ticket]
        with self._on_device([image]):
            unfinished = UnfinishedImage(image.request, image.step, self._latents(image).cpu())
        return latents_file.encode(unfinished, self._model.name, self._model.revision)

    def cancel(self, ticket: int) -> bool:
        """Take an image out; False if it is not inside (any more)."""
        self._decoder.withdraw(ticket)
        return self._inside.pop(ticket, None) is not None

    def drain(self) -> list[int]:
        """Take no more in, give up what is inside, and return its tickets, the oldest first."""
        self._drained = True
        tickets = sorted(self._inside)
        for ticket in tickets:
            self.cancel(ticket)
        return tickets

    def progress(self) -> dict[int, Progress]:
        """How far each image is that is inside."""
        return {ticket: Progress(image.step, image.request.steps) for ticket, image in self._inside.items()}

    def request(self, ticket: int) -> ImageRequest:
        """What an image inside was asked to be. Raises KeyError if it is not inside."""
        return self._inside[ticket].request

    def preview(self, ticket: int) -> NDArray[np.uint8] | None:
        """About what the image will look like, [h, w, 3], its longer side 256 px at most.

        Decoded from where the last velocity leads; None before the first step in this engine, or if it is gone.
        Raises Exhausted, DrawingFailed and Fatal; the image itself goes on unchanged by the first two.
        """
        image = self._inside.get(ticket)
        if image is None or image.velocity is None:
            return None
        with self._on_device([image]):
            sigma = float(image.schedule.sigmas[image.step])
            return self._decoder.preview(self._latents(image) - sigma * image.velocity, image.request)

    def _admit(self, request: ImageRequest, priority: int) -> _Image:
        if self._drained:
            raise Drained("the engine takes no more images in")
        if len(self._inside) >= self.capacity:
            raise EngineFull(self.capacity)
        if request.seed is None:
            raise InvalidRequest("seed", "must be given before an image is drawn: use ImageRequest.seeded()")
        self._prompts.check("prompt", request.prompt)
        if request.guided:
            self._prompts.check("negative_prompt", request.negative_prompt)
        width, height = (side_px // self._model.latent_px for side_px in request.drawn_size)
        schedule = self._schedules.of(request.steps, height * width // 4)
        self._tickets += 1
        image = _Image(self._tickets, request, request.seed, priority, schedule, height, width)
        self._inside[image.ticket] = image
        return image

    def _schedule(self) -> list[list[_Image]]:
        """The pack whose turn it is, ready to draw; no pack if nobody waits.

        Images of equal size are neighbours in it, so that their attention is one call.
        """
        waiting = [image for image in self._inside.values() if not image.drawn]
        picked = set(self._planner.pick([_candidate(image) for image in waiting]))
        for image in waiting:
            image.waited = 0 if image.ticket in picked else image.waited + 1
        if any(not image.texts for image in waiting if image.ticket in picked):
            self._read([image for image in waiting if not image.texts])
        pack = [self._inside[ticket] for ticket in picked if ticket in self._inside]
        return [sorted(pack, key=lambda image: (image.tokens, image.ticket))] if pack else []

    def _read(self, images: list[_Image]) -> None:
        """Embed the prompts of all who wait: together they cost less."""
        try:
            with self._on_device(images):
                embeddings = iter(self._prompts.encode(prompt for image in images for prompt in image.prompts))
                for image in images:
                    image.texts = [self._transformer.read(next(embeddings)) for _ in image.prompts]
        except PipelineError as error:
            for half in self._halves(images, error):
                self._read(half)

    def _after(self, pack: list[_Image], error: PipelineError) -> list[list[_Image]]:
        """What to try in the place of a pack that could not be drawn. Nobody in it has moved. Raises Fatal."""
        if isinstance(error, Exhausted) and len(pack) > 1:
            self._planner.shrink(_tokens(pack))
        elif isinstance(error, Exhausted) and pack[0].request.guided and not pack[0].apart:
            pack[0].apart = True
            return [pack]
        return self._halves(pack, error)

    def _halves(self, images: list[_Image], error: PipelineError) -> list[list[_Image]]:
        """The halves of ``images``; one alone is given up, with ``error``. Raises Fatal."""
        if isinstance(error, Fatal):
            raise error
        if len(images) == 1:
            self._fail(images[0], error)
            return []
        half = len(images) // 2
        return [images[:half], images[half:]]

    def _forward(self, pack: Sequence[_Image]) -> list[torch.Tensor]:
        """The velocity [1, tokens, channels] of each image, guided if its request is."""
        with self._on_device(pack):
            branches = [branch for image in pack for branch in self._branches(image)]
            calls = [[branch] for branch in branches] if len(pack) == 1 and pack[0].apart else [branches]
            velocities = chain.from_iterable(map(self._transformer, calls))
            return [_guided(image.request.guidance, *islice(velocities, len(image.texts)))[None] for image in pack]

    def _branches(self, image: _Image) -> list[Branch]:
        latents = self._latents(image)
        timestep = image.schedule.timestep(image.step, latents.dtype)
        return [Branch(latents[0], text, timestep, image.height, image.width) for text in image.texts]

    def _advance(self, pack: Sequence[_Image], velocities: Sequence[torch.Tensor]) -> None:
        """One Euler step, as FlowMatchEulerDiscreteScheduler.step takes it: in float32, then cast."""
        with self._on_device(pack):
            advanced = [_euler(image, velocity) for image, velocity in zip(pack, velocities, strict=True)]
            # One wait for the device, after which the step's seconds are those of its work.
            sound = torch.stack([torch.isfinite(latents).all() for latents in advanced]).tolist()
        for image, latents, velocity, is_sound in zip(pack, advanced, velocities, sound, strict=True):
            image.latents, image.velocity = latents, velocity
            image.step += 1
            if not is_sound:
                self._fail(image, BrokenImage(image.step))

    def _charge(self, pack: Sequence[_Image], seconds: float) -> None:
        """Tell the planner what the step took, and each image its share."""
        tokens = _tokens(pack)
        self._planner.observe(tokens, seconds)
        for image in pack:
            image.drawing_s += seconds * image.tokens / tokens

    def _finish(self) -> list[Finished]:
        """Who ended: those that failed, and those whose pixels are there."""
        for image in [image for image in self._inside.values() if image.drawn and not image.decoding]:
            self._hand_over(image)
        began = perf_counter()
        decoded = self._decoder.collect(wait=all(image.decoding for image in self._inside.values()))
        for ticket, pixels in decoded:
            image = self._inside[ticket]
            image.drawing_s += (perf_counter() - began) / len(decoded)
            if isinstance(pixels, PipelineError):
                self._fail(image, pixels)
            else:
                self._end(Finished(ticket, DrawnImage(pixels, image.step, image.drawing_s)))
        ended, self._ended = self._ended, []
        return ended

    def _hand_over(self, image: _Image) -> None:
        """To the decoder."""
        try:
            with self._on_device([image]):
                self._decoder.submit(image.ticket, self._latents(image), image.request)
            image.decoding = True
        except PipelineError as error:
            self._halves([image], error)

    def _fail(self, image: _Image, error: PipelineError) -> None:
        self._end(Finished(image.ticket, error=error))

    def _end(self, finished: Finished) -> None:
        del self._inside[finished.ticket]
        self._ended.append(finished)

    def _latents(self, image: _Image) -> torch.Tensor:
        """[1, tokens, channels] on the device: noise before the first step."""
        model = self._model
        if image.latents is None:
            image.latents = draw_noise(
                image.seed, channels=model.latent_channels, height=image.height, width=image.width, dtype=model.dtype
            )
        image.latents = image.latents.to(model.device)
        return image.latents

    @contextmanager
    def _on_device(self, images: Sequence[_Image]) -> Iterator[None]:
        """Gives an error of torch its class. It names the largest image: that of a pack is never shown to anybody."""
        try:
            with torch.inference_mode():
                yield
        except (RuntimeError, MemoryError) as error:  # what every error of torch is
            width_px, height_px = max((image.request.drawn_size for image in images), key=prod)
            raise classed(error, width_px, height_px) from error


def _candidate(image: _Image) -> Candidate:
    return Candidate(
        image.ticket,
        image.tokens,
        steps_left=image.request.steps - image.step,
        priority=image.priority,
        waited=image.waited,
    )


def _tokens(pack: Sequence[_Image]) -> int:
    return sum(image.tokens for image in pack)


def _guided(guidance: float, velocity: torch.Tensor, unguided: torch.Tensor | None = None) -> torch.Tensor:
    """Follows OvisImagePipeline.__call__: the product is rounded to the velocities' dtype."""
    return velocity if unguided is None else unguided + guidance * (velocity - unguided)


def _euler(image: _Image, velocity: torch.Tensor) -> torch.Tensor:
    stride = image.schedule.stride(image.step, velocity.dtype)
    assert image.latents is not None
    return (image.latents.to(torch.float32) + stride * velocity).to(velocity.dtype)
