"""What ``gpu_engine.py`` measures. Each function gives the facts of one row, and raises if there can be none."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch.nn.functional import ScalingType, scaled_mm

from pipeline.decoder import TILES_PX, Decoder, Outcome
from pipeline.engine import Engine
from pipeline.errors import PipelineError
from pipeline.prompt import TEXT_TOKENS, PromptEncoder
from pipeline.request import ImageRequest
from tests.benchmarks.beside_encoding import THREADS, seconds_beside
from tests.benchmarks.figures import ratio
from tests.benchmarks.footprint import forget_peak_mib
from tests.benchmarks.gpu_scene import DIFFUSERS, ENGINE, ENGINE_EAGER, Bench, size_of, tokens
from tests.benchmarks.timed_steps import (
    STEPS,
    EngineRounds,
    Rounds,
    Stopwatch,
    drawn_by_diffusers,
    engine_rounds,
    latents_by_engine,
    median_s,
    peak_gb,
    psnr_db,
    signal_db,
)

LOW_MEMORY_BYTES = 16e9
Facts = dict[str, Any]


def shares(bench: Bench, rounds: Rounds) -> Facts:
    """The facts of ``rounds``, and its share of the ceiling once that is measured."""
    facts: Facts = rounds.facts()
    if bench.ceiling_tflop_per_s:
        facts["share_of_ceiling"] = facts["tflop_per_s"] / bench.ceiling_tflop_per_s
    return facts


def measure_ceiling(bench: Bench) -> Facts:
    """The best of several runs of products of large square matrices: what no forward can be faster than."""
    side, device = bench.scene.matrix, bench.device
    one, other = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    bf16 = bench.ceiling_tflop_per_s = _product_tflop_per_s(bench, lambda: one @ other)
    facts: Facts = {"bf16_tflop_per_s": bf16, "matrices": f"{side}×{side}"}
    try:
        facts["fp8_tflop_per_s"] = _product_tflop_per_s(bench, _float8_product(one, other))
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        facts["fp8"] = f"not here: {str(error).splitlines()[0]}"
    return facts


def _product_tflop_per_s(bench: Bench, act: Callable[[], torch.Tensor]) -> float:
    together = 20 if bench.device.type == "cuda" else 2  # some 30 ms: clocks and power have settled
    runs = []
    for _ in range(2 * bench.scene.repeats + 1):
        watch = Stopwatch(bench.device)
        for _ in range(together):
            act()
        watch.lap()
        runs.append(sum(watch.laps_s()) / together)
    return 2 * bench.scene.matrix**3 / min(runs) / 1e12


def _float8_product(one: torch.Tensor, other: torch.Tensor) -> Callable[[], torch.Tensor]:
    """As fp8.py's layers multiply, without the rounding of what comes in."""
    left, right = one.to(torch.float8_e4m3fn), other.to(torch.float8_e4m3fn)
    scale = torch.ones(len(one), 1, device=one.device)
    by_row = ScalingType.RowWise
    return lambda: scaled_mm(left, right.t(), scale, by_row, scale.t(), by_row, output_dtype=torch.bfloat16)


def measure_attention(bench: Bench) -> Facts:
    """Milliseconds of each way, and which one the engine took."""
    bench.packed(compiled=True)
    ways = bench.ways[True]
    taken = {f"taken_for_{case.replace(' ', '_')}": min(ms, key=ms.__getitem__) for case, ms in ways.items()}
    return {"ms": ways, **taken} if ways else {"ms": "one way alone on this device"}


def measure_parity(bench: Bench) -> Facts:
    """All that draws, against diffusers uncompiled: images of several sizes that share the engine's steps."""
    scene, model = bench.scene, bench.model
    alone = scene.half.model_copy(update={"guidance": 1.0})
    # Other step counts, or all would be told the same timestep: in bf16 the first few of fifty are hardly apart.
    requests = [
        request.model_copy(update={"steps": STEPS - 10 * number, "seed": number})
        for number, request in enumerate((*scene.singles, alone))
    ]
    reference = [_latents_by_diffusers(bench, request, compiled=False) for request in requests]
    drawn = {
        DIFFUSERS: [_latents_by_diffusers(bench, request, compiled=True) for request in requests],
        ENGINE_EAGER: _latents_together(bench, requests, compiled=False),
        ENGINE: _latents_together(bench, requests, compiled=True),
    }
    bench.bf16_latents = _latents_together(bench, [scene.square], compiled=True)[0]
    facts: Facts = {"steps": scene.parity_steps, "images": len(requests)}
    for who, latents in drawn.items():
        triples = list(zip(requests, reference, latents, strict=True))
        facts[f"{who}: worst signal to error"] = _db(min(signal_db(model, *triple) for triple in triples))
        facts[f"{who}: worst PSNR of latents"] = _db(min(psnr_db(right, other) for _, right, other in triples))
    return facts


def measure_fp8_parity(bench: Bench) -> Facts:
    """fp8's latents of the square image against the engine's own in bf16. Random weights: no word on pictures."""
    if bench.bf16_latents is None:
        raise RuntimeError("there are no latents in bf16 to compare with: the row of parity has none")
    request = bench.scene.square
    latents = _latents_together(bench, [request], compiled=True)[0]
    return {
        "steps": bench.scene.parity_steps,
        "signal to error": _db(signal_db(bench.model, request, bench.bf16_latents, latents)),
        "PSNR of latents": _db(psnr_db(bench.bf16_latents, latents)),
    }


def _db(value: float) -> str:
    return "equal to the bit" if value == math.inf else f"{value:.1f} dB"


def _latents_by_diffusers(bench: Bench, request: ImageRequest, *, compiled: bool) -> torch.Tensor:
    pipeline = bench.pipeline(compiled=compiled)
    return drawn_by_diffusers(pipeline, request, bench.scene.parity_steps, bench.device)[1].cpu()


def _latents_together(bench: Bench, requests: Sequence[ImageRequest], *, compiled: bool) -> list[torch.Tensor]:
    packed, budget_tokens = bench.packed(compiled=compiled), sum(map(tokens, requests))
    return latents_by_engine(bench.model, packed, requests, budget_tokens, bench.scene.parity_steps)


def measure_beside(bench: Bench) -> Facts:
    """The step of the square image alone, beside PNGs at the pace that it draws them, and beside ceaseless ones."""
    request = bench.scene.square
    rounds, steps = bench.scene.beside
    drawing = EngineRounds(
        bench.model, bench.packed(compiled=True), [request], tokens(request), rounds=1 + 3 * rounds * steps
    )
    drawing.draw()

    def step_s() -> float:
        watch = Stopwatch(bench.device)
        for _ in range(steps):
            drawing.draw()
            watch.lap()
        return sum(watch.laps_s()) / steps

    taken: dict[str, list[float]] = {"nothing": [], "its_own_pace": [], "no_pause": []}
    pushed = 0
    for _ in range(rounds):
        alone_s, _ = seconds_beside(step_s, request, pause_s=None)
        paced_s, _ = seconds_beside(step_s, request, pause_s=THREADS * STEPS * alone_s)
        pressed_s, count = seconds_beside(step_s, request, pause_s=0.0)
        pushed += count
        for seconds, measured in zip((alone_s, paced_s, pressed_s), taken.values(), strict=True):
            measured.append(seconds)
    alone, paced, pressed = taken.values()
    return {
        "step_ms": median(alone) * 1e3,
        "ratio_at_its_own_pace": ratio(paced, to=alone),
        "ratio_without_a_pause": ratio(pressed, to=alone),
        "pngs_a_second_without_a_pause": pushed / (sum(pressed) * steps),
    }


def measure_overlap(bench: Bench) -> Facts:
    """A step and a decoding of the square image, each alone, and the one launched beside the other."""
    request, repeats = bench.scene.square, bench.scene.repeats
    drawing = EngineRounds(bench.model, bench.packed(compiled=True), [request], tokens(request), rounds=2 + 2 * repeats)
    decoder, latents = Decoder(bench.model), _random_latents(bench, request)

    def decode() -> None:
        decoder.submit(0, latents, request)
        _pictures(decoder)

    def both() -> None:
        decoder.submit(0, latents, request)
        _check(decoder.collect(wait=False))
        drawing.draw()
        _pictures(decoder)

    step_s, decode_s, both_s = (median_s(bench.device, act, repeats=repeats) for act in (drawing.draw, decode, both))
    return {
        "step_ms": step_s * 1e3,
        "decode_ms": decode_s * 1e3,
        "both_ms": both_s * 1e3,
        "hidden_share_of_decoding": (step_s + decode_s - both_s) / decode_s,
    }


def measure_low_memory(bench: Bench) -> Facts:
    """Steps of the square image, and a whole one of few steps, with no more memory than a card of 16 GB has."""
    scene, model = bench.scene, bench.model
    packed = bench.packed(compiled=False)
    bench.tidy()
    with _no_more_than(LOW_MEMORY_BYTES, bench.device):
        facts = shares(bench, engine_rounds(model, packed, [scene.square], tokens(scene.square), scene.amounts))
        forget_peak_mib(bench.device)
        engine = Engine(model, capacity=1, transformer=packed)
        engine.submit(scene.square.model_copy(update={"steps": 2}))
        while not engine.idle:
            for ended in engine.step():
                if ended.error:
                    raise ended.error
    facts["peak_gb_with_decoding"] = peak_gb(bench.device)
    return facts


@contextmanager
def _no_more_than(size_bytes: float, device: torch.device) -> Iterator[None]:
    """torch's allocator refuses what goes beyond, as a smaller card's would."""
    if device.type != "cuda":
        yield
        return
    whole = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, size_bytes / whole), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def measure_encoder(bench: Bench) -> Facts:
    """Milliseconds of one prompt and of sixteen: the engine's way, and diffusers', padded to 284 tokens each."""
    pipeline, facts = bench.pipeline(compiled=False), Facts()
    for count in (1, 16):
        prompts = [f'A shop window with the words "OPEN LATE" ({number})' for number in range(count)]

        def ours(prompts: list[str] = prompts) -> object:
            return PromptEncoder(bench.model, remembered=0).encode(prompts)

        def padded(prompts: list[str] = prompts) -> object:
            with torch.no_grad():
                return pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)

        for name, act in (("engine", ours), ("diffusers", padded)):
            facts[f"{name}_{count}_ms"] = median_s(bench.device, act, repeats=bench.scene.repeats) * 1e3
    return facts


def measure_vae(bench: Bench) -> Facts:
    """Milliseconds and peak of latents to pixels in the host's memory."""
    scene, facts = bench.scene, Facts()

    def decoded(name: str, act: Callable[[], object]) -> None:
        forget_peak_mib(bench.device)
        facts[f"{name}, ms"] = median_s(bench.device, act, repeats=scene.repeats) * 1e3
        facts[f"{name}, peak_gb"] = peak_gb(bench.device)
        bench.tidy()

    def whole(request: ImageRequest, images: int) -> Callable[[], None]:
        decoder, latents = Decoder(bench.model), _random_latents(bench, request)

        def act() -> None:
            for ticket in range(images):
                decoder.submit(ticket, latents, request)
            _pictures(decoder)

        return act

    decoded(f"one {size_of([scene.square])}", whole(scene.square, 1))
    decoded(f"8 × {size_of([scene.banner])}", whole(scene.banner, 8))
    for tile_px in TILES_PX:
        decoded(f"one {size_of([scene.square])} in tiles of {tile_px} px", _tiled(bench, tile_px))
    return facts


def _tiled(bench: Bench, tile_px: int) -> Callable[[], None]:
    decoder = Decoder(bench.model)
    latents = decoder._unpack(_random_latents(bench, bench.scene.square), bench.scene.square)

    @torch.inference_mode()
    def act() -> None:
        decoder._decode(latents, tile_px)

    return act


def _pictures(decoder: Decoder) -> None:
    """Wait for all that ``decoder`` has. Raises what an image ended in."""
    while ended := decoder.collect(wait=True):
        _check(ended)


def _check(outcomes: Sequence[tuple[int, Outcome]]) -> None:
    for _, outcome in outcomes:
        if isinstance(outcome, PipelineError):
            raise outcome


def _random_latents(bench: Bench, request: ImageRequest) -> torch.Tensor:
    image_tokens = tokens(request) // (1 + request.guided) - TEXT_TOKENS
    channels = 4 * bench.model.latent_channels
    return torch.randn(1, image_tokens, channels, device=bench.device, dtype=bench.model.dtype)
