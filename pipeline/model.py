"""The weights of one Ovis-Image model on one device.

Whatever checkpoint it is, 7B or tiny, it is loaded here and by these lines. The parts are diffusers' and
transformers' own objects; who draws with them is the engine's business.

Invariants: a Model is complete (no weight was left at its random start) and in evaluation mode, all its parts are on
``device``, the text encoder, the transformer and the VAE in ``dtype``. In low memory the text encoder's weights visit
the device layer by layer while it encodes, and the transformer's AdaLN layers are a table (``modulation.py``): its
own ``forward`` cannot be called then, the packed one can.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import cpu_offload
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, OvisImageTransformer2DModel
from safetensors import SafetensorError
from transformers import Qwen2Tokenizer, Qwen3Model

from pipeline.checkpoint import Checkpoint, locate
from pipeline.errors import CheckpointError, DeviceError
from pipeline.fp8 import check as check_fp8
from pipeline.fp8 import quantise
from pipeline.modulation import Modulations
from pipeline.quiet import quiet
from pipeline.schedule import Schedules
from pipeline.torch_errors import out_of_memory


@dataclass(frozen=True)
class Model:
    """A loaded model. ``name`` and ``revision`` go into every image that it draws; fp8 is another revision."""

    transformer: OvisImageTransformer2DModel
    modulations: Modulations  # of the transformer's AdaLN layers
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
    fp8: bool = False,
    low_memory: bool = False,
) -> Model:
    """Load ``name`` (``tiny``, a checkpoint folder, or a hub name) onto ``device``.

    ``revision`` pins a hub name; for a folder it must be the folder's fingerprint (``pipeline.checkpoint``).
    ``models_dir`` is where ``tiny`` is kept. ``fp8`` rounds the blocks' linear layers (``fp8.py``), ``low_memory`` is
    for cards of 24 GB and 16 GB; both need bf16. Raises DeviceError and CheckpointError, before any weight is read
    where that is possible, and ValueError for ``fp8`` or ``low_memory`` in another dtype.
    """
    if (fp8 or low_memory) and dtype != torch.bfloat16:
        raise ValueError(f"fp8 and low_memory are made for bfloat16, not for {dtype}")
    place = find_device(device)
    if fp8:
        check_fp8(place)
    checkpoint = locate(name, revision=revision, offline=offline, models_dir=models_dir)
    try:
        with quiet():
            return _load(checkpoint, place, dtype, fp8=fp8, low_memory=low_memory)
    except RuntimeError as error:
        if out_of_memory(error):
            less = "" if low_memory else ": OVIS_LOW_MEMORY=1 needs less of it"
            raise DeviceError(f"{place} has too little memory for {name}{less}") from error
        raise
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


def _load(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, *, fp8: bool, low_memory: bool) -> Model:
    folder = checkpoint.folder
    scheduler = _load_scheduler(folder / "scheduler")
    first_place = torch.device("cpu") if low_memory else device
    transformer = _load_part(OvisImageTransformer2DModel, folder / "transformer", first_place, dtype)
    text_encoder = _load_part(Qwen3Model, folder / "text_encoder", first_place, dtype)
    modulations = Modulations(transformer)
    if fp8:
        quantise(transformer)
    if low_memory:
        modulations.replace_layers(device, lowest=Schedules(scheduler).lowest_timestep)
        transformer.to(device)
        cpu_offload(text_encoder, execution_device=device)
    return Model(
        transformer=transformer,
        modulations=modulations,
        text_encoder=text_encoder,
        vae=_load_part(AutoencoderKL, folder / "vae", device, dtype),
        tokenizer=_load_tokenizer(folder / "tokenizer"),
        scheduler=scheduler,
        device=device,
        dtype=dtype,
        name=checkpoint.name,
        revision=f"{checkpoint.revision}+fp8" if fp8 else checkpoint.revision,
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
    return part.to(device).eval().requires_grad_(False)


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
