"""The figures of the engine's benchmark say what they are named."""

import math

import numpy as np
import pytest

from tests.benchmarks.figures import covered, percentile, psnr_db, ratio, table


def test_a_ratio_is_taken_inside_each_round() -> None:
    # The second round ran on a machine that was ten times slower: of no consequence for the ratio.
    assert ratio([4, 0.4, 4], to=[2, 0.2, 2]) == pytest.approx(2)


def test_a_ratio_of_rounds_that_do_not_belong_together_is_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        ratio([1, 2], to=[1])


def test_the_95th_percentile_lies_between_the_two_values_around_it() -> None:
    assert percentile(list(range(101)), 95) == 95
    assert percentile([0, 10], 50) == 5


def test_nested_and_overlapping_intervals_count_once() -> None:
    assert covered([(0, 10), (2, 3), (8, 12), (20, 21)]) == 13


def test_no_interval_covers_nothing() -> None:
    assert covered([]) == 0


def test_equal_pictures_are_infinitely_alike() -> None:
    picture = np.zeros((2, 2, 3), np.uint8)
    assert psnr_db(picture, picture) == math.inf


def test_black_and_white_are_as_far_apart_as_pictures_can_be() -> None:
    assert psnr_db(np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 255, np.uint8)) == 0


def test_a_table_aligns_its_columns_and_leaves_the_rounds_out() -> None:
    rows = [{"who": "a", "per_s": 1.5, "rounds": [1.0]}, {"who": "engine", "per_s": 12.34, "rounds": [2.0]}]
    assert table(rows) == "who     per s\na       1.500\nengine   12.3"
