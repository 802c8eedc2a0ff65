"""The committed trace is what its script makes, and what the engine's benchmark says of it."""

from statistics import fmean

import pytest

from pipeline.request import ImageRequest
from tests.benchmarks.banner_trace import (
    LENGTH,
    PATH,
    SIZES_PX,
    Banner,
    at_once,
    make_trace,
    read_trace,
    reworded,
    spread,
)


def test_the_committed_file_is_what_the_script_makes() -> None:
    assert PATH.read_text(encoding="utf-8") == make_trace()


def test_the_trace_mixes_sizes_steps_and_guidance_and_repeats_no_prompt() -> None:
    requests = [banner.request for banner in read_trace()]
    assert len(requests) == LENGTH
    assert {(request.width, request.height) for request in requests} == set(SIZES_PX)
    assert {request.steps for request in requests} == {6, 8, 10, 12}
    assert {request.guidance for request in requests} == {1.0, 3.5, 5.0, 7.0}
    assert len({request.prompt for request in requests}) == LENGTH


def test_the_gaps_are_those_of_random_arrivals() -> None:
    gaps = [banner.gap for banner in read_trace()]
    assert fmean(gaps) == pytest.approx(1, abs=0.25)
    # An exponential distribution has 1/e of its values above its mean; evenly spaced arrivals would have half.
    assert sum(gap > fmean(gaps) for gap in gaps) / LENGTH == pytest.approx(0.37, abs=0.1)


def test_arrivals_have_exactly_the_mean_gap_that_is_asked_for() -> None:
    arrivals = spread(read_trace()[40:], mean_gap_s=0.5)
    assert arrivals[0].at_s == 0
    assert arrivals[-1].at_s == pytest.approx(39 * 0.5)
    assert [arrival.number for arrival in arrivals] == list(range(40))


def test_gaps_keep_their_proportions_when_they_are_scaled() -> None:
    request = ImageRequest(prompt="A fox")
    arrivals = spread([Banner(9.0, request), Banner(1.0, request), Banner(3.0, request)], mean_gap_s=10)
    assert [arrival.at_s for arrival in arrivals] == [0, 5, 20]


def test_a_single_banner_arrives_at_once() -> None:
    assert [arrival.at_s for arrival in spread(read_trace()[:1], mean_gap_s=3)] == [0]


def test_a_full_queue_is_there_at_once() -> None:
    assert {arrival.at_s for arrival in at_once([banner.request for banner in read_trace()])} == {0}


def test_a_reworded_request_differs_in_its_words_alone() -> None:
    request = read_trace()[0].request
    other = reworded(request, 7)
    assert other.prompt != request.prompt
    assert other.model_copy(update={"prompt": request.prompt}) == request
