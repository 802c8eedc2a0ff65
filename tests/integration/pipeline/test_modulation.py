"""The table of what the AdaLN layers say: upstream's bits, and never more rows than it may keep."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, OvisImageTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipeline.model import Model
from pipeline.modulation import HIGHEST, Modulations
from pipeline.request import SIDE_MAX_PX, SIDE_MIN_PX, SIDE_STEP_PX, STEPS_MAX
from pipeline.schedule import Schedules

LOWEST = 8.0
TIMESTEPS = [1000.0, 868.0, 502.0, 131.0, 31.375, 10.0]
"""In bf16, 502 and 31.375 divided by 1000 and multiplied again are other numbers."""
PATCHES = SIDE_MIN_PX // SIDE_STEP_PX, SIDE_MAX_PX // SIDE_STEP_PX


def adaln_layers(transformer: OvisImageTransformer2DModel) -> list[nn.Module]:
    """By name, so that no order is taken over from the code under test."""
    doubles = [norm for block in transformer.transformer_blocks for norm in (block.norm1, block.norm1_context)]
    return [*doubles, *(block.norm for block in transformer.single_transformer_blocks), transformer.norm_out]


@contextmanager
def said_to_upstream(transformer: OvisImageTransformer2DModel) -> Iterator[list[torch.Tensor]]:
    """What every AdaLN layer answers inside the block, in the order of upstream's own forward."""
    said: list[torch.Tensor] = []
    hooks = [
        norm.linear.register_forward_hook(lambda _module, _given, output: said.append(output))
        for norm in adaln_layers(transformer)
    ]
    try:
        yield said
    finally:
        for hook in hooks:
            hook.remove()


def by_upstream(transformer: OvisImageTransformer2DModel, timestep: float) -> list[torch.Tensor]:
    ids, dtype = torch.zeros(4, 3, dtype=transformer.dtype), transformer.dtype
    with said_to_upstream(transformer) as said, torch.inference_mode():
        transformer(
            hidden_states=torch.zeros(1, 4, transformer.config.in_channels, dtype=dtype),
            encoder_hidden_states=torch.zeros(1, 4, transformer.config.joint_attention_dim, dtype=dtype),
            timestep=torch.tensor([timestep]).to(dtype) / 1000,
            txt_ids=ids,
            img_ids=ids,
        )
    return said


@torch.inference_mode()
def rows(modulations: Modulations, timesteps: Sequence[float]) -> list[torch.Tensor]:
    return list(modulations.of(timesteps))


@pytest.fixture
def transformer(tiny: Model) -> OvisImageTransformer2DModel:
    """A copy that a test may spoil."""
    return deepcopy(tiny.transformer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_each_row_is_upstreams_to_the_bit_whoever_asks_beside_it(
    dtype: torch.dtype, tiny: Model, tiny_float32: Model
) -> None:
    transformer = tiny.transformer if dtype is torch.bfloat16 else tiny_float32.transformer
    together = rows(Modulations(transformer), TIMESTEPS)
    for place, timestep in enumerate(TIMESTEPS):
        expected = by_upstream(transformer, timestep)
        for layer, of_one in zip(together, expected, strict=True):
            assert torch.equal(layer[place], of_one[0])


def test_a_row_is_computed_once(transformer: OvisImageTransformer2DModel) -> None:
    modulations = Modulations(transformer)
    with said_to_upstream(transformer) as said:
        first = rows(modulations, [500.0])
        asked = len(said)
        again = rows(modulations, [500.0, 500.0])
        assert len(said) == asked == len(adaln_layers(transformer))
    assert all(torch.equal(one, other[1:]) for one, other in zip(first, again, strict=True))


def test_no_more_rows_are_kept_than_may_be_and_the_last_used_stay(transformer: OvisImageTransformer2DModel) -> None:
    modulations = Modulations(transformer, remembered=3)
    with said_to_upstream(transformer) as said:
        rows(modulations, [1.0, 2.0, 3.0])
        rows(modulations, [1.0])
        rows(modulations, [4.0])  # in the place of 2
        before = len(said)
        rows(modulations, [1.0, 3.0, 4.0])
        assert len(said) == before
        rows(modulations, [2.0])
        assert len(said) > before
    for timestep in range(100):
        rows(modulations, [float(timestep)])
    assert len(modulations._rows) == 3


def test_a_step_may_need_more_rows_than_are_kept(transformer: OvisImageTransformer2DModel) -> None:
    few, many = (rows(Modulations(transformer, remembered=size), TIMESTEPS) for size in (2, 100))
    assert all(torch.equal(one, other) for one, other in zip(few, many, strict=True))


def test_a_table_in_the_layers_place_says_the_same_bits(transformer: OvisImageTransformer2DModel) -> None:
    timesteps = bfloat16_between(LOWEST, HIGHEST)
    expected = rows(Modulations(transformer, remembered=len(timesteps)), timesteps)
    replaced = Modulations(transformer)
    replaced.replace_layers(torch.device("cpu"), lowest=LOWEST)
    for layer, of_layers in zip(rows(replaced, timesteps), expected, strict=True):
        assert torch.equal(layer, of_layers)


def test_the_layers_memory_is_given_back(transformer: OvisImageTransformer2DModel) -> None:
    layers = {id(weight) for norm in adaln_layers(transformer) for weight in norm.parameters()}
    modulations = Modulations(transformer)
    modulations.replace_layers(torch.device("cpu"), lowest=LOWEST)
    assert layers
    assert not layers & {id(weight) for weight in transformer.parameters()}
    assert all(norm.linear is None for norm in adaln_layers(transformer))
    storages = {row.untyped_storage().data_ptr(): row.untyped_storage().nbytes() for row in modulations._rows.values()}
    widths = sum(layer.shape[1] for layer in rows(modulations, [500.0]))
    assert sum(storages.values()) == len(bfloat16_between(LOWEST, HIGHEST)) * widths * 2


def test_a_replaced_table_never_forgets_a_row(transformer: OvisImageTransformer2DModel) -> None:
    """Nobody could compute it again: the layers are gone."""
    timesteps = bfloat16_between(LOWEST, HIGHEST)
    modulations = Modulations(transformer, remembered=3)
    modulations.replace_layers(torch.device("cpu"), lowest=LOWEST)
    first, again = ([rows(modulations, [timestep]) for timestep in timesteps] for _ in range(2))
    assert len(modulations._rows) == len(timesteps) > 3
    for before, after in zip(first, again, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


SCHEDULERS = [
    {"use_dynamic_shifting": True, "shift": 3.0},
    {},  # does not shift
    {"use_dynamic_shifting": True, "base_shift": 0.1, "max_shift": 3.0},
]


@pytest.mark.parametrize("config", SCHEDULERS, ids=str)
def test_every_timestep_of_the_smallest_and_the_largest_image_is_in_the_table(config: dict[str, Any]) -> None:
    """The shift grows with the number of tokens, so all other sizes lie between these two."""
    schedules = Schedules(FlowMatchEulerDiscreteScheduler(**config))
    asked: set[float] = set()
    for patches in PATCHES:
        for steps in range(1, STEPS_MAX + 1):
            asked |= set(schedules.of(steps, patches**2).timesteps.bfloat16().tolist())
    assert asked <= set(bfloat16_between(rounded(schedules.lowest_timestep), HIGHEST))
    assert min(asked) == rounded(schedules.lowest_timestep)


@settings(max_examples=300, deadline=None)
@given(st.integers(*PATCHES), st.integers(*PATCHES), st.integers(1, STEPS_MAX))
def test_every_timestep_of_any_size_is_in_the_table(tiny: Model, height: int, width: int, steps: int) -> None:
    schedules = Schedules(tiny.scheduler)
    schedule = schedules.of(steps, height * width)
    asked = {schedule.timestep(step, torch.bfloat16) for step in range(steps)}
    assert asked <= set(bfloat16_between(rounded(schedules.lowest_timestep), HIGHEST))


def rounded(timestep: float) -> float:
    return torch.tensor(timestep).bfloat16().item()


def bfloat16_between(lowest: float, highest: float) -> list[float]:
    """By trying every 16 bits that there are, which is not how the code under test finds them."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    every = bits.view(torch.bfloat16)
    return sorted(every[(every >= lowest) & (every <= highest)].tolist())
