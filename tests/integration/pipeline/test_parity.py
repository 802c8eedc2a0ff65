"""Every image is what OvisImagePipeline alone would have drawn, whoever shares its steps.

In float32 latents are within 1e-4 and PNGs within 1 of 255. In bf16 an unguided image alone has the shapes of
upstream's own forward, and its bits; in a mixed pack other kernels round otherwise, and it is the same picture to the
eye.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import OvisImagePipeline
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from pipeline import image_file
from pipeline.engine import CAPACITY, Engine
from pipeline.model import Model
from pipeline.planner import Planner, SharedSteps
from pipeline.prompt import PromptEncoder
from pipeline.quiet import quiet
from pipeline.request import ImageRequest
from tests.drawing import (
    Anybody,
    Drawn,
    Everybody,
    Upstream,
    final_latents,
    finish,
    largest_difference,
    pixels_of,
    psnr_db,
    request_for,
)

LATENTS_WITHIN = 1e-4
TO_THE_EYE_DB = 40.0
SLOWEST = 99  # a step that never comes

REQUESTS = [
    request_for('A sign: "OPEN LATE"', width=128, height=96, steps=4, guidance=5.0, seed=1),
    request_for("红色横幅,写着“全场五折”", width=176, height=64, steps=6, guidance=3.5, seed=2),
    request_for("A lighthouse 🌊", width=64, height=64, steps=3, guidance=1.0, seed=3),
    request_for("A fox", negative_prompt="blurred", width=96, height=160, steps=5, guidance=12.5, seed=2**63 - 1),
    request_for("A fox", width=100, height=77, steps=1, guidance=2.0, seed=5),
    request_for("A fox", width=65, height=79, steps=2, guidance=0.0, seed=6),
    request_for("منارة عند الغروب", width=80, height=80, steps=6, guidance=7.0, seed=7),
    request_for("Лиса в снегу", width=192, height=64, steps=5, guidance=1.5, seed=8),
    request_for('A poster that says "JAZZ"', width=64, height=128, steps=3, guidance=20.0, seed=9),
    request_for("きつね", width=64, height=64, steps=4, guidance=4.0, seed=10),
    request_for("A fox", width=64, height=64, steps=2, guidance=4.0, seed=11),
    request_for("x" * 246, width=112, height=64, steps=4, guidance=5.0, seed=12),
    request_for(".", negative_prompt="x" * 246, width=90, height=90, steps=3, guidance=5.0, seed=13),
    request_for("A red square", width=144, height=96, steps=5, guidance=6.0, seed=14),
]
CANCELLED, MOVED = 10, 7


@dataclass(frozen=True)
class Traveller:
    """An image on its way through one or two engines. Times are in steps of the engine."""

    request: ImageRequest
    joins_at: int = 0
    cancelled_at: int = SLOWEST
    moves_at: int = SLOWEST


@dataclass
class Journey:
    """Travellers and the engines that they go through: ``here``, and ``there`` for those that move."""

    here: Engine
    there: Engine
    drawn: dict[int, Drawn] = field(default_factory=dict)  # by place among the travellers

    def go(self, travellers: Sequence[Traveller]) -> None:
        """Until all have arrived, or were cancelled."""
        waiting = dict(enumerate(travellers))
        inside: dict[int, int] = {}  # tickets by place
        moved: dict[int, int] = {}
        ended, latents = {}, (final_latents(self.here), final_latents(self.there))
        now = 0
        while waiting or not self.here.idle:
            for place, one in list(waiting.items()):
                if one.joins_at <= now:
                    inside[place] = self.here.submit(waiting.pop(place).request)
            ended |= {finished.ticket: finished for finished in self.here.step()}
            now += 1
            for place, ticket in list(inside.items()):
                if now >= travellers[place].cancelled_at and ticket in self.here.progress():
                    self.here.cancel(ticket)
                    del inside[place]
                elif now >= travellers[place].moves_at and ticket in self.here.progress():
                    moved[place] = self.there.resume(self.here.checkpoint(ticket))
                    self.here.cancel(ticket)
                    del inside[place]
        self.drawn |= {place: Drawn(latents[0][ticket], pixels_of(ended[ticket])) for place, ticket in inside.items()}
        ended = finish(self.there)
        self.drawn |= {place: Drawn(latents[1][ticket], pixels_of(ended[ticket])) for place, ticket in moved.items()}


def travel(model: Model, travellers: Sequence[Traveller], planner: Planner) -> dict[int, Drawn]:
    """What became of each that was not cancelled, by its place."""
    capacity = len(travellers)
    journey = Journey(Engine(model, planner, capacity), Engine(model, Everybody(), capacity))
    journey.go(travellers)
    return journey.drawn


def png(pixels: NDArray[np.uint8], request: ImageRequest) -> NDArray[np.uint8]:
    """What a reader of the image's file sees."""
    return np.asarray(Image.open(io.BytesIO(image_file.encode(pixels, request, "tiny", "x"))))


def check(drawn: Drawn, request: ImageRequest, upstream: Upstream) -> None:
    expected = upstream.draw(request)
    away = float((drawn.latents - expected.latents).abs().max())
    assert away <= LATENTS_WITHIN, f"latents are {away} away: {request!r}"
    assert largest_difference(png(drawn.pixels, request), expected.pixels) <= 1, request


@pytest.fixture(scope="module")
def upstream(tiny: Model) -> Upstream:
    return Upstream(tiny)


@pytest.fixture(scope="module")
def upstream_float32(tiny_float32: Model) -> Upstream:
    return Upstream(tiny_float32)


@pytest.mark.parametrize(
    "planner",
    [Everybody(), Anybody(), SharedSteps(8192, capacity=len(REQUESTS)), SharedSteps(1, capacity=len(REQUESTS))],
    ids=["all share", "some share", "the product's", "one by one"],
)
def test_a_mix_of_images_is_each_what_upstream_draws_alone(
    planner: Planner, tiny_float32: Model, upstream_float32: Upstream
) -> None:
    travellers = [Traveller(request, joins_at=max(0, place - 4)) for place, request in enumerate(REQUESTS)]
    travellers[CANCELLED] = Traveller(REQUESTS[CANCELLED], joins_at=1, cancelled_at=2)
    travellers[MOVED] = Traveller(REQUESTS[MOVED], joins_at=2, moves_at=4)
    drawn = travel(tiny_float32, travellers, planner)
    assert len(REQUESTS) - 1 <= len(drawn) + (CANCELLED in drawn) <= len(REQUESTS)
    assert len(drawn) >= 12
    for place, one in drawn.items():
        check(one, REQUESTS[place], upstream_float32)


@pytest.mark.parametrize(
    "request_alone",
    [
        request_for("A fox", steps=3, guidance=1.0),
        request_for("红色横幅,写着“全场五折”", width=176, steps=4, guidance=0.0, seed=2),
        request_for("x" * 246, width=100, height=77, steps=2, guidance=1.0, seed=3),
        request_for("🌊", width=192, height=144, steps=5, guidance=0.5, seed=4),
    ],
    ids=["64×64", "176×64", "100×77", "192×144"],
)
def test_the_latents_of_an_unguided_image_alone_are_upstreams_to_the_bit_in_bf16(
    request_alone: ImageRequest, tiny: Model, upstream: Upstream
) -> None:
    (drawn,) = travel(tiny, [Traveller(request_alone)], Everybody()).values()
    expected = upstream.draw(request_alone)
    assert drawn.latents.dtype == torch.bfloat16
    assert torch.equal(drawn.latents, expected.latents)
    # The VAE runs in float32 on a CPU, the pipeline's in bf16: its rounding is all that differs.
    assert psnr_db(png(drawn.pixels, request_alone), expected.pixels) > 45


def test_images_of_mixed_packs_are_upstreams_to_the_eye_in_bf16(tiny: Model, upstream: Upstream) -> None:
    travellers = [Traveller(request, joins_at=place // 4) for place, request in enumerate(REQUESTS)]
    drawn = travel(tiny, travellers, Everybody())
    assert len(drawn) == len(REQUESTS)
    for place, one in drawn.items():
        expected = upstream.draw(REQUESTS[place])
        assert psnr_db(png(one.pixels, REQUESTS[place]), expected.pixels) >= TO_THE_EYE_DB, REQUESTS[place]


prompts = st.sampled_from(["A fox", "狐狸", "منارة", "лиса", "🦊🌊", "きつね", "a", "x" * 246]) | st.text(
    st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20
).filter(str.strip)
sides_px = st.integers(4, 12).map(lambda patches: 16 * patches) | st.integers(64, 192)
requests = st.builds(
    ImageRequest,
    prompt=prompts,
    negative_prompt=st.just("") | prompts,
    width=sides_px,
    height=sides_px,
    steps=st.integers(1, 6),
    guidance=st.just(1.0) | st.floats(0, 12),
    seed=st.integers(0, 2**63 - 1),
)
moments = st.just(SLOWEST) | st.integers(1, 6)
travellers_of_all_kinds = st.lists(
    st.builds(Traveller, requests, joins_at=st.integers(0, 5), cancelled_at=moments, moves_at=moments),
    min_size=1,
    max_size=CAPACITY,
)


@settings(max_examples=20, deadline=None)
@given(travellers_of_all_kinds, st.integers(0, 2**16))
@example([Traveller(request_for(guidance=guidance), joins_at=at) for at, guidance in enumerate((1.0, 5.0, 9.0))], 0)
def test_any_mix_in_any_company_is_each_what_upstream_draws_alone(
    tiny_float32: Model, upstream_float32: Upstream, travellers: list[Traveller], seed: int
) -> None:
    drawn = travel(tiny_float32, travellers, Anybody(seed))
    for place, one in drawn.items():
        check(one, travellers[place].request, upstream_float32)
    forgotten = {place for place, one in enumerate(travellers) if one.cancelled_at < SLOWEST}
    assert set(range(len(travellers))) - set(drawn) <= forgotten


@pytest.mark.parametrize("prompt", ["", "A fox", "狐狸 🦊", "x" * 246])
def test_the_embedding_of_a_prompt_is_upstreams_to_the_bit(prompt: str, tiny: Model, tiny_folder: Path) -> None:
    with quiet():
        upstream = OvisImagePipeline.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    (embedding,) = PromptEncoder(tiny).encode([prompt])
    assert torch.equal(embedding, upstream._get_ovis_prompt_embeds(prompt)[0])


def test_the_last_token_of_the_longest_prompt_still_counts(tiny: Model) -> None:
    first, second = PromptEncoder(tiny).encode(["x" * 245 + "y", "x" * 246])
    assert not torch.equal(first, second)


def test_only_the_last_prompts_are_remembered(tiny: Model) -> None:
    encoder, rows = PromptEncoder(tiny, remembered=2), []
    hook = tiny.text_encoder.register_forward_hook(lambda *_: rows.append(1))
    try:
        for prompt in ("one", "two", "one", "three", "one", "two"):
            encoder.encode([prompt])
    finally:
        hook.remove()
    assert len(rows) == 4  # "two" again, for "one" was asked for in between
