"""Timesteps, against diffusers' own functions."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.ovis_image.pipeline_ovis_image import calculate_shift, retrieve_timesteps

from pipeline.schedule import REMEMBERED, Schedules

CPU = torch.device("cpu")


def scheduler(**settings: object) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**{"use_dynamic_shifting": True, "shift": 3.0, **settings})


@pytest.mark.parametrize("image_tokens", [16, 256, 276, 1000, 4096, 16384])
def test_the_shift_is_upstreams_to_the_bit(image_tokens: int) -> None:
    assert Schedules(scheduler()).shift(image_tokens) == calculate_shift(image_tokens)


@pytest.mark.parametrize("steps", [1, 2, 8, 50, 100])
@pytest.mark.parametrize("image_tokens", [16, 276, 4096])
@pytest.mark.parametrize(
    "settings", [{}, {"base_shift": 0.3, "max_shift": 2.0, "max_image_seq_len": 8192}, {"use_dynamic_shifting": False}]
)
def test_timesteps_and_sigmas_are_upstreams_to_the_bit(
    steps: int, image_tokens: int, settings: dict[str, object]
) -> None:
    upstream = scheduler(**settings)
    config = upstream.config
    mu = calculate_shift(
        image_tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
    )
    retrieve_timesteps(upstream, steps, CPU, sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    schedule = Schedules(scheduler(**settings)).of(steps, image_tokens)
    assert torch.equal(schedule.timesteps, upstream.timesteps)
    assert torch.equal(schedule.sigmas, upstream.sigmas)
    assert len(schedule.timesteps) == steps
    assert schedule.sigmas[-1] == 0


def test_one_images_schedule_leaves_anothers_and_the_checkpoints_scheduler_alone() -> None:
    checkpoint = scheduler()
    before = checkpoint.timesteps.clone()
    schedules = Schedules(checkpoint)
    first = schedules.of(8, 276)
    kept = first.timesteps.clone()
    schedules.of(5, 4096)
    assert torch.equal(first.timesteps, kept)
    assert torch.equal(checkpoint.timesteps, before)
    assert schedules.of(8, 276) is first


def test_many_sizes_do_not_fill_the_memory() -> None:
    schedules = Schedules(scheduler())
    for tokens in range(16, 16 + REMEMBERED + 5):
        schedules.of(1, tokens)
    assert len(schedules._made) <= REMEMBERED
