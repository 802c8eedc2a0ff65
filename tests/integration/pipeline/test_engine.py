"""The engine's face: what an image is, what joins, what leaves, what is refused, and what is paused for others."""

from time import perf_counter

import numpy as np
import pytest

from pipeline import latents_file
from pipeline.decoder import Decoder
from pipeline.engine import Engine, Progress
from pipeline.errors import Drained, EngineFull, InvalidRequest, PromptTooLong
from pipeline.model import Model
from pipeline.planner import SharedSteps
from tests.drawing import (
    FOUR,
    Everybody,
    draw,
    finish,
    largest_difference,
    mean_difference,
    pixels_of,
    request_for,
    wait_for_pixels,
)


def between_steps(engine: Engine) -> dict[int, tuple[int, list[float]]]:
    """The step and the latents of all who are inside."""
    model = engine._model
    inside = {
        ticket: latents_file.read(engine.checkpoint(ticket), model.name, model.revision) for ticket in engine.progress()
    }
    return {ticket: (one.step, one.latents.flatten().tolist()) for ticket, one in inside.items()}


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
    assert Decoder.collect(engine._decoder, wait=True) == []


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
