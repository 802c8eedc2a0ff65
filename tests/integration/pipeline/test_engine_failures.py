"""What fails in the engine, and who with it: one guilty image alone, and nobody where halves still fit."""

import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from pipeline.engine import Engine, Finished, Progress
from pipeline.errors import BrokenImage, DrawingFailed, Exhausted, Fatal, PipelineError
from pipeline.model import Model
from pipeline.planner import SharedSteps
from pipeline.request import ImageRequest
from pipeline.transformer import Branch, PackedTransformer
from tests.drawing import (
    FOUR,
    OUT_OF_MEMORY,
    Everybody,
    Troubled,
    draw,
    draw_together,
    finish,
    largest_difference,
    pixels_of,
    request_for,
    tokens_of,
)


def above(tokens: int) -> Callable[[Sequence[Branch]], None]:
    """Trouble: a device on which no more than ``tokens`` fit."""

    def refuse(pack: Sequence[Branch]) -> None:
        if tokens_of(pack) > tokens:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    return refuse


def whenever(guilty: ImageRequest, error: BaseException) -> Callable[[Sequence[Branch]], None]:
    """Trouble: an image of this size cannot be drawn."""
    width, height = (side_px // 8 for side_px in guilty.drawn_size)

    def refuse(pack: Sequence[Branch]) -> None:
        if any((branch.width, branch.height) == (width, height) for branch in pack):
            raise error

    return refuse


class Spoiling(PackedTransformer):
    """The real one, but the velocities of one size are some number throughout."""

    def __init__(self, model: Model, guilty: ImageRequest, number: float) -> None:
        super().__init__(model.transformer, model.modulations)
        self._tokens, self._number = guilty.drawn_size[0] * guilty.drawn_size[1] // 256, number

    def __call__(self, pack: Sequence[Branch]) -> list[torch.Tensor]:
        velocities = super().__call__(pack)
        return [torch.full_like(one, self._number) if len(one) == self._tokens else one for one in velocities]


@pytest.mark.parametrize("guilty", [0, 2, 3])
@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError(OUT_OF_MEMORY), Exhausted),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), Exhausted),
        (RuntimeError("a shape that does not fit"), DrawingFailed),
    ],
    ids=["memory of CUDA", "memory of a CPU", "no class"],
)
def test_one_guilty_image_in_a_pack_fails_alone(
    error: RuntimeError, kind: type[PipelineError], guilty: int, tiny_float32: Model
) -> None:
    together = draw_together(tiny_float32, FOUR, Troubled(tiny_float32, whenever(FOUR[guilty], error)))
    assert type(together[guilty].error) is kind
    assert together[guilty].image is None
    check_all_but(guilty, together, tiny_float32)


def test_a_guided_image_whose_branches_do_not_fit_together_is_drawn_branch_by_branch(tiny_float32: Model) -> None:
    requests = [request_for(), request_for(width=128)]  # of 2 · 272 and 2 · 288 tokens
    planner = Everybody()
    engine = Engine(tiny_float32, planner, transformer=Troubled(tiny_float32, above(300)))
    tickets = [engine.submit(request) for request in requests]
    ended = finish(engine)
    for ticket, request in zip(tickets, requests, strict=True):
        assert largest_difference(pixels_of(ended[ticket]), draw(tiny_float32, request)) <= 1
    assert planner.too_large == [2 * 272 + 2 * 288] * 2  # for an image alone the budget is not cut


def test_prompts_that_do_not_fit_together_are_read_in_halves_and_cut_no_budget(
    tiny_float32: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    planner = Everybody()
    engine = Engine(tiny_float32, planner)
    encode = engine._prompts.encode

    def short(prompts: Iterable[str]) -> list[torch.Tensor]:
        wanted = list(prompts)
        if len(wanted) > 2:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)
        return encode(wanted)

    monkeypatch.setattr(engine._prompts, "encode", short)
    for seed in range(4):
        engine.submit(request_for(f"A fox {seed}"))
    assert all(ended.image for ended in finish(engine).values())
    assert planner.too_large == []


def test_a_guilty_image_does_not_wait_behind_newcomers_that_fill_its_packs(tiny_float32: Model) -> None:
    """It is the largest, so it stands last in every pack: it must be tried in the step in which it was picked."""
    large = request_for(width=128, guidance=1)
    refuse = whenever(large, RuntimeError("a shape that does not fit"))
    engine = Engine(tiny_float32, Everybody(), transformer=Troubled(tiny_float32, refuse))
    guilty, *others = [engine.submit(large), *(engine.submit(request_for(seed=seed, steps=3)) for seed in range(3))]
    (ended,) = engine.step()
    assert (ended.ticket, type(ended.error)) == (guilty, DrawingFailed)
    assert engine.progress() == {ticket: Progress(1, 3) for ticket in others}


def test_a_checkpoint_that_the_device_has_no_room_for_is_admitted_and_fails_by_its_ticket(
    tiny_float32: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Engine(tiny_float32)
    moved = first.submit(request_for(steps=3))
    first.step()
    second = Engine(tiny_float32)
    ticket = second.resume(first.checkpoint(moved))
    neighbour = second.submit(request_for(seed=2))

    def no_room(*_: object) -> None:
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    monkeypatch.setattr(second._inside[ticket], "latents", Mock(to=no_room))
    ended = finish(second)
    assert isinstance(ended[ticket].error, Exhausted)
    assert ended[neighbour].image is not None


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("guilty", [1, 2])
def test_an_image_whose_numbers_break_fails_alone_and_names_its_step(
    number: float, guilty: int, tiny_float32: Model
) -> None:
    together = draw_together(tiny_float32, FOUR, Spoiling(tiny_float32, FOUR[guilty], number))
    broken = together[guilty].error
    assert isinstance(broken, BrokenImage)
    assert broken.step == 1
    check_all_but(guilty, together, tiny_float32)


def check_all_but(guilty: int, together: Sequence[Finished], model: Model) -> None:
    """Everybody else is what it is without the guilty one."""
    others = [place for place in range(len(FOUR)) if place != guilty]
    for place, expected in zip(others, draw_together(model, [FOUR[place] for place in others]), strict=True):
        assert largest_difference(pixels_of(together[place]), pixels_of(expected)) <= 1, FOUR[place]


def test_a_pack_that_does_not_fit_is_drawn_in_halves_in_the_same_step(tiny_float32: Model) -> None:
    planner = Everybody()
    engine = Engine(tiny_float32, planner, transformer=Troubled(tiny_float32, above(1100)))
    tickets = [engine.submit(request_for(seed=seed)) for seed in range(4)]  # of 544 tokens each
    assert engine.step() == []
    assert [progress.done for progress in engine.progress().values()] == [1, 1, 1, 1]
    assert planner.too_large == [4 * 544]
    assert [tokens for tokens, _ in planner.observed] == [2 * 544, 2 * 544]
    ended = finish(engine)
    for seed, ticket in enumerate(tickets):
        assert largest_difference(pixels_of(ended[ticket]), draw(tiny_float32, request_for(seed=seed))) <= 1


def test_images_that_were_halved_apart_end_as_they_would_have(tiny_float32: Model) -> None:
    apart = draw_together(tiny_float32, FOUR, Troubled(tiny_float32, above(700)))
    for one, other in zip(apart, draw_together(tiny_float32, FOUR), strict=True):
        assert largest_difference(pixels_of(one), pixels_of(other)) <= 1


def test_the_products_planner_asks_for_half_of_what_did_not_fit(tiny: Model) -> None:
    planner = SharedSteps(8192, capacity=8)
    asked: list[int] = []

    def refuse(pack: Sequence[Branch]) -> None:
        asked.append(tokens_of(pack))
        above(1100)(pack)

    engine = Engine(tiny, planner, transformer=Troubled(tiny, refuse))
    for seed in range(4):
        engine.submit(request_for(seed=seed))
    finish(engine)
    assert planner.budget_tokens == 2 * 544
    assert asked == [4 * 544, *[2 * 544] * 4]


def test_an_image_that_does_not_fit_alone_names_its_size_and_the_memory(tiny_float32: Model) -> None:
    large = request_for(width=144, height=130, seed=9)
    together = draw_together(tiny_float32, [*FOUR, large], Troubled(tiny_float32, above(300)))
    error = together[-1].error
    assert isinstance(error, Exhausted)
    assert (error.width_px, error.height_px) == (144, 144)
    assert str(error) == f"144×144 does not fit the device's memory: {OUT_OF_MEMORY}"
    for one, other in zip(together, draw_together(tiny_float32, FOUR), strict=False):
        assert largest_difference(pixels_of(one), pixels_of(other)) <= 1


def test_an_error_keeps_no_tensor_of_its_step(tiny: Model) -> None:
    (failed,) = draw_together(tiny, [request_for()], Troubled(tiny, above(0)))
    assert failed.error is not None
    cause, held = failed.error.__cause__, []
    traceback = cause.__traceback__ if cause else None
    while traceback:
        held += [name for name, value in traceback.tb_frame.f_locals.items() if isinstance(value, torch.Tensor)]
        traceback = traceback.tb_next
    assert held == []


def test_memory_that_is_really_short_fails_the_large_image_alone(models_dir: Path, tiny: Model) -> None:
    """A process whose address space is closed: what malloc refuses is torch's own error, not a test's."""
    code = """
import resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from pipeline.engine import Engine
from pipeline.model import load_model
from tests.drawing import Everybody, finish, request_for

model = load_model("tiny", device="cpu", models_dir=Path(sys.argv[1]), dtype=torch.float32)
def draw(*requests):
    engine = Engine(model, Everybody())
    tickets = [engine.submit(request) for request in requests]
    ended = finish(engine)
    return [ended[ticket] for ticket in tickets]
small = request_for("A fox", steps=2)
large = request_for("A fox", width=2048, height=2048, steps=1)
(before,) = draw(small)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 48 * 2**20,) * 2)
first, failed, last = draw(small, large, small)
assert (first.image.pixels == before.image.pixels).all() and (last.image.pixels == before.image.pixels).all()
print(type(failed.error).__name__, failed.error)
"""
    found = subprocess.run(
        [sys.executable, "-c", code, str(models_dir)], capture_output=True, text=True, timeout=120, check=False
    )
    assert found.stdout.startswith("Exhausted 2048×2048 does not fit the device's memory: "), found.stderr


@pytest.mark.parametrize(
    "error",
    [torch.AcceleratorError("an illegal memory access"), RuntimeError("CUDA error: device-side assert triggered")],
    ids=str,
)
def test_a_dead_device_ends_the_engine(error: RuntimeError, tiny: Model) -> None:
    with pytest.raises(Fatal, match="the device is dead"):
        draw_together(tiny, FOUR, Troubled(tiny, whenever(FOUR[1], error)))
