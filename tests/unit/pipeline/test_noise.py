"""Noise, packing and positions, against diffusers' own functions."""

import pytest
import torch
from diffusers import OvisImagePipeline

from pipeline.noise import draw_noise, pack, positions, unpack

SIZES = [(8, 8), (12, 92), (64, 16)]


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_seed_is_the_noise_that_upstream_draws_from_it(height: int, width: int, dtype: torch.dtype) -> None:
    drawn = torch.randn((1, 16, height, width), generator=torch.Generator().manual_seed(41), dtype=dtype)
    expected = OvisImagePipeline._pack_latents(drawn, 1, 16, height, width)
    assert torch.equal(draw_noise(41, channels=16, height=height, width=width, dtype=dtype), expected)


def test_the_largest_seed_draws_and_differs_from_its_neighbour() -> None:
    last, one_less = (
        draw_noise(seed, channels=16, height=8, width=8, dtype=torch.float32) for seed in (2**63 - 1, 2**63 - 2)
    )
    assert not torch.equal(last, one_less)


def test_drawing_noise_leaves_the_process_wide_generator_alone() -> None:
    before = torch.get_rng_state()
    draw_noise(1, channels=16, height=8, width=8, dtype=torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_unpacking_undoes_packing(height: int, width: int) -> None:
    latents = torch.arange(16 * height * width).reshape(1, 16, height, width)
    assert torch.equal(unpack(pack(latents), height=height, width=width), latents)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_positions_are_upstreams(height: int, width: int) -> None:
    expected = OvisImagePipeline._prepare_latent_image_ids(1, height // 2, width // 2, "cpu", torch.bfloat16)
    found = positions(height=height, width=width, device=torch.device("cpu"), dtype=torch.bfloat16)
    assert torch.equal(found, expected)
