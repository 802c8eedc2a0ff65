"""What a worker measures when it starts: the budget of a step, and the planner's first knowledge of its cost."""

import time
from collections.abc import Sequence

import pytest
import torch

from pipeline import budget
from pipeline.budget import BANNER_TOKENS, Budget
from pipeline.errors import DeviceError
from pipeline.model import Model
from pipeline.prompt import TEXT_TOKENS
from pipeline.transformer import Branch, PackedTransformer

ILLEGAL = "CUDA error: an illegal memory access was encountered"


class Watched(PackedTransformer):
    """The real one. It notes its packs, takes ``late_s`` for the first, and has no memory for more than ``fits``.

    The device fails from pack ``bad_pack`` or read ``bad_read`` on, counted from 1; 0: never.
    """

    def __init__(
        self,
        model: Model,
        *,
        late_s: float = 0.0,
        fits: int = 10**9,
        error: str = "",
        bad_pack: int = 0,
        bad_read: int = 0,
    ) -> None:
        super().__init__(model.transformer, model.modulations)
        self.packs: list[tuple[int, int]] = []  # (sequences, timesteps)
        self._late_s = late_s
        self._fits = fits
        self._error = error
        self._bad_pack, self._bad_read = bad_pack, bad_read
        self.reads = 0

    def read(self, embedding: torch.Tensor) -> torch.Tensor:
        self.reads += 1
        if self._bad_read and self.reads >= self._bad_read:
            raise RuntimeError(ILLEGAL)
        return super().read(embedding)

    def __call__(self, pack: Sequence[Branch]) -> list[torch.Tensor]:
        if not self.packs:
            time.sleep(self._late_s)
        self.packs.append((len(pack), len({branch.timestep for branch in pack})))
        if self._error:
            raise RuntimeError(self._error)
        if self._bad_pack and len(self.packs) >= self._bad_pack:
            raise RuntimeError(ILLEGAL)
        if sum(TEXT_TOKENS + len(branch.latents) for branch in pack) > self._fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().__call__(pack)


def measured(model: Model, transformer: PackedTransformer, at_most: int = 4 * BANNER_TOKENS) -> Budget:
    return budget.measure(model, transformer, at_most=at_most)


def test_it_ends_with_what_was_allowed_and_with_a_cost_that_is_known(tiny_float32: Model) -> None:
    found = measured(tiny_float32, Watched(tiny_float32))
    time_of_a_step = found.cost.time()
    assert BANNER_TOKENS <= found.tokens <= 4 * BANNER_TOKENS
    assert time_of_a_step is not None
    assert time_of_a_step.fixed_s + 4 * BANNER_TOKENS * time_of_a_step.per_token_s > 0


def test_one_timestep_and_several_run_before_anything_is_measured_however_long_the_first_takes(
    tiny_float32: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As compiling does. Measuring must then still see enough sizes."""
    monkeypatch.setattr(budget, "LONG_ENOUGH_S", 0.0)
    transformer = Watched(tiny_float32, late_s=0.1)
    found = measured(tiny_float32, transformer)
    assert transformer.packs[:2] == [(1, 1), (2, 2)]
    assert max(transformer.packs)[0] == 2 ** (budget.FEWEST_SIZES - 1)
    assert found.cost.time() is not None


def test_time_ends_it_when_enough_is_known(tiny_float32: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "LONG_ENOUGH_S", 0.0)
    transformer = Watched(tiny_float32)
    measured(tiny_float32, transformer, at_most=budget.MOST_TOKENS)
    assert max(transformer.packs)[0] == 2 ** (budget.FEWEST_SIZES - 1)


def test_where_memory_ends_the_budget_is_at_most_what_fitted(tiny_float32: Model) -> None:
    found = measured(tiny_float32, Watched(tiny_float32, fits=3 * BANNER_TOKENS))
    assert found.tokens == 2 * BANNER_TOKENS


def test_a_small_allowance_still_lets_one_banner_through(tiny_float32: Model) -> None:
    assert measured(tiny_float32, Watched(tiny_float32), at_most=64).tokens == BANNER_TOKENS


def test_a_device_that_cannot_draw_one_banner_is_named_with_the_reason(tiny_float32: Model) -> None:
    with pytest.raises(DeviceError, match=r"cpu has no memory for a banner of 736×96: .*OVIS_LOW_MEMORY"):
        measured(tiny_float32, Watched(tiny_float32, fits=10))
    with pytest.raises(DeviceError, match="no kernel image"):
        measured(tiny_float32, Watched(tiny_float32, error="no kernel image is available"))


@pytest.mark.parametrize("bad", [{"bad_pack": 3}, {"bad_pack": 6}, {"bad_read": 3}], ids=str)
def test_a_device_that_fails_while_it_is_measured_is_named(bad: dict[str, int], tiny_float32: Model) -> None:
    """After two packs to warm up: in the first that is measured, in the first that is timed, and in making noise."""
    transformer = Watched(tiny_float32, **bad)
    with pytest.raises(DeviceError, match=r"cpu cannot draw: .*illegal memory access"):
        measured(tiny_float32, transformer)
    assert (len(transformer.packs) if "bad_pack" in bad else transformer.reads) == next(iter(bad.values()))
