"""The mode for small cards, on a CPU: the same bits with less of the model on the device."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.engine import Engine
from pipeline.model import Model, load_model
from pipeline.prompt import PromptEncoder
from tests.drawing import Everybody, draw, finish, pixels_of, request_for

REQUESTS = [
    request_for("A fox", steps=3),
    request_for("红色横幅", width=176, steps=4, guidance=1.0, seed=2),
    request_for("🌊", negative_prompt="blurred", width=90, height=100, steps=2, guidance=9.0, seed=3),
]


@pytest.fixture(scope="module")
def small(models_dir: Path) -> Model:
    return load_model("tiny", device="cpu", models_dir=models_dir, low_memory=True)


@pytest.mark.parametrize("place", range(len(REQUESTS)))
def test_an_image_alone_is_the_normal_modes_to_the_bit(place: int, small: Model, tiny: Model) -> None:
    assert np.array_equal(draw(small, REQUESTS[place]), draw(tiny, REQUESTS[place]))


def test_a_mixed_pack_is_the_normal_modes_to_the_bit(small: Model, tiny: Model) -> None:
    drawn = []
    for model in (small, tiny):
        engine = Engine(model, Everybody())
        tickets = [engine.submit(request) for request in REQUESTS]
        ended = finish(engine)
        drawn.append([pixels_of(ended[ticket]) for ticket in tickets])
    for one, other in zip(*drawn, strict=True):
        assert np.array_equal(one, other)


def test_an_image_goes_on_in_either_mode(small: Model, tiny: Model) -> None:
    first = Engine(small)
    ticket = first.submit(REQUESTS[0])
    first.step()
    second = Engine(tiny)
    taken_up = second.resume(first.checkpoint(ticket))
    assert np.array_equal(pixels_of(finish(second)[taken_up]), draw(tiny, REQUESTS[0]))


def test_the_encoders_weights_are_off_the_device_between_prompts(small: Model) -> None:
    """accelerate leaves ``meta`` where a weight is not; its own copy stays on the host."""
    PromptEncoder(small).encode(["A fox"])
    assert {weight.device.type for weight in small.text_encoder.parameters()} == {"meta"}


def test_the_adaln_layers_are_gone(small: Model, tiny: Model) -> None:
    left = {name for name, _ in small.transformer.named_parameters()}
    dropped = {name for name, _ in tiny.transformer.named_parameters()} - left
    blocks = 2 * len(tiny.transformer.transformer_blocks) + len(tiny.transformer.single_transformer_blocks)
    assert len(dropped) == 2 * (blocks + 1)  # weight and bias of each, and of the last layer
    assert all("norm" in name and ".linear." in name for name in dropped)


@pytest.mark.parametrize("option", ["fp8", "low_memory"])
def test_float32_is_refused_with_the_options_that_need_bf16(option: str, models_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"made for bfloat16, not for torch\.float32"):
        load_model("tiny", device="cpu", models_dir=models_dir, dtype=torch.float32, **{option: True})


def test_both_options_together_draw_what_fp8_draws(models_dir: Path) -> None:
    fp8, both = (
        load_model("tiny", device="cpu", models_dir=models_dir, fp8=True, low_memory=low_memory)
        for low_memory in (False, True)
    )
    assert np.array_equal(draw(both, REQUESTS[0]), draw(fp8, REQUESTS[0]))
