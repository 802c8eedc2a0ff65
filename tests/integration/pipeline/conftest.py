"""The small model, written once a session and loaded by the path that loads every model."""

from pathlib import Path

import pytest
import torch

from pipeline.model import Model, load_model


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """On a busy machine torch's threads wait for each other, spinning: 157 s instead of 39 s for one file."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def tiny(models_dir: Path) -> Model:
    """In bf16, as it is drawn with."""
    return load_model("tiny", device="cpu", models_dir=models_dir)


@pytest.fixture(scope="session")
def tiny_float32(models_dir: Path) -> Model:
    return load_model("tiny", device="cpu", models_dir=models_dir, dtype=torch.float32)


@pytest.fixture
def tiny_folder(models_dir: Path, tiny: Model) -> Path:
    """The checkpoint's folder. Copy it before changing anything."""
    (folder,) = models_dir.glob("tiny-*")
    return folder
