"""Which prompts the engine reads, and how often."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipeline.engine import Engine
from pipeline.errors import DrawingFailed
from pipeline.model import Model
from pipeline.planner import SharedSteps
from tests.drawing import FOUR, OUT_OF_MEMORY, draw_together, finish, largest_difference, pixels_of, request_for


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
