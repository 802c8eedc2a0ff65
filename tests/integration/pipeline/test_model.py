"""Loading: the same path for every checkpoint, and clear words for what is none."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.checkpoint import fingerprint
from pipeline.errors import CheckpointError, DeviceError
from pipeline.model import Model, load_model
from pipeline.tiny import checkpoint
from pipeline.tiny.checkpoint import ensure_tiny


@pytest.fixture
def copy(tiny_folder: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may spoil."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


def refusal(folder: Path | str, **options: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model(str(folder), device="cpu", models_dir=Path("not-used"), **options)  # type: ignore[arg-type]
    return str(caught.value)


def test_a_folder_is_loaded_as_tiny_is_and_holds_the_same_weights(tiny: Model, copy: Path) -> None:
    loaded = load_model(str(copy), device="cpu", models_dir=Path("not-used"))
    assert loaded.revision == tiny.revision
    assert loaded.name == str(copy)
    for one, other in zip(loaded.transformer.parameters(), tiny.transformer.parameters(), strict=True):
        assert torch.equal(one, other)


def test_all_parts_are_in_bf16_and_ready_to_draw(tiny: Model) -> None:
    for part in (tiny.transformer, tiny.text_encoder, tiny.vae):
        assert not part.training
        assert {parameter.dtype for parameter in part.parameters()} == {torch.bfloat16}


def test_tiny_is_the_real_ones_architecture(tiny: Model) -> None:
    assert tiny.latent_channels == 16
    assert tiny.latent_px == 8
    assert (tiny.vae.config.scaling_factor, tiny.vae.config.shift_factor) == (0.3611, 0.1159)
    assert (tiny.scheduler.config.base_shift, tiny.scheduler.config.max_shift) == (0.5, 1.15)
    assert tiny.transformer.config.num_layers >= 1
    assert tiny.transformer.config.num_single_layers >= 2


def test_tiny_is_the_same_wherever_it_is_written(tiny: Model, tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert fingerprint(ensure_tiny(tmp_path)) == tiny.revision
    assert torch.equal(torch.get_rng_state(), before)


def test_of_two_that_race_for_tiny_the_second_takes_the_firsts(
    tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoint.write_tiny

    def write_and_be_overtaken(folder: Path) -> None:
        monkeypatch.setattr(checkpoint, "write_tiny", write)
        ensure_tiny(tmp_path)
        write(folder)

    monkeypatch.setattr(checkpoint, "write_tiny", write_and_be_overtaken)
    folder = ensure_tiny(tmp_path)
    assert list(tmp_path.iterdir()) == [folder]
    assert fingerprint(folder) == tiny.revision


def test_a_writer_that_died_leaves_nothing_that_is_taken_for_the_model(tiny: Model, tmp_path: Path) -> None:
    (tmp_path / ".tiny-dead").mkdir()
    assert fingerprint(ensure_tiny(tmp_path)) == tiny.revision


def test_a_folders_revision_can_be_pinned(copy: Path, tiny: Model) -> None:
    assert load_model(str(copy), device="cpu", models_dir=Path("x"), revision=tiny.revision).revision == tiny.revision
    assert tiny.revision in refusal(copy, revision="sha256-0000000000000000")


def test_other_weights_of_the_same_shapes_are_another_revision(copy: Path, tiny: Model) -> None:
    weights = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights)
    assert fingerprint(copy) != tiny.revision


def test_a_folder_that_is_not_there_is_named_with_what_to_give_instead(tmp_path: Path) -> None:
    assert "there is no folder" in refusal(tmp_path / "missing")
    assert "'tiny'" in refusal("no-such-name")


def test_a_folder_without_an_index_is_no_checkpoint(tmp_path: Path, copy: Path) -> None:
    assert "no model_index.json" in refusal(tmp_path)
    assert "not one of its parts" in refusal(copy / "transformer")
    assert "no model_index.json" in refusal(copy / "model_index.json")


def test_a_checkpoint_of_another_pipeline_is_named(copy: Path) -> None:
    (copy / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    assert "a checkpoint of FluxPipeline" in refusal(copy)


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_an_index_that_is_no_json_object_is_named(content: str, copy: Path) -> None:
    (copy / "model_index.json").write_text(content)
    assert "model_index.json" in refusal(copy)


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae", "tokenizer", "scheduler"])
def test_a_missing_part_is_named(part: str, copy: Path) -> None:
    shutil.rmtree(copy / part)
    assert f"no folder {part}" in refusal(copy)


def test_missing_weights_are_named(copy: Path) -> None:
    (copy / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert "no weights" in refusal(copy)


def test_pickled_weights_are_never_opened(copy: Path) -> None:
    (copy / "text_encoder" / "model.safetensors").rename(copy / "text_encoder" / "pytorch_model.bin")
    assert "only pytorch_model.bin" in refusal(copy)
    assert "safe_serialization=True" in refusal(copy)


def test_a_missing_shard_is_named(copy: Path) -> None:
    index = copy / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}))
    assert "lacks part-1.safetensors, part-2.safetensors" in refusal(copy)


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
def test_weights_with_a_hole_are_refused_and_not_filled_at_random(part: str, copy: Path) -> None:
    (weights,) = (copy / part).glob("*.safetensors")
    tensors = load_file(weights)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, weights, metadata={"format": "pt"})
    assert "does not hold all weights" in refusal(copy)


def test_weights_that_were_cut_off_are_refused(copy: Path) -> None:
    (weights,) = (copy / "vae").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot be loaded" in refusal(copy)


def test_a_tokenizer_that_would_read_nothing_is_refused(copy: Path) -> None:
    (copy / "tokenizer" / "tokenizer.json").unlink()
    assert "tokenizer" in refusal(copy)


def test_another_sampler_is_refused(copy: Path) -> None:
    config = copy / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "stochastic_sampling": True}))
    assert "stochastic sampling" in refusal(copy)


def test_a_hub_that_cannot_be_reached_is_said_to_be_with_what_to_do(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from pipeline.model import load_model\n"
        "try: load_model('AIDC-AI/Ovis-Image-7B', device='cpu', models_dir=Path('x'))\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "PATH": ""}
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment, check=True
    )
    assert found.stdout.startswith("CheckpointError AIDC-AI/Ovis-Image-7B could not be fetched")
    assert "be online" in found.stdout
    assert found.stderr == ""


def test_offline_says_that_the_name_is_not_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert "not in this machine's cache" in refusal("ovis-batch-tests/not-cached", offline=True)


@pytest.mark.parametrize("device", ["cuda:7", "foo", "", "CPU", "meta"])
def test_a_device_that_is_not_there_is_refused_with_those_that_are(device: str, models_dir: Path) -> None:
    with pytest.raises(DeviceError, match=f"no device '{device}' here; there is cpu"):
        load_model("tiny", device=device, models_dir=models_dir)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_cuda_without_cuda_is_refused(models_dir: Path) -> None:
    with pytest.raises(DeviceError, match="there is cpu"):
        load_model("tiny", device="cuda", models_dir=models_dir)


def test_loading_prints_nothing(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    load_model("tiny", device="cpu", models_dir=tmp_path)
    assert capfd.readouterr() == ("", "")
