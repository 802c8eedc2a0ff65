"""The limits of a request, and the words in which they are refused."""

import pytest
from pydantic import ValidationError

from pipeline.request import PROMPT_MAX_CHARACTERS, SEED_MAX, ImageRequest


def refusal(**fields: object) -> str:
    with pytest.raises(ValidationError) as caught:
        ImageRequest.model_validate({"prompt": "a fox", **fields})
    (error,) = caught.value.errors()
    return f"{error['loc'][0]}: {error['msg']}"


@pytest.mark.parametrize(
    ("field", "low", "high"), [("width", 64, 2048), ("height", 64, 2048), ("steps", 1, 100), ("seed", 0, SEED_MAX)]
)
def test_a_number_is_taken_at_its_limits_and_refused_beyond_them_by_name(field: str, low: int, high: int) -> None:
    for value in (low, high):
        assert getattr(ImageRequest.model_validate({"prompt": "a fox", field: value}), field) == value
    assert refusal(**{field: low - 1}).startswith(f"{field}: ")
    assert refusal(**{field: high + 1}).startswith(f"{field}: ")


@pytest.mark.parametrize("guidance", [-0.1, 20.1, float("nan"), float("inf")])
def test_guidance_outside_0_to_20_is_refused(guidance: float) -> None:
    assert refusal(guidance=guidance).startswith("guidance: ")


@pytest.mark.parametrize("field", ["width", "height", "steps", "guidance", "seed", "quality"])
def test_a_truth_value_is_no_number(field: str) -> None:
    assert "must be a number" in refusal(**{field: True})


def test_an_unknown_field_is_refused_by_its_name() -> None:
    assert refusal(strength=0.5).startswith("strength: ")


@pytest.mark.parametrize("prompt", ["", "  \n\t "])
def test_an_empty_prompt_is_refused_with_what_to_do(prompt: str) -> None:
    assert "say what to draw" in refusal(prompt=prompt)


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_a_text_that_is_no_text_is_refused_with_what_to_do(field: str) -> None:
    assert "NUL" in refusal(**{field: "a\x00b"})
    assert "UTF-8" in refusal(**{field: "a\ud83db"})


def test_a_prompt_that_is_surely_too_long_is_refused_without_a_tokenizer() -> None:
    assert ImageRequest(prompt="汉" * PROMPT_MAX_CHARACTERS)
    assert refusal(prompt="汉" * (PROMPT_MAX_CHARACTERS + 1)).startswith("prompt: ")


def test_a_size_between_multiples_of_16_is_drawn_at_the_next_one() -> None:
    assert ImageRequest(prompt="a fox", width=728, height=90).drawn_size == (736, 96)
    assert ImageRequest(prompt="a fox", width=1024, height=64).drawn_size == (1024, 64)


def test_a_seed_is_given_once_and_kept() -> None:
    seeded = ImageRequest(prompt="a fox").seeded()
    assert seeded.seed is not None
    assert seeded.seeded() is seeded


def test_an_aspect_ratio_beyond_the_trained_ones_carries_a_warning() -> None:
    assert ImageRequest(prompt="a fox", width=400, height=100).warnings() == []
    (warning,) = ImageRequest(prompt="a fox", width=728, height=90).warnings()
    assert "8.1:1" in warning


def test_guidance_at_or_below_1_draws_one_branch() -> None:
    assert not ImageRequest(prompt="a fox", guidance=1).guided
    assert ImageRequest(prompt="a fox", guidance=1.01).guided


def test_variants_differ_in_their_seed_alone_and_count_up_from_the_first() -> None:
    request = ImageRequest(prompt="A fox", seed=7, steps=3)
    assert request.variants(3) == [ImageRequest(prompt="A fox", seed=seed, steps=3) for seed in (7, 8, 9)]


def test_variants_of_the_largest_seed_are_requests_too() -> None:
    seeds = [variant.seed for variant in ImageRequest(prompt="A fox", seed=SEED_MAX).variants(2)]
    assert seeds == [SEED_MAX, 0]
