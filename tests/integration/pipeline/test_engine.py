"""The engine's face: what joins, what leaves, and what fails alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

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
)
from pipeline.model import Model
from pipeline.request import ImageRequest


def request_for(prompt: str = "A fox", **fields: object) -> ImageRequest:
    return ImageRequest.model_validate({"prompt": prompt, "width": 64, "height": 64, "steps": 2, "seed": 1, **fields})


def finish(engine: Engine) -> dict[int, Finished]:
    ended: dict[int, Finished] = {}
    while not engine.idle:
        ended |= {finished.ticket: finished for finished in engine.step()}
    return ended


def draw(model: Model, request: ImageRequest) -> NDArray[np.uint8]:
    engine = Engine(model)
    ticket = engine.submit(request)
    image = finish(engine)[ticket].image
    assert image is not None
    return image.pixels


class Transformer:
    """The real one, until the call that a test wants to go wrong."""

    def __init__(self, model: Model, call: int, outcome: BaseException | float) -> None:
        self._real, self._call, self._outcome = model.transformer, call, outcome
        self.config = model.transformer.config

    def __call__(self, **inputs: object) -> tuple[torch.Tensor]:
        self._call -= 1
        (velocity,) = self._real(**inputs)
        if self._call:
            return (velocity,)
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        return (torch.full_like(velocity, self._outcome),)


def draw_three(model: Model, outcome: BaseException | float) -> list[Finished]:
    """Three unguided images of two steps; the first step of the second goes wrong."""
    engine = Engine(replace(model, transformer=Transformer(model, 3, outcome)))
    tickets = [engine.submit(request_for(guidance=1, seed=seed)) for seed in (1, 2, 3)]
    ended = finish(engine)
    return [ended[ticket] for ticket in tickets]


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
    assert difference(draw(tiny, request_for()), draw(tiny, request_for(seed=2))) > 10


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_two_prompts_with_one_seed_are_visibly_two_pictures(guidance: float, tiny: Model) -> None:
    first, second = (draw(tiny, request_for(prompt, guidance=guidance, steps=8)) for prompt in ("A fox", "狐狸"))
    assert difference(first, second) > 3


def test_the_negative_prompt_counts_when_guided_alone(tiny: Model) -> None:
    plain, negated = (draw(tiny, request_for(negative_prompt=text, steps=4)) for text in ("", "green"))
    assert difference(plain, negated) > 1
    plain, negated = (draw(tiny, request_for(negative_prompt=text, guidance=1)) for text in ("", "green"))
    assert np.array_equal(plain, negated)


def test_images_join_between_steps_and_progress_tells_how_far_each_is(tiny: Model) -> None:
    engine = Engine(tiny)
    assert engine.idle
    assert engine.step() == []
    first = engine.submit(request_for(steps=3))
    assert engine.step() == []
    second = engine.submit(request_for(steps=2))
    assert engine.progress() == {first: Progress(1, 3), second: Progress(0, 2)}
    assert engine.step() == []
    (ended,) = engine.step()
    assert ended.ticket == first
    assert engine.progress() == {second: Progress(0, 2)}
    assert not engine.idle
    assert list(finish(engine)) == [second]


def test_a_cancelled_image_is_gone_and_its_neighbour_finishes(tiny: Model) -> None:
    engine = Engine(tiny)
    first, second = engine.submit(request_for()), engine.submit(request_for(seed=2))
    engine.step()
    assert engine.cancel(first)
    assert not engine.cancel(first)
    ended = finish(engine)
    assert list(ended) == [second]
    image = ended[second].image
    assert image is not None
    assert np.array_equal(image.pixels, draw(tiny, request_for(seed=2)))


def test_drain_gives_the_unfinished_back_and_takes_no_more_in(tiny: Model) -> None:
    engine = Engine(tiny)
    tickets = [engine.submit(request_for(seed=seed)) for seed in range(3)]
    engine.step()
    assert engine.drain() == tickets
    assert engine.idle
    assert engine.step() == []
    assert engine.drain() == []
    with pytest.raises(Drained):
        engine.submit(request_for())


def test_a_full_engine_says_so_and_has_a_place_again_when_one_left(tiny: Model) -> None:
    engine = Engine(tiny, capacity=1)
    ticket = engine.submit(request_for())
    with pytest.raises(EngineFull) as caught:
        engine.submit(request_for())
    assert caught.value.capacity == engine.capacity == 1
    engine.cancel(ticket)
    assert engine.submit(request_for()) != ticket


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


def test_the_last_token_of_the_longest_prompt_still_counts(tiny: Model) -> None:
    from pipeline.prompt import PromptEncoder

    encoder = PromptEncoder(tiny)
    assert not torch.equal(encoder.encode("x" * 245 + "y"), encoder.encode("x" * 246))


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


@pytest.mark.parametrize(
    ("outcome", "error"),
    [
        (float("nan"), BrokenImage),
        (float("inf"), BrokenImage),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), Exhausted),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), Exhausted),
        (RuntimeError("a shape that does not fit"), DrawingFailed),
    ],
    ids=str,
)
def test_an_image_that_fails_fails_alone(
    outcome: BaseException | float, error: type[PipelineError], tiny: Model
) -> None:
    first, broken, third = draw_three(tiny, outcome)
    assert isinstance(broken.error, error)
    assert broken.image is None
    for finished, seed in ((first, 1), (third, 3)):
        assert finished.image is not None
        assert np.array_equal(finished.image.pixels, draw(tiny, request_for(guidance=1, seed=seed)))


def test_a_broken_image_names_its_step_and_an_exhausted_one_its_size(tiny: Model) -> None:
    broken = draw_three(tiny, float("nan"))[1].error
    assert isinstance(broken, BrokenImage)
    assert broken.step == 1
    exhausted = draw_three(tiny, torch.OutOfMemoryError("out of memory"))[1].error
    assert isinstance(exhausted, Exhausted)
    assert (exhausted.width_px, exhausted.height_px) == (64, 64)


@pytest.mark.parametrize(
    "outcome",
    [torch.AcceleratorError("an illegal memory access"), RuntimeError("CUDA error: device-side assert triggered")],
    ids=str,
)
def test_a_dead_device_ends_the_engine(outcome: RuntimeError, tiny: Model) -> None:
    with pytest.raises(Fatal, match="the device is dead"):
        draw_three(tiny, outcome)


def difference(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> float:
    """Mean absolute difference, of 255."""
    return float(np.abs(first.astype(int) - second).mean())
