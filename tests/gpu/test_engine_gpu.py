"""The engine on a CUDA device: what cannot be seen on a CPU. Skipped where there is none.

The tiny model draws here as well, so this takes no large weights. Nothing here is a measurement of speed.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from pipeline.attention import Attention, Heads, Spans, _ways
from pipeline.engine import Engine
from pipeline.errors import Exhausted
from pipeline.fp8 import OLDEST_CAPABILITY, Fp8Linear
from pipeline.model import Model, load_model
from pipeline.transformer import PackedTransformer
from tests.drawing import (
    Anybody,
    Everybody,
    Upstream,
    draw,
    final_latents,
    finish,
    largest_difference,
    pixels_of,
    psnr_db,
    request_for,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

TO_THE_EYE_DB = 40.0
ACROSS_DEVICES_DB = 35.0  # the first step by one device's kernels, the others by another's
FP8_DB = 25.0
LATENTS_WITHIN = 1e-3  # float32, but cuBLAS sums in another order for another shape
REQUESTS = [
    request_for('A sign: "OPEN LATE"', width=128, height=96, steps=4, seed=1),
    request_for("红色横幅", width=736, height=96, steps=6, guidance=3.5, seed=2),
    request_for("A lighthouse", width=256, height=256, steps=3, guidance=1.0, seed=3),
    request_for("A fox", negative_prompt="blurred", width=90, height=160, steps=5, guidance=9.0, seed=4),
    request_for("A fox", width=128, height=96, steps=2, guidance=2.0, seed=5),
]


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def tiny(models_dir: Path) -> Model:
    return load_model("tiny", device="cuda", models_dir=models_dir)


@pytest.fixture(scope="module")
def tiny_float32(models_dir: Path) -> Model:
    return load_model("tiny", device="cuda", models_dir=models_dir, dtype=torch.float32)


def draw_all(engine: Engine) -> list[np.ndarray]:
    tickets = [engine.submit(request) for request in REQUESTS]
    ended = finish(engine)
    return [pixels_of(ended[ticket]) for ticket in tickets]


def test_a_mix_is_each_what_upstream_draws_alone_in_float32(tiny_float32: Model) -> None:
    upstream, engine = Upstream(tiny_float32), Engine(tiny_float32, Anybody())
    latents = final_latents(engine)
    pictures = draw_all(engine)
    for request, pixels, tokens in zip(
        REQUESTS, pictures, (latents[ticket] for ticket in sorted(latents)), strict=True
    ):
        expected = upstream.draw(request)
        assert float((tokens - expected.latents.cpu()).abs().max()) <= LATENTS_WITHIN, request
        assert largest_difference(pixels, expected.pixels) <= 1, request


def test_a_mix_is_upstreams_to_the_eye_in_bf16(tiny: Model) -> None:
    upstream = Upstream(tiny)
    for request, pixels in zip(REQUESTS, draw_all(Engine(tiny, Everybody())), strict=True):
        assert psnr_db(pixels, upstream.draw(request).pixels) >= TO_THE_EYE_DB, request


def test_compiled_blocks_draw_the_same_to_the_eye(tiny: Model) -> None:
    pytest.importorskip("triton")
    compiled = PackedTransformer(tiny.transformer, tiny.modulations, compiled=True)
    eager = draw_all(Engine(tiny, Everybody()))
    for request, pixels, expected in zip(
        REQUESTS, draw_all(Engine(tiny, Everybody(), transformer=compiled)), eager, strict=True
    ):
        assert psnr_db(pixels, expected) >= TO_THE_EYE_DB, request


def test_low_memory_draws_the_same_to_the_eye_and_keeps_the_encoder_off_the_device(
    tiny: Model, models_dir: Path
) -> None:
    small = load_model("tiny", device="cuda", models_dir=models_dir, low_memory=True)
    for request in REQUESTS:
        assert psnr_db(draw(small, request), draw(tiny, request)) >= TO_THE_EYE_DB, request
    assert {weight.device.type for weight in small.text_encoder.parameters()} == {"meta"}
    assert {weight.device.type for weight in small.transformer.parameters()} == {"cuda"}


def test_an_image_goes_on_from_one_device_to_the_other(tiny: Model, models_dir: Path) -> None:
    request = REQUESTS[0]
    on_cpu = load_model("tiny", device="cpu", models_dir=models_dir)
    for here, there in ((tiny, on_cpu), (on_cpu, tiny)):
        first = Engine(here)
        ticket = first.submit(request)
        first.step()
        second = Engine(there)
        taken_up = second.resume(first.checkpoint(ticket))
        assert psnr_db(pixels_of(finish(second)[taken_up]), draw(tiny, request)) >= ACROSS_DEVICES_DB


# Memory


@pytest.fixture
def _little_memory(tiny: Model) -> Iterator[None]:
    """torch may take 64 MB more than it holds: an honest allocator that refuses."""
    draw(tiny, REQUESTS[0])
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(tiny.device).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 64 * 2**20) / total, tiny.device)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0, tiny.device)


@pytest.mark.usefixtures("_little_memory")
def test_a_pack_that_the_allocator_refuses_is_halved_and_the_small_image_finishes(tiny: Model) -> None:
    # Latents of eight, twice, and the inside of their single-stream blocks are 80 MB. Whether one of them can be
    # decoded in what is left, is not the point here.
    large = [request_for(width=2048, height=2048, steps=1, guidance=1.0, seed=seed) for seed in range(8)]
    engine = Engine(tiny, planner := Everybody(), capacity=9)
    small = engine.submit(REQUESTS[0])
    tickets = [engine.submit(request) for request in large]
    ended = finish(engine)
    assert max(planner.too_large) > 8 * 128 * 128
    assert psnr_db(pixels_of(ended[small]), draw(tiny, REQUESTS[0])) >= TO_THE_EYE_DB
    for ticket in tickets:
        error = ended[ticket].error
        assert error is None or (isinstance(error, Exhausted) and "2048×2048" in str(error))


# Attention

MIXES = [(532,), (532, 532), (532, 532, 788, 788, 1280), (4352, 4352)]


def heads_of(lengths: Sequence[int], heads: int = 24, width: int = 128) -> Heads:
    queries, keys, values = torch.randn(3, sum(lengths), heads, width, device="cuda").bfloat16()
    return queries, keys, values


@pytest.mark.parametrize("lengths", MIXES, ids=str)
def test_every_way_of_attention_gives_the_same(lengths: tuple[int, ...]) -> None:
    heads, spans = heads_of(lengths), Spans(lengths, torch.device("cuda"))
    expected = torch.cat(
        [
            scaled_dot_product_attention(*(one.float()[None].transpose(1, 2) for one in sequence))[0]
            .transpose(0, 1)
            .flatten(1)
            for sequence in zip(*(one.split(list(lengths)) for one in heads), strict=True)
        ]
    )
    tried = 0
    for name, way in _ways():
        try:
            attended = way(heads, spans)
        except RuntimeError:  # this device or build has no such kernel
            continue
        tried += 1
        assert attended.shape == (sum(lengths), 24 * 128)
        error = float((attended.float() - expected).norm() / expected.norm())
        assert error < 0.01, name
    assert tried >= 2


def test_the_fastest_way_is_taken_for_equal_and_for_mixed_lengths() -> None:
    attention, device = Attention(), torch.device("cuda")
    measured = attention.measure(24, 128, device, torch.bfloat16)
    assert set(measured) == {"equal lengths", "mixed lengths"}
    ways = dict(_ways())
    for case, taken in (("equal lengths", attention._for_equal), ("mixed lengths", attention._for_mixed)):
        fastest = min(measured[case], key=measured[case].__getitem__)
        assert measured[case]["groups"] > 0
        assert repr(taken) == repr(ways[fastest])


# 8 bits


def float8_units() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= OLDEST_CAPABILITY


@pytest.mark.skipif(not float8_units(), reason="the device has no float8 units")
def test_a_linear_layer_in_fp8_is_what_it_is_on_a_cpu() -> None:
    linear = torch.nn.Linear(256, 384, dtype=torch.bfloat16).requires_grad_(False)
    layer, tokens = Fp8Linear.of(linear), torch.randn(300, 256).bfloat16()
    expected = layer(tokens)
    outputs = layer.to("cuda")(tokens.cuda()).cpu()
    assert float((outputs.float() - expected.float()).norm() / expected.float().norm()) < 0.01


@pytest.mark.skipif(not float8_units(), reason="the device has no float8 units")
def test_a_picture_in_fp8_is_near_that_of_bf16(tiny: Model, models_dir: Path) -> None:
    fp8 = load_model("tiny", device="cuda", models_dir=models_dir, fp8=True)
    for request in REQUESTS:
        assert psnr_db(draw(fp8, request), draw(tiny, request)) > FP8_DB, request
