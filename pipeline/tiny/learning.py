"""One stage of training: weights, their running average, the optimizer, and where it stands.

It may know neither pictures nor prompts: a stage is given a loss. Everything random in a step comes from the step's
number, so a stage that is loaded and goes on does what it would have done.

Invariant: a state file is whole (it is written under another name and renamed), and holds all that the next step
depends on.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic

import torch
from torch import nn

AVERAGE_DECAY = 0.999
WARM_UP_STEPS = 300
GRADIENT_NORM_MAX = 1.0
WEIGHT_DECAY = 0.01


class Stage:
    """``modules`` learn ``loss(generator)`` for ``steps`` steps, at a rate that rises, then falls to 0."""

    def __init__(self, modules: nn.ModuleDict, *, steps: int, rate: float, seed: int, device: torch.device) -> None:
        self.steps = steps
        self.step = 0
        self._modules = modules.to(device).train()
        self._rate = rate
        self._seed = seed
        self._device = device
        self._weights: list[torch.Tensor] = [weight for weight in modules.parameters() if weight.requires_grad]
        self._average = [weight.detach().clone() for weight in self._weights]
        self._optimizer = torch.optim.AdamW(
            self._weights, lr=rate, betas=(0.9, 0.99), weight_decay=WEIGHT_DECAY, fused=device.type == "cuda"
        )

    @property
    def done(self) -> bool:
        return self.step >= self.steps

    def learn(self, loss: Callable[[torch.Generator], torch.Tensor]) -> torch.Tensor:
        """One step; returns its loss, which may still be on its way on the device."""
        generator = torch.Generator(self._device).manual_seed(self._seed + self.step)
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate * self._share_of_rate()
        value = loss(generator)
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._weights, GRADIENT_NORM_MAX)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self._follow()
        return value.detach()

    def use_average(self) -> None:
        """Put the average in the weights' place, for good: the stage is over."""
        with torch.no_grad():
            torch._foreach_copy_(self._weights, self._average)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the modules hold the average."""
        kept = [weight.detach().clone() for weight in self._weights]
        self.use_average()
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self._weights, kept)

    def save(self, path: Path) -> None:
        """Everything that ``resume`` needs."""
        unfinished = path.with_suffix(".unfinished")
        torch.save(
            {
                "step": self.step,
                "modules": self._modules.state_dict(),
                "average": self._average,
                "optimizer": self._optimizer.state_dict(),
            },
            unfinished,
        )
        unfinished.replace(path)

    def resume(self, path: Path) -> None:
        """Go on from ``path``, if it is there."""
        if not path.exists():
            return
        state = torch.load(path, map_location=self._device, weights_only=True)
        self._modules.load_state_dict(state["modules"])
        self._average = state["average"]
        self._optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def _share_of_rate(self) -> float:
        warm = min(1.0, (self.step + 1) / min(WARM_UP_STEPS, max(1, self.steps // 10)))
        return warm * (0.5 + 0.5 * math.cos(math.pi * min(1.0, self.step / self.steps)))

    def _follow(self) -> None:
        """Early on the average forgets faster, so that the fresh weights are soon gone from it."""
        decay = min(AVERAGE_DECAY, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self._average, self._weights, 1 - decay)


class Clock:
    """Says when something that is done every so often is due, and when the time is over."""

    def __init__(self, minutes: float | None) -> None:
        self._start = monotonic()
        self._end = math.inf if minutes is None else self._start + 60 * minutes
        self._last: dict[str, float] = {}

    @property
    def over(self) -> bool:
        return monotonic() >= self._end

    @property
    def spent_s(self) -> float:
        return monotonic() - self._start

    def due(self, what: str, every_s: float) -> bool:
        """Whether ``every_s`` have passed since this last said so (or since the start)."""
        now = monotonic()
        if now - self._last.get(what, self._start) < every_s:
            return False
        self._last[what] = now
        return True
