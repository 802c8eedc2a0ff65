"""The packed forward against OvisImageTransformer2DModel.forward, one sequence at a time, with the same weights."""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from diffusers import OvisImageTransformer2DModel
from torch._dynamo.utils import counters

from pipeline.fp8 import quantise
from pipeline.model import Model
from pipeline.modulation import Modulations
from pipeline.noise import positions
from pipeline.prompt import TEXT_TOKENS
from pipeline.quiet import quiet
from pipeline.tiny.checkpoint import _amplify
from pipeline.transformer import Branch, PackedTransformer

SIZES_AND_TIMESTEPS = [(8, 8, 1000.0), (12, 20, 868.0), (10, 6, 868.0), (24, 8, 332.0), (8, 8, 27.5), (16, 14, 500.0)]
"""Height and width in latents, and what the model is told of the time: bf16 has all of these numbers."""


def transformer_of(
    *, double: int, single: int, heads: int = 4, width: int = 16, dtype: torch.dtype = torch.float32
) -> OvisImageTransformer2DModel:
    """Another architecture than the tiny model's, at random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        transformer = OvisImageTransformer2DModel(
            in_channels=64,
            out_channels=64,
            num_layers=double,
            num_single_layers=single,
            attention_head_dim=width,
            num_attention_heads=heads,
            joint_attention_dim=48,
            axes_dims_rope=(width - 8, 4, 4),
        )
        _amplify(transformer)
    with quiet():
        return transformer.to(dtype).eval().requires_grad_(False)


def packed(transformer: OvisImageTransformer2DModel, *, compiled: bool = False) -> PackedTransformer:
    return PackedTransformer(transformer, Modulations(transformer), compiled=compiled)


@dataclass(frozen=True)
class Given:
    """What both forwards are given of a sequence."""

    latents: torch.Tensor  # [tokens, channels]
    embedding: torch.Tensor  # [256, C]
    timestep: float
    height: int
    width: int


def given_to(
    transformer: OvisImageTransformer2DModel, sequences: Sequence[tuple[int, int, float]] = SIZES_AND_TIMESTEPS
) -> list[Given]:
    generator = torch.Generator().manual_seed(1)
    channels, context = transformer.config.in_channels, transformer.config.joint_attention_dim
    drawn = partial(torch.randn, generator=generator, dtype=transformer.dtype)
    return [
        Given(drawn(height * width // 4, channels), drawn(TEXT_TOKENS, context), timestep, height, width)
        for height, width, timestep in sequences
    ]


@torch.inference_mode()
def together(forward: PackedTransformer, given: Sequence[Given]) -> list[torch.Tensor]:
    return forward(
        [Branch(one.latents, forward.read(one.embedding), one.timestep, one.height, one.width) for one in given]
    )


@torch.inference_mode()
def by_upstream(transformer: OvisImageTransformer2DModel, one: Given) -> torch.Tensor:
    """As OvisImagePipeline.__call__ asks for a velocity."""
    dtype = transformer.dtype
    order = torch.arange(TEXT_TOKENS)
    (velocity,) = transformer(
        hidden_states=one.latents[None],
        encoder_hidden_states=one.embedding[None],
        timestep=torch.tensor([one.timestep]).to(dtype) / 1000,
        txt_ids=torch.stack((torch.zeros_like(order), order, order), dim=-1).to(dtype),
        img_ids=positions(height=one.height, width=one.width, device=torch.device("cpu"), dtype=dtype),
        return_dict=False,
    )
    assert isinstance(velocity, torch.Tensor)
    return velocity[0]


def relative_error(velocity: torch.Tensor, expected: torch.Tensor) -> float:
    return float((velocity - expected).norm() / expected.norm())


OTHER = {"double": 2, "single": 3}


@pytest.fixture(params=["tiny", "another"])
def transformer(request: pytest.FixtureRequest, tiny_float32: Model) -> OvisImageTransformer2DModel:
    return tiny_float32.transformer if request.param == "tiny" else transformer_of(**OTHER)


def test_sequences_of_other_sizes_and_timesteps_are_each_what_upstream_computes(
    transformer: OvisImageTransformer2DModel,
) -> None:
    given = given_to(transformer)
    for velocity, one in zip(together(packed(transformer), given), given, strict=True):
        expected = by_upstream(transformer, one)
        assert velocity.shape == expected.shape
        assert relative_error(velocity, expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_sequence_alone_is_upstreams_to_the_bit(dtype: torch.dtype, tiny: Model, tiny_float32: Model) -> None:
    of_tiny = tiny.transformer if dtype is torch.bfloat16 else tiny_float32.transformer
    for transformer in (of_tiny, transformer_of(**OTHER, dtype=dtype)):
        forward = packed(transformer)
        for one in given_to(transformer):
            assert torch.equal(together(forward, [one])[0], by_upstream(transformer, one)), (one.height, one.width)


def test_who_stands_where_in_a_pack_makes_no_difference(transformer: OvisImageTransformer2DModel) -> None:
    forward, given = packed(transformer), given_to(transformer)
    for velocity, other in zip(together(forward, given), together(forward, given[::-1])[::-1], strict=True):
        assert relative_error(velocity, other) < 1e-6


def test_a_sequence_hears_nothing_of_its_neighbours(transformer: OvisImageTransformer2DModel) -> None:
    forward, given = packed(transformer), given_to(transformer)
    loud = [replace(one, latents=one.latents * 1e3, embedding=one.embedding * 1e3) for one in given[1:]]
    assert relative_error(together(forward, [given[0], *loud])[0], together(forward, given)[0]) < 1e-6


def test_what_is_kept_for_a_layout_serves_other_numbers(transformer: OvisImageTransformer2DModel) -> None:
    forward = packed(transformer)
    together(forward, given_to(transformer))
    later = [(height, width, timestep / 2) for height, width, timestep in SIZES_AND_TIMESTEPS]
    given = given_to(transformer, later)
    for velocity, one in zip(together(forward, given), given, strict=True):
        assert relative_error(velocity, by_upstream(transformer, one)) < 1e-6


# One copy of the weights


def storages(*tensors: torch.Tensor) -> dict[int, int]:
    """Bytes by address."""
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def weights_of(forward: PackedTransformer) -> list[torch.Tensor]:
    layers = [layer for pair in forward._doubles for layer in pair] + forward._singles
    return [
        weight
        for one in layers
        for part in vars(one).values()
        if hasattr(part, "parameters")
        for weight in part.parameters()
    ]


@pytest.fixture(params=["float32", "bfloat16", "fp8"])
def untouched(request: pytest.FixtureRequest) -> OvisImageTransformer2DModel:
    transformer = transformer_of(**OTHER, dtype=torch.float32 if request.param == "float32" else torch.bfloat16)
    if request.param == "fp8":
        quantise(transformer)
    return transformer


def test_fusing_makes_no_second_copy_of_the_weights(untouched: OvisImageTransformer2DModel) -> None:
    expected = sum(storages(*untouched.parameters()).values())
    forward = packed(untouched)
    after = storages(*untouched.parameters(), *weights_of(forward))
    assert sum(after.values()) == expected
    assert set(storages(*weights_of(forward))) <= set(storages(*untouched.parameters()))


def test_a_second_engine_shares_the_weights_of_the_first(untouched: OvisImageTransformer2DModel) -> None:
    first = packed(untouched)
    addresses = [weight.data_ptr() for weight in untouched.parameters()]
    second = packed(untouched)
    assert [weight.data_ptr() for weight in untouched.parameters()] == addresses
    assert [weight.data_ptr() for weight in weights_of(second)] == [weight.data_ptr() for weight in weights_of(first)]
    given = given_to(untouched)
    for velocity, other in zip(together(first, given), together(second, given), strict=True):
        assert torch.equal(velocity, other)


def test_upstreams_own_forward_and_weights_stay_as_they_were(untouched: OvisImageTransformer2DModel) -> None:
    given = given_to(untouched)
    before = [by_upstream(untouched, one) for one in given]
    weights = deepcopy(untouched.state_dict())
    packed(untouched)
    for name, weight in untouched.state_dict().items():
        assert torch.equal(weight.view(torch.uint8), weights[name].view(torch.uint8)), name
    for one, expected in zip(given, before, strict=True):
        assert torch.equal(by_upstream(untouched, one), expected)


def test_fused_weights_can_be_moved_and_are_then_those_of_a_new_forward(tiny_float32: Model) -> None:
    transformer = deepcopy(tiny_float32.transformer)
    packed(transformer)
    with quiet():
        transformer.to(torch.bfloat16)
    given = given_to(transformer)
    assert torch.equal(together(packed(transformer), given[:1])[0], by_upstream(transformer, given[0]))


# Compiled

ALONE = SIZES_AND_TIMESTEPS[:1]
MIXED = SIZES_AND_TIMESTEPS[1:4]
LATER = [
    [(20, 12, 500.0)],
    [(20, 12, 500.0), (20, 12, 500.0)],
    SIZES_AND_TIMESTEPS,
    SIZES_AND_TIMESTEPS[::-1],
    [(8, 8, 100.0 + step) for step in range(5)],
]


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    assert not counters["graph_break"], counters["graph_break"]
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.usefixtures("_fresh_compiler")
def test_blocks_compile_once_without_breaks_whatever_comes_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler behind it is left out: what is under test is what torch traces, and how often."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    transformer = transformer_of(double=2, single=2)
    forward = packed(transformer, compiled=True)
    for warm_up in (ALONE, MIXED):
        together(forward, given_to(transformer, warm_up))
    parts, kinds_of_packs = 4, 2  # of one timestep and of several
    assert graphs() == parts * kinds_of_packs, "not one graph for all blocks"
    for sequences in LATER:
        given = given_to(transformer, sequences)
        for velocity, one in zip(together(forward, given), given, strict=True):
            assert relative_error(velocity, by_upstream(transformer, one)) < 1e-5
        assert graphs() == parts * kinds_of_packs, f"{sequences} were compiled anew"
