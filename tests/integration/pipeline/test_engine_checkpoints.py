"""An image is left at one engine and taken up by another, and what is refused there."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import latents_file
from pipeline.engine import Engine, Finished, Progress
from pipeline.errors import UnusableLatents
from pipeline.model import Model
from tests.drawing import draw, final_latents, finish, pixels_of, request_for, wait_for_pixels

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


def test_final_latents_are_those_of_the_last_checkpoint(tiny: Model) -> None:
    """What the parity tests rest on."""
    engine = Engine(tiny)
    seen = final_latents(engine)
    ticket = engine.submit(INTERRUPTED)
    finish(engine)
    last = latents_file.read(checkpoint_after(4, tiny), tiny.name, tiny.revision)
    assert torch.equal(seen[ticket], last.latents[0])
