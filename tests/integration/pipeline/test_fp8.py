"""Linear layers in 8 bits: how far they are from those in bf16, and that no input breaks them."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from diffusers import OvisImageTransformer2DModel
from torch import nn

from pipeline.engine import Engine
from pipeline.fp8 import LARGEST, Fp8Linear, quantise
from pipeline.model import Model, load_model
from tests.drawing import Everybody, draw, finish, pixels_of, psnr_db, request_for

NEAR_DB = 25.0
"""28.5 to 41.6 dB were measured over these requests: the tiny model, 6 steps, a CPU."""
REQUESTS = [
    request_for("A fox", width=128, height=96, steps=6, seed=1),
    request_for("红色横幅", width=176, steps=6, guidance=3.5, seed=2),
    request_for("A lighthouse", width=96, height=96, steps=6, guidance=1.0, seed=3),
    request_for('A sign: "OPEN"', width=64, height=128, steps=6, guidance=9.0, seed=4),
]


def linear_of(inputs: int = 64, outputs: int = 96) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Linear(inputs, outputs, dtype=torch.bfloat16).requires_grad_(False)


def tokens_of(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).bfloat16()


def relative_error(outputs: torch.Tensor, expected: torch.Tensor) -> float:
    return float((outputs.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("shape", [(1, 64), (300, 64), (2, 5, 64)], ids=str)
def test_its_outputs_are_within_some_percent_of_those_in_bf16(shape: tuple[int, ...]) -> None:
    linear, tokens = linear_of(), tokens_of(*shape)
    outputs = Fp8Linear.of(linear)(tokens)
    assert (outputs.shape, outputs.dtype) == ((*shape[:-1], 96), torch.bfloat16)
    assert 0.005 < relative_error(outputs, linear(tokens)) < 0.05


def test_it_computes_what_its_rounded_numbers_say() -> None:
    """The product of the rounded weights and tokens, in float64: no error but that of rounding."""
    layer, tokens = Fp8Linear.of(linear_of()), tokens_of(50, 64)
    scale = tokens.abs().amax(dim=1, keepdim=True).double() / LARGEST
    rounded = (tokens.float() / scale.float()).to(torch.float8_e4m3fn).double() * scale
    weight = layer.weight.double() * layer.scale.double()
    expected = rounded @ weight.t() + layer.bias.double()
    assert relative_error(layer(tokens), expected) < 0.005


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_how_large_a_token_or_a_row_is_does_not_matter(factor: float) -> None:
    linear, tokens = linear_of(), tokens_of(50, 64)
    linear.bias.zero_()
    linear.weight[::2] *= factor
    tokens[::3] *= factor
    outputs, expected = Fp8Linear.of(linear)(tokens), linear(tokens)
    for some_tokens in (slice(0, None, 3), slice(1, None, 3)):
        for some_rows in (slice(0, None, 2), slice(1, None, 2)):
            assert relative_error(outputs[some_tokens, some_rows], expected[some_tokens, some_rows]) < 0.05


def test_zeros_give_the_bias_and_nothing_else() -> None:
    linear = linear_of()
    linear.weight[3] = 0
    layer = Fp8Linear.of(linear)
    assert torch.equal(layer(torch.zeros(4, 64, dtype=torch.bfloat16)), linear.bias.expand(4, -1))
    assert torch.equal(layer(tokens_of(4, 64))[:, 3], linear.bias[3].expand(4))


def test_a_token_of_zeros_leaves_its_neighbours_alone() -> None:
    layer, tokens = Fp8Linear.of(linear_of()), tokens_of(4, 64)
    before = layer(tokens)
    tokens[1] = 0
    assert torch.equal(layer(tokens)[[0, 2, 3]], before[[0, 2, 3]])


def test_the_largest_and_the_smallest_numbers_of_bf16_do_not_become_nan() -> None:
    linear, numbers = linear_of(), torch.finfo(torch.bfloat16)
    layer = Fp8Linear.of(linear)
    for number in (numbers.max, -numbers.max, numbers.tiny, numbers.smallest_normal / 128):
        tokens = tokens_of(2, 64)
        tokens[0, 0] = number
        tokens[1] = number
        assert not layer(tokens).isnan().any(), number
    linear.weight[0, 0] = numbers.max
    linear.weight[1] = numbers.tiny
    assert not Fp8Linear.of(linear)(tokens_of(2, 64)).isnan().any()


def test_numbers_that_broke_stay_broken() -> None:
    """Else a broken image would be given out as a picture."""
    tokens = tokens_of(3, 64)
    tokens[0, 0], tokens[1, 0] = float("nan"), float("inf")
    broken = Fp8Linear.of(linear_of())(tokens).isfinite().logical_not().any(dim=1)
    assert broken.tolist() == [True, True, False]


# A whole transformer


@pytest.fixture
def transformer(tiny: Model) -> OvisImageTransformer2DModel:
    return deepcopy(tiny.transformer)


def block_linears(transformer: OvisImageTransformer2DModel) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear | Fp8Linear) and "blocks" in name and "norm" not in name
    }


def memory_bytes(layer: nn.Module) -> int:
    return sum(weight.nbytes for weight in layer.parameters())


def test_only_the_blocks_own_linear_layers_are_changed(transformer: OvisImageTransformer2DModel) -> None:
    before = dict(transformer.named_modules())
    quantise(transformer)
    changed = {name for name, module in transformer.named_modules() if module is not before[name]}
    assert changed == set(block_linears(transformer))
    assert all(isinstance(layer, Fp8Linear) for layer in block_linears(transformer).values())
    doubles, singles = len(transformer.transformer_blocks), len(transformer.single_transformer_blocks)
    assert len(changed) == 12 * doubles + 5 * singles


def test_the_weights_take_half_the_memory(transformer: OvisImageTransformer2DModel) -> None:
    before = {name: memory_bytes(layer) for name, layer in block_linears(transformer).items()}
    quantise(transformer)
    for name, layer in block_linears(transformer).items():
        assert isinstance(layer, Fp8Linear)
        assert layer.weight.nbytes * 2 == before[name] - layer.bias.nbytes
        assert memory_bytes(layer) - layer.weight.nbytes == layer.out_features * (4 + 2)  # a scale and a bias each


@pytest.fixture(scope="module")
def fp8(models_dir: Path) -> Model:
    return load_model("tiny", device="cpu", models_dir=models_dir, fp8=True)


@pytest.mark.parametrize("place", range(len(REQUESTS)))
def test_a_picture_is_near_that_of_bf16_and_not_equal(place: int, fp8: Model, tiny: Model) -> None:
    measured = psnr_db(draw(fp8, REQUESTS[place]), draw(tiny, REQUESTS[place]))
    assert NEAR_DB < measured < 60


def test_another_prompt_or_seed_is_much_farther_away_than_fp8(fp8: Model, tiny: Model) -> None:
    request = REQUESTS[0]
    rounded = psnr_db(draw(fp8, request), draw(tiny, request))
    for change in ({"seed": 99}, {"prompt": "A lighthouse"}):
        other = psnr_db(draw(tiny, request.model_copy(update=change)), draw(tiny, request))
        assert other + 6 < rounded, change


def test_images_of_a_mixed_pack_are_near_those_alone(fp8: Model) -> None:
    engine = Engine(fp8, Everybody())
    tickets = [engine.submit(request) for request in REQUESTS]
    ended = finish(engine)
    for ticket, request in zip(tickets, REQUESTS, strict=True):
        assert psnr_db(pixels_of(ended[ticket]), draw(fp8, request)) > 20
