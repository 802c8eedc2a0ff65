"""The weights of one Ovis-Image model on one device.

Whatever checkpoint it is, 7B or tiny, it is loaded here and by these lines. The parts are diffusers' and
transformers' own objects; who draws with them is the engine's business.

Invariants: a Model is complete (no weight was left at its random start) and in evaluation mode, all its parts are on
``device``, the text encoder, the transformer and the VAE in ``dtype``.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, OvisImageTransformer2DModel
from safetensors import SafetensorError
from transformers import Qwen2Tokenizer, Qwen3Model

from pipeline.checkpoint import Checkpoint, locate
from pipeline.errors import CheckpointError, DeviceError
from pipeline.quiet import quiet


@dataclass(frozen=True)
class Model:
    """A loaded model. ``name`` and ``revision`` go into every image that it draws."""

    transformer: OvisImageTransformer2DModel
    text_encoder: Qwen3Model
    tokenizer: Qwen2Tokenizer
    vae: AutoencoderKL
    scheduler: FlowMatchEulerDiscreteScheduler  # its settings alone are used: every schedule is a copy's
    device: torch.device
    dtype: torch.dtype
    name: str
    revision: str

    @property
    def latent_channels(self) -> int:
        """Channels of a latent before 2×2 of them are packed into one token."""
        return int(self.transformer.config.in_channels) // 4

    @property
    def latent_px(self) -> int:
        """Pixels along one side of a latent."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))


def load_model(
    name: str,
    *,
    device: str,
    revision: str | None = None,
    offline: bool = False,
    models_dir: Path,
    dtype: torch.dtype = torch.bfloat16,
) -> Model:
    """Load ``name`` (``tiny``, a checkpoint folder, or a hub name) onto ``device``.

    ``revision`` pins a hub name; for a folder it must be the folder's fingerprint (``pipeline.checkpoint``).
    ``models_dir`` is where ``tiny`` is kept. Raises DeviceError and CheckpointError, before any weight is read
    where that is possible.
    """
    place = find_device(device)
    checkpoint = locate(name, revision=revision, offline=offline, models_dir=models_dir)
    try:
        with quiet():
            return _load(checkpoint, place, dtype)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            f"{checkpoint.folder} looks like an Ovis-Image checkpoint and cannot be loaded: {error}"
        ) from error


def find_device(name: str) -> torch.device:
    """The device ``name``, such as ``cpu``, ``cuda`` or ``cuda:1``; raises DeviceError if there is none."""
    present = devices()
    if name == "cuda" and "cuda:0" in present:
        name = "cuda:0"
    if name not in present:
        raise DeviceError(f"there is no device {name!r} here; there is {', '.join(present)}")
    return torch.device(name)


def devices() -> list[str]:
    """The names of all devices of this machine that can draw."""
    found = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    return [*found, "mps"] if torch.backends.mps.is_available() else found


def _load(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Model:
    folder = checkpoint.folder
    return Model(
        transformer=_load_part(OvisImageTransformer2DModel, folder / "transformer", device, dtype),
        text_encoder=_load_part(Qwen3Model, folder / "text_encoder", device, dtype),
        vae=_load_part(AutoencoderKL, folder / "vae", device, dtype),
        tokenizer=_load_tokenizer(folder / "tokenizer"),
        scheduler=_load_scheduler(folder / "scheduler"),
        device=device,
        dtype=dtype,
        name=checkpoint.name,
        revision=checkpoint.revision,
    )


def _load_part(kind: Any, folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    part, loading = kind.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
    )
    wrong = [key for key in ("missing_keys", "mismatched_keys", "error_msgs") if loading.get(key)]
    if wrong:
        example = sorted(str(entry) for entry in loading[wrong[0]])[0]
        raise CheckpointError(
            f"{folder} does not hold all weights of {kind.__name__} ({wrong[0].replace('_', ' ')}: {example}): "
            "download or save it again"
        )
    return part.to(device).eval()


def _load_tokenizer(folder: Path) -> Qwen2Tokenizer:
    tokenizer: Qwen2Tokenizer = Qwen2Tokenizer.from_pretrained(folder, local_files_only=True)
    # Transformers 5 makes a vocabulary of one out of files that it does not know, and says nothing.
    if len(tokenizer) < 256 or not tokenizer.chat_template:
        raise CheckpointError(
            f"{folder} gives a tokenizer of {len(tokenizer)} tokens"
            f"{'' if tokenizer.chat_template else ' without a chat template'}: it must hold a tokenizer.json"
        )
    return tokenizer


def _load_scheduler(folder: Path) -> FlowMatchEulerDiscreteScheduler:
    found = json.loads((folder / "scheduler_config.json").read_text(encoding="utf-8")).get("_class_name")
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, local_files_only=True)
    if found != FlowMatchEulerDiscreteScheduler.__name__ or scheduler.config.stochastic_sampling:
        raise CheckpointError(
            f"{folder} asks for {found}{' with stochastic sampling' if scheduler.config.stochastic_sampling else ''}; "
            "the engine draws with FlowMatchEulerDiscreteScheduler, without stochastic sampling"
        )
    return scheduler
