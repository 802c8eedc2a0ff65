"""What tests of the engine draw with, and what they compare with.

The planners here really pack: the product's own may find that sharing does not pay, and then a mixed pack is not
certain. ``Upstream`` is OvisImagePipeline itself, on the very weights of the model that is under test.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from diffusers import OvisImagePipeline
from numpy.typing import NDArray

from pipeline.engine import Engine, Finished
from pipeline.model import Model
from pipeline.planner import Candidate
from pipeline.prompt import TEXT_TOKENS
from pipeline.quiet import quiet
from pipeline.request import ImageRequest
from pipeline.transformer import Branch, PackedTransformer

PACK_SEED = 3
MOST_STEPS = 200
OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2 GiB"


def request_for(prompt: str = "A fox", **fields: object) -> ImageRequest:
    """A small image of two steps, with whatever a test wants otherwise."""
    return ImageRequest.model_validate({"prompt": prompt, "width": 64, "height": 64, "steps": 2, "seed": 1, **fields})


FOUR = [
    request_for("A fox", steps=3, seed=1),
    request_for("狐狸", width=96, steps=2, guidance=1, seed=2),
    request_for("A lighthouse", height=112, steps=3, guidance=2.5, seed=3),
    request_for('A sign: "OPEN"', width=80, height=80, steps=2, seed=4),
]
"""Mixed in size, steps and guidance."""


def finish(engine: Engine) -> dict[int, Finished]:
    """Step until nothing is inside; how each ticket ended. An engine that does not come to an end fails the test."""
    ended: dict[int, Finished] = {}
    for _ in range(MOST_STEPS):
        if engine.idle:
            return ended
        ended |= {finished.ticket: finished for finished in engine.step()}
    raise AssertionError(f"still inside after {MOST_STEPS} steps: {engine.progress()}")


def pixels_of(finished: Finished) -> NDArray[np.uint8]:
    """The picture; an image that failed fails the test, with its error."""
    assert finished.image is not None, finished.error
    return finished.image.pixels


def draw(model: Model, request: ImageRequest) -> NDArray[np.uint8]:
    """By an engine that draws nothing else."""
    engine = Engine(model)
    ticket = engine.submit(request)
    return pixels_of(finish(engine)[ticket])


def final_latents(engine: Engine) -> dict[int, torch.Tensor]:
    """A dict that fills with each ticket's latents [tokens, channels] as they go to be decoded."""
    seen: dict[int, torch.Tensor] = {}
    submit = engine._decoder.submit

    def see_and_submit(ticket: int, latents: torch.Tensor, request: ImageRequest) -> None:
        seen[ticket] = latents[0].cpu()
        submit(ticket, latents, request)

    engine._decoder.submit = see_and_submit  # type: ignore[method-assign]
    return seen


def mean_difference(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> float:
    """Absolute, of 255."""
    return float(np.abs(first.astype(int) - second).mean())


def largest_difference(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> int:
    """Absolute, of 255."""
    return int(np.abs(first.astype(int) - second).max())


def psnr_db(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> float:
    """Infinite if both are equal."""
    error = float(np.mean(np.square(first.astype(float) - second)))
    return 10 * float(np.log10(255**2 / error)) if error else float("inf")


class Everybody:
    """A planner by which all who are inside share every step. Remembers what it was told."""

    def __init__(self) -> None:
        self.packs: list[int] = []  # images
        self.observed: list[tuple[int, float]] = []  # tokens, seconds
        self.too_large: list[int] = []  # tokens

    def pick(self, candidates: Sequence[Candidate]) -> list[int]:
        picked = self.choose(candidates)
        self.packs.append(len(picked))
        return picked

    def choose(self, candidates: Sequence[Candidate]) -> list[int]:
        return [candidate.ticket for candidate in candidates]

    def observe(self, tokens: int, seconds: float) -> None:
        self.observed.append((tokens, seconds))

    def shrink(self, tokens: int) -> None:
        self.too_large.append(tokens)


class Anybody(Everybody):
    """A planner by which a random few share each step, in random order."""

    def __init__(self, seed: int = PACK_SEED) -> None:
        super().__init__()
        self._random = Random(seed)

    def choose(self, candidates: Sequence[Candidate]) -> list[int]:
        tickets = super().choose(candidates)
        return self._random.sample(tickets, self._random.randint(1, len(tickets))) if tickets else []


class Troubled(PackedTransformer):
    """The real packed forward, but ``trouble`` sees each pack before it and may raise."""

    def __init__(self, model: Model, trouble: Callable[[Sequence[Branch]], None]) -> None:
        super().__init__(model.transformer, model.modulations)
        self._trouble = trouble

    def __call__(self, pack: Sequence[Branch]) -> list[torch.Tensor]:
        self._trouble(pack)
        return super().__call__(pack)


def draw_together(
    model: Model, requests: Sequence[ImageRequest], transformer: PackedTransformer | None = None
) -> list[Finished]:
    """All in one pack."""
    engine = Engine(model, Everybody(), transformer=transformer)
    tickets = [engine.submit(request) for request in requests]
    ended = finish(engine)
    return [ended[ticket] for ticket in tickets]


def wait_for_pixels(engine: Engine) -> None:
    """As on CUDA, where a picture that is launched in one step is there in a later one."""
    engine._decoder.collect = lambda *, wait: []  # type: ignore[method-assign]


def tokens_of(pack: Sequence[Branch]) -> int:
    """Text and image tokens of all sequences."""
    return sum(TEXT_TOKENS + len(branch.latents) for branch in pack)


@dataclass(frozen=True)
class Drawn:
    """One image by upstream: latents [tokens, channels] after the last step, and the picture as the request asks."""

    latents: torch.Tensor
    pixels: NDArray[np.uint8]


class Upstream:
    """OvisImagePipeline with a model's own weights. Equal requests are drawn once."""

    def __init__(self, model: Model) -> None:
        with quiet():
            self.pipeline = OvisImagePipeline(
                scheduler=deepcopy(model.scheduler),
                vae=model.vae,
                text_encoder=model.text_encoder,
                tokenizer=model.tokenizer,
                transformer=model.transformer,
            )
        self.pipeline.set_progress_bar_config(disable=True)
        self._drawn: dict[ImageRequest, Drawn] = {}

    def draw(self, request: ImageRequest) -> Drawn:
        """By one call, which nobody else shares."""
        if request not in self._drawn:
            self._drawn[request] = self._draw(request)
        return self._drawn[request]

    def _draw(self, request: ImageRequest) -> Drawn:
        latents: list[torch.Tensor] = []

        def keep(
            _pipeline: object, _step: int, _timestep: object, tensors: dict[str, torch.Tensor]
        ) -> dict[str, object]:
            latents.append(tensors["latents"][0])
            return {}

        width, height = request.drawn_size
        assert request.seed is not None
        image = self.pipeline(
            request.prompt,
            negative_prompt=request.negative_prompt,
            width=width,
            height=height,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance,
            generator=torch.Generator().manual_seed(request.seed),
            callback_on_step_end=keep,
        ).images[0]
        left, top = (width - request.width) // 2, (height - request.height) // 2
        return Drawn(latents[-1], np.asarray(image)[top : top + request.height, left : left + request.width])
