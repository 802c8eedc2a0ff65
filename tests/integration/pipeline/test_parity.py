"""Every image is what OvisImagePipeline alone would have drawn, to the bit."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import OvisImagePipeline
from numpy.typing import NDArray

from pipeline.engine import Engine
from pipeline.model import Model
from pipeline.planner import Candidate
from pipeline.quiet import quiet
from pipeline.request import ImageRequest

REQUESTS = [
    ImageRequest(prompt='A sign: "OPEN LATE"', width=128, height=96, steps=4, guidance=5.0, seed=1),
    ImageRequest(prompt="红色横幅,写着“全场五折”", width=176, height=64, steps=6, guidance=3.5, seed=2),
    ImageRequest(prompt="A lighthouse 🌊", width=64, height=64, steps=3, guidance=1.0, seed=3),
    ImageRequest(
        prompt="A fox", negative_prompt="blurred", width=96, height=160, steps=5, guidance=12.5, seed=2**63 - 1
    ),
    ImageRequest(prompt="A fox", width=100, height=77, steps=1, guidance=2.0, seed=5),
    ImageRequest(prompt="A fox", width=65, height=79, steps=2, guidance=0.0, seed=6),
]


class RoundRobin:
    """Everybody's turn, one after the other: nobody's steps are beside each other."""

    def __init__(self) -> None:
        self._last = 0

    def pick(self, candidates: Sequence[Candidate]) -> list[int]:
        tickets = sorted(candidate.ticket for candidate in candidates)
        later = [ticket for ticket in tickets if ticket > self._last]
        self._last = (later or tickets)[0]
        return [self._last]


def draw_interleaved(model: Model, requests: Sequence[ImageRequest]) -> list[NDArray[np.uint8]]:
    """All by one engine; each but the first two joins one step after its neighbour."""
    engine, waiting = Engine(model, RoundRobin(), capacity=len(requests)), list(requests)
    tickets = [engine.submit(waiting.pop(0)), engine.submit(waiting.pop(0))]
    drawn = {}
    while not engine.idle:
        for finished in engine.step():
            assert finished.image is not None, finished.error
            drawn[finished.ticket] = finished.image.pixels
        if waiting:
            tickets.append(engine.submit(waiting.pop(0)))
    return [drawn[ticket] for ticket in tickets]


def draw_upstream(upstream: OvisImagePipeline, request: ImageRequest) -> NDArray[np.uint8]:
    width, height = request.drawn_size
    assert request.seed is not None
    image = upstream(
        request.prompt,
        negative_prompt=request.negative_prompt,
        width=width,
        height=height,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance,
        generator=torch.Generator().manual_seed(request.seed),
    ).images[0]
    left, top = (width - request.width) // 2, (height - request.height) // 2
    return np.asarray(image)[top : top + request.height, left : left + request.width]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_images_that_interleave_are_each_what_upstream_draws_alone(
    dtype: torch.dtype, tiny: Model, tiny_float32: Model, tiny_folder: Path
) -> None:
    with quiet():
        upstream = OvisImagePipeline.from_pretrained(tiny_folder, dtype=dtype)
    upstream.set_progress_bar_config(disable=True)
    model = tiny if dtype is torch.bfloat16 else tiny_float32
    for request, pixels in zip(REQUESTS, draw_interleaved(model, REQUESTS), strict=True):
        expected = draw_upstream(upstream, request)
        assert np.array_equal(pixels, expected), f"{request.width}×{request.height}"


def test_the_embedding_of_a_prompt_is_upstreams_to_the_bit(tiny: Model, tiny_folder: Path) -> None:
    from pipeline.prompt import PromptEncoder

    with quiet():
        upstream = OvisImagePipeline.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    for prompt in ("", "A fox", "狐狸 🦊", "x" * 246):
        expected = upstream._get_ovis_prompt_embeds(prompt)
        assert torch.equal(PromptEncoder(tiny).encode(prompt), expected)
