"""Draws images, one denoising step at a time.

Images join and leave between two steps; each has its own size, steps, guidance and seed, and ends as the picture that
``OvisImagePipeline.__call__`` alone would have drawn: on equal shapes the same bits, because every expression that
rounds is written as upstream writes it. What comes first is the planner's to say.

It may know no job, no claim and no bucket: a ticket is all that it gives its caller.

Invariants:
- one thread owns an engine, from its making to its end. Nothing is locked;
- a ticket is given once. It leaves by exactly one of: a Finished, ``cancel``, ``drain``;
- an image that fails, fails alone: its neighbours' latents are never touched.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.errors import (
    BrokenImage,
    Drained,
    DrawingFailed,
    EngineFull,
    Exhausted,
    Fatal,
    InvalidRequest,
    PipelineError,
)
from pipeline.model import Model
from pipeline.noise import draw_noise, positions, unpack
from pipeline.planner import Candidate, FirstComeFirstServed, Planner
from pipeline.prompt import TEXT_TOKENS, PromptEncoder
from pipeline.request import ImageRequest
from pipeline.schedule import Schedule, Schedules

CAPACITY = 8


@dataclass(frozen=True)
class DrawnImage:
    """A finished picture."""

    pixels: NDArray[np.uint8]  # [height, width, 3], as the request asked
    steps: int
    drawing_s: float  # that the device worked on it, waiting between its steps not counted


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
    """An image on its way. The tensors are there from its first step on: one that waits costs no device memory."""

    ticket: int
    request: ImageRequest
    seed: int
    step: int = 0
    drawing_s: float = 0.0
    schedule: Schedule | None = None
    latents: torch.Tensor | None = None  # [1, tokens, 64]
    positions: torch.Tensor | None = None  # [tokens, 3]
    prompt: torch.Tensor | None = None  # [1, 256, D]
    negative: torch.Tensor | None = None  # likewise; None if one branch is drawn


class Engine:
    """Takes requests, gives pictures. See the module for what holds."""

    def __init__(self, model: Model, planner: Planner | None = None, capacity: int = CAPACITY) -> None:
        self.capacity = capacity
        self._model = model
        self._planner = planner or FirstComeFirstServed()
        self._prompts = PromptEncoder(model)
        self._schedules = Schedules(model.scheduler, model.device)
        self._text_positions = _text_positions(model)
        self._inside: dict[int, _Image] = {}
        self._tickets = 0
        self._drained = False

    @property
    def idle(self) -> bool:
        """Whether nothing is inside, so that a step would do nothing."""
        return not self._inside

    def submit(self, request: ImageRequest) -> int:
        """Take ``request`` in and return its ticket. The device is not touched.

        Raises InvalidRequest (PromptTooLong among them), EngineFull, and Drained after ``drain``.
        """
        if self._drained:
            raise Drained("the engine takes no more images in")
        if len(self._inside) >= self.capacity:
            raise EngineFull(self.capacity)
        if request.seed is None:
            raise InvalidRequest("seed", "must be given before an image is drawn: use ImageRequest.seeded()")
        self._prompts.check("prompt", request.prompt)
        if request.guided:
            self._prompts.check("negative_prompt", request.negative_prompt)
        self._tickets += 1
        self._inside[self._tickets] = _Image(self._tickets, request, request.seed)
        return self._tickets

    def step(self) -> list[Finished]:
        """One denoising step for the images that the planner picks; returns those that ended with it.

        Raises Fatal if the device is dead: nothing of this engine can be trusted from then on.
        """
        finished = []
        for image in self._schedule():
            try:
                with self._on_device(image):
                    self._advance(image, self._forward(image))
                    drawn = self._finish(image)
            except Fatal:
                raise
            except PipelineError as error:
                finished.append(Finished(image.ticket, error=error))
            else:
                if drawn is None:
                    continue
                finished.append(Finished(image.ticket, DrawnImage(drawn, image.step, image.drawing_s)))
            del self._inside[image.ticket]
        return finished

    def cancel(self, ticket: int) -> bool:
        """Take an image out; False if it is not inside (any more)."""
        return self._inside.pop(ticket, None) is not None

    def drain(self) -> list[int]:
        """Take no more in, give up what is inside, and return its tickets, the oldest first."""
        self._drained = True
        tickets = sorted(self._inside)
        self._inside.clear()
        return tickets

    def progress(self) -> dict[int, Progress]:
        """How far each image is that is inside."""
        return {ticket: Progress(image.step, image.request.steps) for ticket, image in self._inside.items()}

    def _schedule(self) -> list[_Image]:
        """Whose turn it is."""
        candidates = [
            Candidate(image.ticket, self._tokens(image.request), image.request.steps - image.step)
            for image in self._inside.values()
        ]
        return [self._inside[ticket] for ticket in self._planner.pick(candidates)]

    def _forward(self, image: _Image) -> torch.Tensor:
        """The velocity [1, tokens, 64] at the image's next timestep, guided if the request is."""
        if image.latents is None:
            self._begin(image)
        velocity = self._velocity(image, image.prompt)
        if image.negative is not None:
            unguided = self._velocity(image, image.negative)
            velocity = unguided + image.request.guidance * (velocity - unguided)
        return velocity

    def _advance(self, image: _Image, velocity: torch.Tensor) -> None:
        """One Euler step, as FlowMatchEulerDiscreteScheduler.step takes it: in float32, then cast."""
        assert image.schedule is not None
        assert image.latents is not None
        sigmas = image.schedule.sigmas
        dt = sigmas[image.step + 1] - sigmas[image.step]
        latents = image.latents.to(torch.float32) + dt * velocity
        image.latents = latents.to(velocity.dtype)
        image.step += 1
        # Also waits for the device, so that the step's seconds are those of its work.
        if not torch.isfinite(image.latents).all():
            raise BrokenImage(image.step)

    def _finish(self, image: _Image) -> NDArray[np.uint8] | None:
        """The pixels, if that was the image's last step."""
        if image.step < image.request.steps:
            return None
        pixels = self._decode(image)
        return _crop(pixels, image.request.width, image.request.height)

    def _begin(self, image: _Image) -> None:
        """Noise, timesteps and embeddings: what an image needs from its first step on."""
        model, request = self._model, image.request
        height, width = self._latent_size(request)
        noise = draw_noise(image.seed, channels=model.latent_channels, height=height, width=width, dtype=model.dtype)
        image.schedule = self._schedules.of(request.steps, noise.shape[1])
        image.positions = positions(height=height, width=width, device=model.device, dtype=model.dtype)
        image.prompt = self._prompts.encode(request.prompt)
        image.negative = self._prompts.encode(request.negative_prompt) if request.guided else None
        image.latents = noise.to(model.device)

    def _velocity(self, image: _Image, embedding: torch.Tensor | None) -> torch.Tensor:
        assert image.schedule is not None
        assert image.latents is not None
        timestep = image.schedule.timesteps[image.step].expand(1).to(image.latents.dtype)
        (velocity,) = self._model.transformer(
            hidden_states=image.latents,
            timestep=timestep / 1000,
            encoder_hidden_states=embedding,
            txt_ids=self._text_positions,
            img_ids=image.positions,
            return_dict=False,
        )
        assert isinstance(velocity, torch.Tensor)
        return velocity

    def _decode(self, image: _Image) -> NDArray[np.uint8]:
        """[H, W, 3] as drawn. Follows VaeImageProcessor.postprocess, on the device up to the bytes."""
        assert image.latents is not None
        vae = self._model.vae
        height, width = self._latent_size(image.request)
        latents = unpack(image.latents, height=height, width=width)
        latents = (latents / vae.config.scaling_factor) + vae.config.shift_factor
        (decoded,) = vae.decode(latents, return_dict=False)
        if not torch.isfinite(decoded).all():
            raise BrokenImage(image.step)
        shades = (decoded * 0.5 + 0.5).clamp(0, 1)[0].permute(1, 2, 0).float()
        return np.asarray((shades * 255).round().to(torch.uint8).cpu().numpy())

    def _latent_size(self, request: ImageRequest) -> tuple[int, int]:
        """(height, width) in latents."""
        width_px, height_px = request.drawn_size
        return height_px // self._model.latent_px, width_px // self._model.latent_px

    def _tokens(self, request: ImageRequest) -> int:
        height, width = self._latent_size(request)
        return (TEXT_TOKENS + height * width // 4) * (2 if request.guided else 1)

    @contextmanager
    def _on_device(self, image: _Image) -> Iterator[None]:
        """Times the device's work for ``image``, and gives torch's errors their class."""
        start = perf_counter()
        try:
            with torch.inference_mode():
                yield
        except RuntimeError as error:  # what every error of torch is
            raise _classed(error, image.request) from error
        finally:
            image.drawing_s += perf_counter() - start


def _classed(error: RuntimeError, request: ImageRequest) -> PipelineError:
    """What an error of torch means for the image that met it."""
    message = next(iter(str(error).splitlines()), type(error).__name__)
    if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in message:
        return Exhausted(*request.drawn_size, message)
    if isinstance(error, torch.AcceleratorError) or "CUDA error" in message:
        return Fatal(f"the device is dead: {message}")
    return DrawingFailed(f"torch could not draw the image: {message}")


def _text_positions(model: Model) -> torch.Tensor:
    """Where the text tokens stand, for RoPE: [256, 3] of (0, n, n)."""
    order = torch.arange(TEXT_TOKENS)
    ids = torch.stack((torch.zeros_like(order), order, order), dim=-1)
    return ids.to(device=model.device, dtype=model.dtype)


def _crop(pixels: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    """The centre of ``pixels``; an odd pixel too many goes at the bottom or the right."""
    top = (pixels.shape[0] - height) // 2
    left = (pixels.shape[1] - width) // 2
    return np.ascontiguousarray(pixels[top : top + height, left : left + width])
