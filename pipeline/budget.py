"""How many tokens a step may have, and what a step takes: measured when a worker starts, on the device as it is.

Packs of growing size are drawn from noise, each a few times. From the memory that they need follows the budget; what
they take is the planner's first knowledge of when sharing helps. Nothing is read from a table of devices, for cards of
one name differ in what else lives on them.

It is also the warm-up: what torch compiles, for one timestep and for several, is compiled here, so that no image has
to wait for it.
"""

import resource
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import psutil
import torch

from pipeline.errors import DeviceError
from pipeline.model import Model
from pipeline.planner import StepCost
from pipeline.prompt import TEXT_TOKENS
from pipeline.torch_errors import out_of_memory
from pipeline.transformer import Branch, PackedTransformer

MOST_TOKENS = 65_536
"""More than any device gains from: the engine must come round often enough to cancel and to admit."""
SHARE_OF_MEMORY = 0.5
"""Of what is free beside the weights. The rest is for decoding, for prompts, and for the tables that fill later."""
TIMES = 3
LONG_ENOUGH_S = 2.0
FEWEST_SIZES = 3  # that are tried however long they take: from fewer the cost of a step cannot be told
HEIGHT, WIDTH = 12, 92  # in latents: a banner of 736×96
BANNER_TOKENS = TEXT_TOKENS + HEIGHT * WIDTH // 4
TIMESTEPS = (500.0, 752.0)  # that bf16 has


@dataclass(frozen=True)
class Budget:
    """What a planner starts from."""

    tokens: int
    cost: StepCost


@torch.inference_mode()
def measure(model: Model, transformer: PackedTransformer, *, at_most: int = MOST_TOKENS) -> Budget:
    """Try packs of 1, 2, 4, ... sequences for some seconds, after a warm-up that takes minutes if torch compiles.

    The budget is what the memory allows, and no more than ``at_most``; never less than one banner, for one image
    always draws. Raises DeviceError if that cannot be drawn, or the device fails.
    """
    _warm_up(model, transformer)
    try:
        return _measured(model, transformer, max(at_most, BANNER_TOKENS))
    except RuntimeError as error:
        raise DeviceError(f"{model.device} cannot draw: {error}") from error


def _measured(model: Model, transformer: PackedTransformer, limit: int) -> Budget:
    packs: dict[int, list[Branch]] = {}
    bytes_a_token = 0.0
    tokens, began = BANNER_TOKENS, perf_counter()
    while tokens <= limit and (len(packs) < FEWEST_SIZES or perf_counter() - began < LONG_ENOUGH_S):
        try:
            pack = _noise(model, transformer, tokens // BANNER_TOKENS)
            bytes_a_token = max(bytes_a_token, _bytes_used(model.device, partial(transformer, pack)) / tokens)
            packs[tokens] = pack
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            limit = tokens // 2
        tokens *= 2
    if bytes_a_token:
        limit = min(limit, int(SHARE_OF_MEMORY * _bytes_free(model.device) / bytes_a_token))
    return Budget(max(BANNER_TOKENS, limit), _cost(model, transformer, packs))


def _warm_up(model: Model, transformer: PackedTransformer) -> None:
    """Everything that is done but once: for one timestep, and for several."""
    try:
        transformer.choose_attention()
        for sequences in (1, 2):
            transformer(_noise(model, transformer, sequences))
    except RuntimeError as error:
        what = "memory for" if out_of_memory(error) else "means to draw"
        raise DeviceError(
            f"{model.device} has no {what} a banner of {WIDTH * model.latent_px}×{HEIGHT * model.latent_px}: {error} "
            "(OVIS_LOW_MEMORY=1 needs less memory, OVIS_COMPILE=0 no compiler)"
        ) from error


def _cost(model: Model, transformer: PackedTransformer, packs: Mapping[int, list[Branch]]) -> StepCost:
    """Sizes take turns, so that a moment in which the machine is slow does not make one of them look dear."""
    cost = StepCost()
    for _ in range(TIMES):
        for tokens, pack in packs.items():
            cost.observe(tokens, _seconds(model.device, partial(transformer, pack)))
    return cost


def _noise(model: Model, transformer: PackedTransformer, sequences: int) -> list[Branch]:
    """A pack of banners, at two timesteps if there is more than one: what mixed images are like."""
    device, dtype = model.device, model.dtype
    embedding = torch.zeros(TEXT_TOKENS, model.text_encoder.config.hidden_size, device=device, dtype=dtype)
    latents = torch.randn(HEIGHT * WIDTH // 4, 4 * model.latent_channels, device=device, dtype=dtype)
    text = transformer.read(embedding)
    return [Branch(latents, text, TIMESTEPS[number % 2], HEIGHT, WIDTH) for number in range(sequences)]


def _seconds(device: torch.device, act: Callable[[], object]) -> float:
    began = perf_counter()
    act()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return perf_counter() - began


def _bytes_used(device: torch.device, act: Callable[[], object]) -> int:
    """What ``act`` needed at its peak, beside what was there.

    On a CPU only what goes beyond the most that this process ever held: less than the need, but all that is new.
    """
    if device.type != "cuda":
        before = _most_held_bytes()
        act()
        return _most_held_bytes() - before
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    act()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _most_held_bytes() -> int:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _bytes_free(device: torch.device) -> int:
    if device.type != "cuda":
        return psutil.virtual_memory().available
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
