"""The engine's face: what joins, what leaves, what is paused and taken up again, and what fails alone."""

import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from pipeline import latents_file
from pipeline.engine import Engine, Finished, Progress
from pipeline.errors import (
    BrokenImage,
    Drained,
    DrawingFailed,
    EngineFull,
    Exhausted,
    Fatal,
    InvalidRequest,
    PipelineError,
    PromptTooLong,
    UnusableLatents,
)
from pipeline.model import Model
from pipeline.planner import SharedSteps
from pipeline.request import ImageRequest
from pipeline.transformer import Branch, PackedTransformer
from tests.drawing import (
    Everybody,
    Troubled,
    draw,
    final_latents,
    finish,
    largest_difference,
    mean_difference,
    pixels_of,
    request_for,
    tokens_of,
)

OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2 GiB"
FOUR = [
    request_for("A fox", steps=3, seed=1),
    request_for("狐狸", width=96, steps=2, guidance=1, seed=2),
    request_for("A lighthouse", height=112, steps=3, guidance=2.5, seed=3),
    request_for('A sign: "OPEN"', width=80, height=80, steps=2, seed=4),
]


def draw_together(
    model: Model, requests: Sequence[ImageRequest], transformer: PackedTransformer | None = None
) -> list[Finished]:
    """All in one pack."""
    engine = Engine(model, Everybody(), transformer=transformer)
    tickets = [engine.submit(request) for request in requests]
    ended = finish(engine)
    return [ended[ticket] for ticket in tickets]


def between_steps(engine: Engine) -> dict[int, tuple[int, list[float]]]:
    """The step and the latents of all who are inside."""
    model = engine._model
    inside = {
        ticket: latents_file.read(engine.checkpoint(ticket), model.name, model.revision) for ticket in engine.progress()
    }
    return {ticket: (one.step, one.latents.flatten().tolist()) for ticket, one in inside.items()}


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


@contextmanager
def encodings(model: Model) -> Iterator[list[int]]:
    """The rows of each forward of the text encoder inside the block."""
    rows: list[int] = []
    hook = model.text_encoder.register_forward_hook(
        lambda _module, _positional, given, _output: rows.append(len(given["input_ids"])), with_kwargs=True
    )
    try:
        yield rows
    finally:
        hook.remove()


# What an image is


def test_the_picture_has_the_requests_size_and_says_what_it_took(tiny: Model) -> None:
    engine = Engine(tiny)
    ticket = engine.submit(request_for(width=101, height=67, steps=3))
    image = finish(engine)[ticket].image
    assert image is not None
    assert (image.pixels.shape, image.pixels.dtype, image.steps) == ((67, 101, 3), np.uint8, 3)
    assert 0 < image.drawing_s < 60


def test_a_size_between_multiples_of_16_is_the_centre_of_the_next_one(tiny: Model) -> None:
    whole = draw(tiny, request_for(width=112, height=80))
    assert np.array_equal(draw(tiny, request_for(width=101, height=67)), whole[6:73, 5:106])


def test_one_seed_is_one_picture_and_another_seed_another(tiny: Model) -> None:
    assert np.array_equal(draw(tiny, request_for()), draw(tiny, request_for()))
    assert mean_difference(draw(tiny, request_for()), draw(tiny, request_for(seed=2))) > 10


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_two_prompts_with_one_seed_are_visibly_two_pictures(guidance: float, tiny: Model) -> None:
    first, second = (draw(tiny, request_for(prompt, guidance=guidance, steps=8)) for prompt in ("A fox", "狐狸"))
    assert mean_difference(first, second) > 3


def test_the_negative_prompt_counts_when_guided_alone(tiny: Model) -> None:
    plain, negated = (draw(tiny, request_for(negative_prompt=text, steps=4)) for text in ("", "green"))
    assert mean_difference(plain, negated) > 1
    plain, negated = (draw(tiny, request_for(negative_prompt=text, guidance=1)) for text in ("", "green"))
    assert np.array_equal(plain, negated)


def test_what_the_device_took_is_shared_out_among_the_images(tiny: Model) -> None:
    engine, planner = Engine(tiny, planner := Everybody()), planner
    for request in FOUR:
        engine.submit(request)
    engine.step()  # prompts are read in it, which is nobody's drawing
    first_s = planner.observed[0][1]
    began = perf_counter()
    charged_s = sum(one.image.drawing_s for one in finish(engine).values() if one.image)
    taken_s = perf_counter() - began
    assert 0.8 * taken_s < charged_s - first_s <= taken_s


def test_of_a_shared_step_an_image_is_charged_by_its_tokens(tiny: Model) -> None:
    engine = Engine(tiny, planner := Everybody())
    engine.submit(request_for(guidance=1)), engine.submit(request_for(seed=2))
    engine.step()
    ((tokens, seconds),) = planner.observed
    assert tokens == 3 * 272
    charged = [image.drawing_s for image in engine._inside.values()]
    assert charged == pytest.approx([seconds / 3, seconds * 2 / 3])


# What joins and leaves


def test_images_join_between_steps_and_progress_tells_how_far_each_is(tiny: Model) -> None:
    engine = Engine(tiny, Everybody())
    assert engine.idle
    assert engine.step() == []
    first = engine.submit(request_for(steps=3))
    assert engine.step() == []
    second = engine.submit(request_for(steps=4))
    assert engine.progress() == {first: Progress(1, 3), second: Progress(0, 4)}
    assert engine.step() == []
    assert engine.progress() == {first: Progress(2, 3), second: Progress(1, 4)}
    (ended,) = engine.step()
    assert ended.ticket == first
    assert engine.progress() == {second: Progress(2, 4)}
    assert not engine.idle
    assert list(finish(engine)) == [second]


def test_images_of_other_sizes_steps_and_guidance_share_every_step(tiny: Model) -> None:
    engine = Engine(tiny, planner := Everybody())
    for request in FOUR:
        engine.submit(request)
    finish(engine)
    assert planner.packs == [4, 4, 2]


def test_the_products_planner_lets_images_share_steps_as_well(tiny: Model) -> None:
    engine = Engine(tiny)
    tickets = [engine.submit(request_for(seed=seed)) for seed in (1, 2)]
    engine.step()
    assert engine.progress() == {ticket: Progress(1, 2) for ticket in tickets}


def test_a_cancelled_image_is_gone_and_its_neighbour_finishes(tiny_float32: Model) -> None:
    engine = Engine(tiny_float32, Everybody())
    first, second = engine.submit(request_for()), engine.submit(request_for(seed=2))
    engine.step()
    assert engine.cancel(first)
    assert not engine.cancel(first)
    ended = finish(engine)
    assert list(ended) == [second]
    assert largest_difference(pixels_of(ended[second]), draw(tiny_float32, request_for(seed=2))) <= 1


def test_an_image_can_be_cancelled_while_its_picture_is_under_way(tiny: Model) -> None:
    engine = Engine(tiny)
    ticket = engine.submit(request_for(steps=1))
    wait_for_pixels(engine)
    engine.step()
    assert engine.progress() == {ticket: Progress(1, 1)}
    assert engine.cancel(ticket)
    assert engine.idle
    assert engine._decoder.idle


def wait_for_pixels(engine: Engine) -> None:
    """As on CUDA, where a picture that is launched in one step is there in a later one."""
    engine._decoder.collect = lambda *, wait: []  # type: ignore[method-assign]


def test_drain_gives_the_unfinished_back_and_takes_no_more_in(tiny: Model) -> None:
    engine = Engine(tiny)
    tickets = [engine.submit(request_for(seed=seed)) for seed in range(3)]
    unfinished = engine.checkpoint(tickets[0])
    engine.step()
    assert engine.drain() == tickets
    assert engine.idle
    assert engine.step() == []
    assert engine.drain() == []
    with pytest.raises(Drained):
        engine.submit(request_for())
    with pytest.raises(Drained):
        engine.resume(unfinished)


def test_a_full_engine_says_so_and_has_a_place_again_when_one_left(tiny: Model) -> None:
    engine = Engine(tiny, capacity=1)
    ticket = engine.submit(request_for())
    with pytest.raises(EngineFull) as caught:
        engine.submit(request_for())
    assert caught.value.capacity == engine.capacity == 1
    with pytest.raises(EngineFull):
        engine.resume(engine.checkpoint(ticket))
    engine.cancel(ticket)
    assert engine.submit(request_for()) != ticket


# What is refused


def test_a_request_without_a_seed_is_refused(tiny: Model) -> None:
    with pytest.raises(InvalidRequest, match="seeded") as caught:
        Engine(tiny).submit(request_for(seed=None))
    assert caught.value.field == "seed"


@pytest.mark.parametrize(("letter", "tokens_each"), [("x", 1), ("汉", 3)])
def test_a_prompt_of_246_tokens_is_drawn_and_one_more_is_refused(letter: str, tokens_each: int, tiny: Model) -> None:
    longest = letter * (246 // tokens_each)
    assert draw(tiny, request_for(longest)).shape == (64, 64, 3)
    with pytest.raises(PromptTooLong, match="reads 246 at most") as caught:
        Engine(tiny).submit(request_for(longest + "x"))
    assert (caught.value.field, caught.value.tokens, caught.value.limit) == ("prompt", 247, 246)


def test_a_negative_prompt_that_is_too_long_is_refused_when_it_would_be_read(tiny: Model) -> None:
    with pytest.raises(PromptTooLong) as caught:
        Engine(tiny).submit(request_for(negative_prompt="x" * 247))
    assert caught.value.field == "negative_prompt"
    assert Engine(tiny).submit(request_for(negative_prompt="x" * 247, guidance=1))


def test_a_refused_request_takes_no_place(tiny: Model) -> None:
    engine = Engine(tiny, capacity=1)
    with pytest.raises(PromptTooLong):
        engine.submit(request_for("x" * 247))
    assert engine.idle


# What fails, and who with it


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


# What is paused for others


def test_an_urgent_image_goes_first_and_those_it_paused_end_as_they_would_have(tiny: Model) -> None:
    calm = [request_for(steps=4, seed=seed) for seed in (1, 2)]
    undisturbed = Engine(tiny, SharedSteps(8192, capacity=8))
    for request in calm:
        undisturbed.submit(request, priority=5)
    expected = finish(undisturbed)

    engine = Engine(tiny, SharedSteps(8192, capacity=8))
    tickets = [engine.submit(request, priority=5) for request in calm]
    engine.step()
    urgent = engine.submit(request_for("狐狸", width=96, steps=3), priority=0)
    paused = {ticket: between_steps(engine)[ticket] for ticket in tickets}
    for done in (1, 2):
        assert engine.step() == []
        assert engine.progress() == {tickets[0]: Progress(1, 4), tickets[1]: Progress(1, 4), urgent: Progress(done, 3)}
    assert {ticket: between_steps(engine)[ticket] for ticket in tickets} == paused
    (first,) = engine.step()
    assert first.ticket == urgent
    assert np.array_equal(pixels_of(first), draw(tiny, request_for("狐狸", width=96, steps=3)))
    ended = finish(engine)
    for ticket in tickets:
        assert np.array_equal(pixels_of(ended[ticket]), pixels_of(expected[ticket]))


# What goes on elsewhere

INTERRUPTED = request_for("A fox 🦊", width=101, height=80, steps=4, guidance=3.5, seed=2**63 - 1)


def checkpoint_after(steps: int, model: Model) -> bytes:
    engine = Engine(model)
    ticket = engine.submit(INTERRUPTED)
    wait_for_pixels(engine)
    for _ in range(steps):
        assert engine.step() == []
    return engine.checkpoint(ticket)


@pytest.mark.parametrize("done", [0, 2, 4])
def test_another_engine_takes_an_image_up_and_draws_the_same_bits(done: int, tiny: Model) -> None:
    engine = Engine(tiny)
    ticket = engine.resume(checkpoint_after(done, tiny))
    assert engine.progress() == {ticket: Progress(done, 4)}
    finished = finish(engine)[ticket]
    assert np.array_equal(pixels_of(finished), draw(tiny, INTERRUPTED))
    assert finished.image is not None
    assert finished.image.steps == 4


def test_another_process_takes_an_image_up_and_draws_the_same_bits(
    models_dir: Path, tmp_path: Path, tiny: Model
) -> None:
    (tmp_path / "unfinished").write_bytes(checkpoint_after(2, tiny))
    code = """
import sys
from pathlib import Path
import numpy as np
from pipeline.engine import Engine
from pipeline.model import load_model
from tests.drawing import finish, pixels_of

models_dir, folder = map(Path, sys.argv[1:])
engine = Engine(load_model("tiny", device="cpu", models_dir=models_dir))
ticket = engine.resume((folder / "unfinished").read_bytes())
np.save(folder / "pixels.npy", pixels_of(finish(engine)[ticket]))
"""
    subprocess.run([sys.executable, "-c", code, str(models_dir), str(tmp_path)], timeout=120, check=True)
    assert np.array_equal(np.load(tmp_path / "pixels.npy"), draw(tiny, INTERRUPTED))


def test_to_take_a_checkpoint_changes_nothing(tiny: Model) -> None:
    engine = Engine(tiny)
    ticket = engine.submit(INTERRUPTED)
    ended: list[Finished] = []
    while not ended:
        engine.checkpoint(ticket)
        ended = engine.step()
    assert np.array_equal(pixels_of(ended[0]), draw(tiny, INTERRUPTED))


def test_an_image_taken_up_has_no_preview_until_it_moves(tiny: Model) -> None:
    engine = Engine(tiny)
    ticket = engine.resume(checkpoint_after(2, tiny))
    assert engine.preview(ticket) is None
    engine.step()
    assert engine.preview(ticket) is not None


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"name": "another"}, "here is another"), ({"revision": "sha256-0"}, "sha256-0"), ({}, "float32")],
    ids=["model", "revision", "dtype"],
)
def test_latents_of_another_model_are_refused_and_take_no_place(
    change: dict[str, str], reason: str, tiny: Model, tiny_float32: Model
) -> None:
    engine = Engine(replace(tiny, **change) if change else tiny_float32, capacity=1)
    with pytest.raises(UnusableLatents, match=reason):
        engine.resume(checkpoint_after(1, tiny))
    assert engine.idle
    assert engine.submit(request_for())


@pytest.mark.parametrize("spoil", [lambda body: b"", lambda body: body[:-1], lambda body: b"no" + body], ids=range(3))
def test_bytes_that_were_damaged_are_refused_and_take_no_place(spoil: Callable[[bytes], bytes], tiny: Model) -> None:
    engine = Engine(tiny, capacity=1)
    with pytest.raises(UnusableLatents):
        engine.resume(spoil(checkpoint_after(1, tiny)))
    assert engine.idle
    assert engine.submit(request_for())


def test_a_checkpoint_of_an_image_that_is_not_inside_is_a_key_error(tiny: Model) -> None:
    engine = Engine(tiny)
    ticket = engine.submit(request_for(steps=1))
    with pytest.raises(KeyError):
        engine.checkpoint(ticket + 1)
    finish(engine)
    with pytest.raises(KeyError):
        engine.checkpoint(ticket)


# What can be seen on the way


def test_there_is_no_preview_before_the_first_step_nor_after_the_last(tiny: Model) -> None:
    engine = Engine(tiny)
    ticket = engine.submit(request_for(steps=1))
    assert engine.preview(ticket) is None
    assert engine.preview(ticket + 1) is None
    finish(engine)
    assert engine.preview(ticket) is None


@pytest.mark.parametrize(("size", "shape"), [((101, 64), (64, 101, 3)), ((512, 64), (32, 256, 3))], ids=str)
def test_a_preview_is_a_small_picture_of_the_requests_shape(
    size: tuple[int, int], shape: tuple[int, int, int], tiny: Model
) -> None:
    engine = Engine(tiny)
    ticket = engine.submit(request_for(width=size[0], height=size[1]))
    engine.step()
    preview = engine.preview(ticket)
    assert preview is not None
    assert (preview.shape, preview.dtype) == (shape, np.uint8)


def test_a_preview_comes_ever_nearer_to_the_picture_and_changes_nothing(tiny: Model) -> None:
    request = request_for(width=128, height=96, steps=12)
    engine = Engine(tiny)
    ticket = engine.submit(request)
    picture = draw(tiny, request)
    away: list[float] = []
    ended = engine.step()
    while not ended:
        preview = engine.preview(ticket)
        assert preview is not None
        away.append(mean_difference(preview, picture))
        ended = engine.step()
    assert np.array_equal(pixels_of(ended[0]), picture)
    assert away[-1] < 3
    assert away[-1] < away[5] < away[0]


# What is read, and how often


def test_all_variants_of_a_prompt_and_the_empty_one_are_read_once(tiny: Model) -> None:
    engine = Engine(tiny)
    with encodings(tiny) as rows:
        for seed in range(4):
            engine.submit(request_for(seed=seed))
        engine.step()
        assert rows == [2]
        engine.submit(request_for(seed=4))
        engine.step()
        assert rows == [2]
        engine.submit(request_for("another prompt"))
        finish(engine)
    assert rows == [2, 1]


def test_prompts_that_wait_are_read_together_whoever_draws_first(tiny: Model) -> None:
    engine = Engine(tiny, SharedSteps(1, capacity=8))
    with encodings(tiny) as rows:
        for prompt in ("one", "two", "three"):
            engine.submit(request_for(prompt))
        engine.step()
        assert [progress.done for progress in engine.progress().values()] == [1, 0, 0]
        finish(engine)
    assert rows == [4]


def test_no_prompt_is_read_while_nobody_draws_who_needs_it(tiny: Model) -> None:
    engine = Engine(tiny)
    with encodings(tiny) as rows:
        engine.submit(request_for("urgent", steps=3, guidance=1), priority=0)
        engine.step()
        engine.submit(request_for("calm"), priority=9)
        engine.step()
        assert rows == [1]
        finish(engine)
    assert rows == [1, 2]


def test_a_prompt_that_cannot_be_read_beside_others_is_read_alone(tiny_float32: Model) -> None:
    def refuse(_module: object, _positional: object, given: dict[str, torch.Tensor]) -> None:
        if len(given["input_ids"]) > 2:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    hook = tiny_float32.text_encoder.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        together = draw_together(tiny_float32, FOUR)
    finally:
        hook.remove()
    for one, other in zip(together, draw_together(tiny_float32, FOUR), strict=True):
        assert largest_difference(pixels_of(one), pixels_of(other)) <= 1


def test_an_image_whose_prompt_cannot_be_read_fails_alone(tiny_float32: Model) -> None:
    def refuse(_module: object, _positional: object, given: dict[str, torch.Tensor]) -> None:
        if given["input_ids"].shape[1] > 128:
            raise RuntimeError("a prompt that torch refuses")

    hook = tiny_float32.text_encoder.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        first, guilty, last = draw_together(tiny_float32, [FOUR[0], request_for("x" * 200), FOUR[1]])
    finally:
        hook.remove()
    assert type(guilty.error) is DrawingFailed
    for one, other in zip((first, last), draw_together(tiny_float32, FOUR[:2]), strict=True):
        assert largest_difference(pixels_of(one), pixels_of(other)) <= 1


def test_final_latents_are_those_of_the_last_checkpoint(tiny: Model) -> None:
    """What the parity tests rest on."""
    engine = Engine(tiny)
    seen = final_latents(engine)
    ticket = engine.submit(INTERRUPTED)
    finish(engine)
    last = latents_file.read(checkpoint_after(4, tiny), tiny.name, tiny.revision)
    assert torch.equal(seen[ticket], last.latents[0])
