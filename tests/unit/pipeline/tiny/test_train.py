"""Training in short form: what it is taught is what will be asked, and nothing is lost by a stop."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.engine import Engine
from pipeline.model import load_model
from pipeline.noise import pack
from pipeline.prompt import PromptEncoder
from pipeline.request import ImageRequest
from pipeline.tiny.architecture import new_parts
from pipeline.tiny.batches import Batch, Batches, tokenised
from pipeline.tiny.learning import Stage
from pipeline.tiny.losses import _packed, _read, encode
from pipeline.tiny.tokenizer import build_tokenizer
from pipeline.tiny.train import main

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder after two steps of each stage: far from writing, and whole."""
    folder = tmp_path_factory.mktemp("trained")
    assert train(folder) == 0
    return folder


def train(folder: Path, *more: str) -> int:
    """Two steps of one picture in each stage, without a sheet."""
    short = [
        "--vae-steps",
        "2",
        "--flow-steps",
        "2",
        "--size",
        "0.001",
        "--processes",
        "0",
        "--sheet",
        "0",
        "--device",
        "cpu",
    ]
    return main([*short, "--state", str(folder / "state"), "--out", str(folder / "out"), *more])


def weights(folder: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in (folder / "out").glob("*/*.safetensors")}


def test_a_run_that_is_stopped_after_every_step_ends_with_the_weights_of_one_that_is_not(
    trained: Path, tmp_path: Path
) -> None:
    codes = [train(tmp_path, "--minutes", "0") for _ in range(4)]
    assert codes[0] == codes[1] == 3
    assert codes[-1] == 0
    assert weights(tmp_path) == weights(trained)


def test_what_is_written_loads_as_any_checkpoint_and_draws(trained: Path, tmp_path: Path) -> None:
    model = load_model(str(trained / "out"), device="cpu", models_dir=tmp_path, dtype=torch.float32)
    engine = Engine(model)
    engine.submit(ImageRequest(prompt='A red banner with the text "X"', width=64, height=64, steps=1, seed=1))
    finished = [end for _ in range(20) if not engine.idle for end in engine.step()]
    assert finished[0].image is not None
    assert finished[0].image.pixels.shape == (64, 64, 3)


def test_its_latents_have_a_mean_of_0_and_a_spread_of_1(trained: Path, tmp_path: Path) -> None:
    model = load_model(str(trained / "out"), device="cpu", models_dir=tmp_path, dtype=torch.float32)
    latents = torch.cat([encode(model.vae, Batches("other", 4)[number].pixels).flatten() for number in range(4)])
    assert latents.mean().abs() < 0.2
    assert 0.8 < latents.std() < 1.25


def test_it_fits_into_24_megabytes(trained: Path) -> None:
    sizes = [path.stat().st_size for path in (trained / "out").rglob("*") if path.is_file()]
    assert sum(sizes) < 24e6
    assert max(sizes) < 16e6


def test_prompts_are_read_in_training_as_they_are_when_drawn(trained: Path, tmp_path: Path) -> None:
    prompts = ['A red banner with the text "SALE 50%" in white', ""]
    model = load_model(str(trained / "out"), device="cpu", models_dir=tmp_path, dtype=torch.float32)
    batch = Batch(torch.empty(0), *tokenised(build_tokenizer(), prompts))
    with torch.inference_mode():
        taught = _read(model.text_encoder, batch)
    assert torch.allclose(taught, torch.stack(PromptEncoder(model).encode(prompts)), atol=1e-5)
    assert not torch.allclose(taught[0], taught[1], atol=1e-2)


def test_latents_are_packed_in_training_as_they_are_when_drawn() -> None:
    latents = torch.randn(2, 16, 8, 12)
    assert torch.equal(_packed(latents), torch.cat([pack(one[None]) for one in latents]))


def test_a_batch_is_the_same_whoever_makes_it_and_another_number_is_another_batch() -> None:
    first, again, other = Batches("seed", 2)[5], Batches("seed", 2)[5], Batches("seed", 2)[6]
    assert np.array_equal(first.pixels, again.pixels)
    assert torch.equal(first.tokens, again.tokens)
    assert first.tokens.shape != other.tokens.shape or not torch.equal(first.tokens, other.tokens)


def test_some_prompts_are_dropped_so_that_guidance_has_something_to_be_guided_away_from() -> None:
    batch = Batches("seed", 200)[0]
    _, empty = tokenised(build_tokenizer(), [""])
    dropped = (batch.mask.sum(1) == empty.sum()).float().mean()
    assert 0.03 < dropped < 0.2


def test_steps_that_a_kill_took_are_done_again_alike(tmp_path: Path) -> None:
    first = stage()
    run(first, 3)
    first.save(tmp_path / "state.pt")
    run(first, 4)  # lost: the state on disk is of step 3
    second = stage()
    second.resume(tmp_path / "state.pt")
    assert second.step == 3
    run(second, 4)
    assert second.step == first.step
    assert all(torch.equal(a, b) for a, b in zip(second._weights, first._weights, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(second._average, first._average, strict=True))


def test_learning_lessens_the_loss_and_the_average_is_put_in_and_taken_out_again() -> None:
    learning = stage(steps=200)
    before = run(learning, 1)
    after = run(learning, 199)
    assert after < before / 4
    assert learning.done
    own = [weight.detach().clone() for weight in learning._weights]
    with learning.averaged():
        assert not torch.equal(learning._weights[0], own[0])
    assert torch.equal(learning._weights[0], own[0])


def test_the_parts_share_out_what_there_is() -> None:
    assert sum(weight.numel() for weight in new_parts().transformer.parameters()) < 7e6


def stage(steps: int = 10) -> Stage:
    torch.manual_seed(0)
    return Stage(nn.ModuleDict({"line": nn.Linear(3, 1)}), steps=steps, rate=0.05, seed=7, device=CPU)


def run(learning: Stage, steps: int) -> float:
    """Learn y = sum(x) from noise for so many steps; the last loss."""

    def loss(generator: torch.Generator) -> torch.Tensor:
        x = torch.randn(64, 3, generator=generator)
        return nn.functional.mse_loss(learning._modules["line"](x), x.sum(1, keepdim=True))

    return [learning.learn(loss).item() for _ in range(steps)][-1]
