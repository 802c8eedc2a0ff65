"""What can be seen of an image on the way."""

import numpy as np
import pytest

from pipeline.engine import Engine
from pipeline.model import Model
from tests.drawing import draw, finish, mean_difference, pixels_of, request_for


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
