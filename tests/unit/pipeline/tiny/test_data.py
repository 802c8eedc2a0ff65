"""The domain keeps its promises, in words and in pixels."""

from random import Random

import numpy as np
import pytest

from pipeline.tiny.banner import COLOURS, Banner, Direction, Ground, GroundKind, Typeface, default_colour
from pipeline.tiny.data import Example, draw_example
from pipeline.tiny.drawing import render
from pipeline.tiny.evaluate import ground_is_right
from pipeline.tiny.lines import CHARACTERS, LINE_MAX_CHARACTERS, held_out

TOKENS_LEFT_BY_THE_TEMPLATE = 246
SIZES_PX = [(256, 64), (256, 256), (64, 64), (64, 256), (128, 96), (240, 80)]


def drawn(count: int, width_px: int, height_px: int, *, of_held_out: bool = False) -> list[Example]:
    return [
        draw_example(Random(f"test {number}"), width_px, height_px, of_held_out=of_held_out) for number in range(count)
    ]


@pytest.mark.parametrize("of_held_out", [False, True])
def test_training_and_evaluation_never_share_a_line(of_held_out: bool) -> None:
    lines = [line for example in drawn(300, 256, 64, of_held_out=of_held_out) for line in example.banner.lines]
    assert all(held_out(line) is of_held_out for line in lines)


def test_what_is_held_out_is_so_however_it_is_capitalised() -> None:
    words = [f"word{number}" for number in range(400)]
    assert 10 < sum(map(held_out, words)) < 50
    assert [held_out(word) for word in words] == [held_out(word.upper()) for word in words]


@pytest.mark.parametrize(("width_px", "height_px"), SIZES_PX)
def test_one_seed_gives_one_prompt_and_one_picture_of_the_size_asked_for(width_px: int, height_px: int) -> None:
    for first, second in zip(drawn(10, width_px, height_px), drawn(10, width_px, height_px), strict=True):
        assert first == second
        pixels = render(first.banner, width_px, height_px)
        assert pixels.shape == (height_px, width_px, 3)
        assert np.array_equal(pixels, render(second.banner, width_px, height_px))


def test_a_prompt_quotes_every_line_in_marks_that_the_lines_do_not_hold() -> None:
    for example in drawn(300, 256, 256):
        for line in example.banner.lines:
            before, after = example.prompt.split(line, 1) if example.prompt.count(line) == 1 else ("-", "-")
            assert before == "-" or before[-1] in "\"'“‘«„`‹「"
            assert after == "-" or after[0] in "\"'”’»“`›」"
            assert line in example.prompt
            assert len(line) <= LINE_MAX_CHARACTERS
            assert set(line) <= set(CHARACTERS)


def test_the_model_can_read_every_prompt_to_its_end() -> None:
    longest = max(len(example.prompt.encode()) for example in drawn(1000, 256, 64))
    assert longest <= TOKENS_LEFT_BY_THE_TEMPLATE


def test_a_colour_that_the_prompt_leaves_out_goes_without_saying() -> None:
    unsaid = [
        example.banner
        for example in drawn(300, 256, 256)
        if example.banner.colour.replace("grey", "gr") not in example.prompt
    ]
    assert unsaid
    assert all(banner.colour == default_colour(banner.ground) for banner in unsaid)


@pytest.mark.parametrize(("width_px", "height_px"), SIZES_PX)
def test_a_true_picture_has_its_ground_right_and_in_other_colours_wrong(width_px: int, height_px: int) -> None:
    for example in drawn(40, width_px, height_px):
        ground = example.banner.ground
        pixels = render(example.banner, width_px, height_px)
        other = next(name for name in COLOURS if name not in ground.colours)
        assert ground_is_right(ground, pixels)
        assert not ground_is_right(Ground(GroundKind.PLAIN, (other,)), pixels)


@pytest.mark.parametrize("typeface", Typeface)
def test_text_is_painted_in_its_colour_and_stands_in_the_middle(typeface: Typeface) -> None:
    banner = Banner(Ground(GroundKind.PLAIN, ("red",)), ("HOTEL", "H7"), "white", typeface)
    painted = (render(banner, 256, 128) == COLOURS["white"]).all(-1)
    rows, columns = np.nonzero(painted)
    assert abs((rows.min() + rows.max()) / 2 - 63.5) < 3
    assert abs((columns.min() + columns.max()) / 2 - 127.5) < 3


def test_typefaces_differ() -> None:
    ground = Ground(GroundKind.PLAIN, ("red",))
    pictures = {render(Banner(ground, ("Hotel",), "white", face), 256, 64).tobytes() for face in Typeface}
    assert len(pictures) == len(Typeface)


def test_a_gradient_goes_from_the_first_colour_to_the_second() -> None:
    banner = Banner(Ground(GroundKind.GRADIENT, ("red", "blue"), Direction.DOWN), ("X",), "white", Typeface.SANS)
    pixels = render(banner, 64, 64)
    assert tuple(pixels[0, 0]) == COLOURS["red"]
    assert tuple(pixels[-1, -1]) == COLOURS["blue"]


def test_a_text_that_does_not_fit_is_refused() -> None:
    banner = Banner(Ground(GroundKind.PLAIN, ("red",)), ("WWWWWWWWWW",), "white", Typeface.SANS)
    with pytest.raises(ValueError, match="does not fit"):
        render(banner, 64, 64)
