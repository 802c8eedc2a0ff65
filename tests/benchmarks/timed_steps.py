"""Times single denoising steps of ``gpu_engine.py``'s contestants, each by the loop that its users run.

The engine is stepped as a worker steps it: planner, guidance, Euler step and the check for NaN are in the clock.
diffusers is ``OvisImagePipeline.__call__`` itself, with a callback that stops the clock and, after the last timed step,
interrupts it. Both draw requests of 50 steps, so timesteps and shifts are those of a whole image.

A *round* is one step of every image of a set: for images that fit the budget together one step of the engine, else
several. Seconds an image are seconds a round × 50 / images.

What is warm: AdaLN's table, as it is from the second image of a size on; RoPE; the prompts. Images of one set are
spread over their steps, as images are that came in one by one: in a pack that shares a timestep less is looked up.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import torch
from diffusers import OvisImagePipeline

from pipeline import latents_file
from pipeline.engine import Engine
from pipeline.latents_file import UnfinishedImage
from pipeline.model import Model
from pipeline.noise import draw_noise
from pipeline.planner import Candidate
from pipeline.request import ImageRequest
from pipeline.schedule import Schedules
from pipeline.transformer import PackedTransformer
from tests.benchmarks.footprint import forget_peak_mib, peak_mib
from tests.benchmarks.full_size import forward_flop

STEPS = 50


@dataclass(frozen=True)
class Amounts:
    """How many steps are drawn before the clock runs, and with it."""

    warm_up: int
    timed: int

    @property
    def steps(self) -> int:
        return self.warm_up + self.timed


@dataclass(frozen=True)
class Rounds:
    """What was measured of a set of images."""

    first_s: float  # of the first round, in which whatever is not compiled yet is compiled
    timed_s: list[float]
    images: int
    flop: int  # of all sequences of a round
    peak_gb: float

    @property
    def image_s(self) -> float:
        return median(self.timed_s) * STEPS / self.images

    def facts(self) -> dict[str, float | int]:
        return {
            "images": self.images,
            "seconds_an_image": self.image_s,
            "round_ms_median": median(self.timed_s) * 1e3,
            "round_ms_mean": fmean(self.timed_s) * 1e3,
            "round_ms_min": min(self.timed_s) * 1e3,
            "tflop_per_s": self.flop / median(self.timed_s) / 1e12,
            "peak_gb": self.peak_gb,
            "first_round_s": self.first_s,
        }


class Stopwatch:
    """Seconds between laps. On CUDA they are the device's own, and to take one does not make the host wait."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._laps: list[Any] = []
        synchronise(device)
        self.lap()

    def lap(self) -> None:
        if self._device.type != "cuda":
            self._laps.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        self._laps.append(event)

    def laps_s(self) -> list[float]:
        synchronise(self._device)
        pairs = list(zip(self._laps, self._laps[1:], strict=False))
        if self._device.type != "cuda":
            return [after - before for before, after in pairs]
        return [before.elapsed_time(after) / 1e3 for before, after in pairs]


def synchronise(device: torch.device) -> None:
    """Wait for everything that was launched on ``device``."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_s(device: torch.device, act: Callable[[], object], *, repeats: int, warm_up: int = 1) -> float:
    """The median seconds of ``act``, from its call until the device is done."""
    for _ in range(warm_up):
        act()
    watch = Stopwatch(device)
    for _ in range(repeats):
        act()
        synchronise(device)
        watch.lap()
    return median(watch.laps_s())


class InTurn:
    """A planner under which every image draws one step a round, in packs of at most ``budget_tokens``."""

    def __init__(self, budget_tokens: int) -> None:
        self._budget_tokens = budget_tokens
        self._left: list[int] = []
        self.shrunk = False

    @property
    def round_over(self) -> bool:
        return not self._left

    def pick(self, candidates: Sequence[Candidate]) -> list[int]:
        """The next of those that have not drawn in this round, small ones first; one alone may exceed the budget."""
        tokens = {image.ticket: image.tokens for image in candidates}
        if not self._left:
            self._left = sorted(tokens, key=lambda ticket: (tokens[ticket], ticket))
        pack = [self._left.pop(0)]
        while self._left and sum(tokens[ticket] for ticket in (*pack, self._left[0])) <= self._budget_tokens:
            pack.append(self._left.pop(0))
        return pack

    def observe(self, tokens: int, seconds: float) -> None:
        """Nothing is learnt."""

    def shrink(self, tokens: int) -> None:
        """The engine went on with half a pack, so the round is none."""
        self.shrunk = True


def engine_rounds(
    model: Model,
    packed: PackedTransformer,
    requests: Sequence[ImageRequest],
    budget_tokens: int,
    amounts: Amounts,
) -> Rounds:
    """The engine on ``requests``. Raises what an image ends in, and RuntimeError if a pack does not fit in memory."""
    drawing = EngineRounds(model, packed, requests, budget_tokens, rounds=amounts.steps, spread=True)
    forget_peak_mib(model.device)
    watch = Stopwatch(model.device)
    for _ in range(amounts.steps):
        drawing.draw()
        watch.lap()
    flop = sum(image_flop(model, request) for request in requests)
    return _rounds(watch.laps_s(), amounts, len(requests), flop, peak_gb(model.device))


class EngineRounds:
    """An engine that draws ``requests`` for up to ``rounds`` rounds, from their first steps on if not ``spread``."""

    def __init__(
        self,
        model: Model,
        packed: PackedTransformer,
        requests: Sequence[ImageRequest],
        budget_tokens: int,
        *,
        rounds: int,
        spread: bool = False,
    ) -> None:
        self._planner = InTurn(budget_tokens)
        self.engine = Engine(model, self._planner, capacity=len(requests), transformer=packed)
        self.tickets = []
        for number, request in enumerate(requests):
            latest = request.steps - 1 - rounds
            first = number * latest // max(1, len(requests) - 1) if spread else 0
            _fill_modulations(model, request, range(first, min(first + rounds, request.steps)))
            start = UnfinishedImage(request, first, noise(model, request))
            self.tickets.append(self.engine.resume(latents_file.encode(start, model.name, model.revision)))

    def draw(self) -> None:
        """One round."""
        while True:
            for ended in self.engine.step():
                raise ended.error or RuntimeError("an image ended within the timed steps")
            if self._planner.shrunk:
                raise RuntimeError("a pack did not fit in memory")
            if self._planner.round_over:
                return


def diffusers_rounds(
    model: Model, pipeline: OvisImagePipeline, requests: Sequence[ImageRequest], amounts: Amounts
) -> Rounds:
    """``pipeline`` on ``requests``, one by one. Those that are equal but for their seeds are timed once."""
    kinds = Counter((request.drawn_size, request.guidance) for request in requests)
    alike = {(request.drawn_size, request.guidance): request for request in requests}
    forget_peak_mib(model.device)
    laps_s = [0.0] * amounts.steps
    for kind, images in kinds.items():
        taken_s, _ = drawn_by_diffusers(pipeline, alike[kind], amounts.steps, model.device)
        laps_s = [total + images * seconds for total, seconds in zip(laps_s, taken_s, strict=True)]
    flop = sum(image_flop(model, request) for request in requests)
    return _rounds(laps_s, amounts, len(requests), flop, peak_gb(model.device))


def drawn_by_diffusers(
    pipeline: OvisImagePipeline, request: ImageRequest, steps: int, device: torch.device
) -> tuple[list[float], torch.Tensor]:
    """Seconds of each of the first ``steps`` steps, and the latents [1, tokens, 64] after them.

    The first step has the prompts and all else that comes before the loop in its clock.
    """
    watch = Stopwatch(device)

    def note(pipe: Any, step: int, _timestep: torch.Tensor, _: dict[str, Any]) -> dict[str, Any]:
        watch.lap()
        pipe._interrupt = step + 1 == steps  # as diffusers' guide to callbacks does it
        return {}

    width_px, height_px = request.drawn_size
    latents = pipeline(
        request.prompt,
        negative_prompt=request.negative_prompt,
        guidance_scale=request.guidance,
        width=width_px,
        height=height_px,
        num_inference_steps=request.steps,
        generator=torch.Generator("cpu").manual_seed(request.seed or 0),
        output_type="latent",
        return_dict=False,
        callback_on_step_end=note,
    )[0]
    return watch.laps_s(), latents


def latents_by_engine(
    model: Model, packed: PackedTransformer, requests: Sequence[ImageRequest], budget_tokens: int, steps: int
) -> list[torch.Tensor]:
    """The latents [1, tokens, 64] of each request after ``steps`` rounds of the engine, on the CPU."""
    drawing = EngineRounds(model, packed, requests, budget_tokens, rounds=steps)
    for _ in range(steps):
        drawing.draw()
    bodies = [drawing.engine.checkpoint(ticket) for ticket in drawing.tickets]
    return [latents_file.read(body, model.name, model.revision).latents for body in bodies]


def signal_db(model: Model, request: ImageRequest, reference: torch.Tensor, latents: torch.Tensor) -> float:
    """How near ``latents`` are to ``reference``: of what the steps changed in the noise, signal to error.

    Stricter than a PSNR of latents, which after a few steps are mostly the noise that both began with.
    """
    signal = (reference.cpu().double() - noise(model, request).double()).square().mean().item()
    error = (reference.cpu().double() - latents.cpu().double()).square().mean().item()
    return 10 * math.log10(signal / error) if error else math.inf


def psnr_db(reference: torch.Tensor, latents: torch.Tensor) -> float:
    """PSNR of latents; the peak is the reference's range."""
    reference, latents = reference.cpu().double(), latents.cpu().double()
    error = (reference - latents).square().mean().item()
    span = (reference.max() - reference.min()).item()
    return 10 * math.log10(span**2 / error) if error else math.inf


def noise(model: Model, request: ImageRequest) -> torch.Tensor:
    """What the image starts from, [1, tokens, 64] on the CPU."""
    width, height = (side_px // model.latent_px for side_px in request.drawn_size)
    return draw_noise(request.seed or 0, channels=model.latent_channels, height=height, width=width, dtype=model.dtype)


def image_tokens(model: Model, request: ImageRequest) -> int:
    """Of one sequence, without its text."""
    width, height = (side_px // model.latent_px for side_px in request.drawn_size)
    return width * height // 4


def image_flop(model: Model, request: ImageRequest) -> int:
    """Of one step."""
    return (1 + request.guided) * forward_flop(model.transformer, image_tokens(model, request))


def peak_gb(device: torch.device) -> float:
    """The peak since ``forget_peak_mib``, in 10⁹ bytes, weights included."""
    return peak_mib(device) * 2**20 / 1e9


def _rounds(laps_s: Sequence[float], amounts: Amounts, images: int, flop: int, gb: float) -> Rounds:
    return Rounds(laps_s[0], list(laps_s[amounts.warm_up :]), images, flop, gb)


@torch.inference_mode()
def _fill_modulations(model: Model, request: ImageRequest, steps: Iterable[int]) -> None:
    schedule = Schedules(model.scheduler).of(request.steps, image_tokens(model, request))
    for step in steps:
        model.modulations.of([schedule.timestep(step, model.dtype)])
