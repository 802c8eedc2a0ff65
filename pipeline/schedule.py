"""The timesteps of one image.

Every image has its own: they depend on how many steps it takes and, through the shift mu, on how many tokens it has.
The checkpoint's own scheduler computes them, on a copy, for it keeps the last image's steps in itself.

Invariant: a schedule depends on (steps, image tokens) and the scheduler's settings alone, and is never written to.
"""

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from pipeline.request import SIDE_MIN_PX, SIDE_STEP_PX, STEPS_MAX

REMEMBERED = 256


@dataclass(frozen=True)
class Schedule:
    """Timesteps [S] and sigmas [S + 1] in float32 on the CPU; the last sigma is 0."""

    timesteps: torch.Tensor
    sigmas: torch.Tensor

    def timestep(self, step: int, dtype: torch.dtype) -> float:
        """What the model is told at ``step``, 0 to 1000: rounded to its dtype, as OvisImagePipeline casts it."""
        return self.timesteps[step].to(dtype).item()

    def stride(self, step: int, dtype: torch.dtype) -> float:
        """From this step's sigma to the next one's; rounded, as in upstream's product with a velocity of ``dtype``."""
        return (self.sigmas[step + 1] - self.sigmas[step]).to(dtype).item()


class Schedules:
    """Makes and keeps the schedules of one model."""

    def __init__(self, scheduler: FlowMatchEulerDiscreteScheduler) -> None:
        self._scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
        self._made: dict[tuple[int, int], Schedule] = {}

    def of(self, steps: int, image_tokens: int) -> Schedule:
        """The schedule of an image of ``image_tokens`` tokens drawn in ``steps`` steps."""
        key = (steps, image_tokens)
        if key not in self._made:
            if len(self._made) >= REMEMBERED:
                self._made.clear()  # any integer size is allowed: mixed sizes must not fill the memory
            self._made[key] = self._make(steps, image_tokens)
        return self._made[key]

    @property
    def lowest_timestep(self) -> float:
        """No request asks for a lower one: the last of the most steps, at the smallest size, which is shifted least."""
        smallest_tokens = (SIDE_MIN_PX // SIDE_STEP_PX) ** 2
        return self.of(STEPS_MAX, smallest_tokens).timesteps[-1].item()

    def shift(self, image_tokens: int) -> float:
        """mu: linear in the number of tokens, through the two points that the checkpoint names."""
        config = self._scheduler.config
        low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        base, top = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        # In this order of operations, which is upstream's calculate_shift: another one rounds differently.
        slope = (top - base) / (high - low)
        return float(image_tokens * slope + (base - slope * low))

    def _make(self, steps: int, image_tokens: int) -> Schedule:
        mu = self.shift(image_tokens)
        if self._scheduler.config.get("use_flow_sigmas"):
            self._scheduler.set_timesteps(steps, mu=mu)
        else:
            sigmas = np.linspace(1.0, 1 / steps, steps)
            self._scheduler.set_timesteps(sigmas=sigmas, mu=mu)
        return Schedule(self._scheduler.timesteps, self._scheduler.sigmas)
