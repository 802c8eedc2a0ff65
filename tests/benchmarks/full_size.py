"""The 7B model's architecture with random weights, made on the device itself; and the arithmetic of its forward.

Random weights change no timing, need no download and are there within seconds. What is drawn with them means nothing.
`SMALL` is the same in everything but size, for a machine without a GPU.

Invariant: one seed, one device and one release of torch give one model, so that two of them can be compared.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import cpu_offload
from diffusers import AutoencoderKL, OvisImageTransformer2DModel
from transformers import Qwen3Config, Qwen3Model

from pipeline.fp8 import quantise
from pipeline.model import Model
from pipeline.modulation import Modulations
from pipeline.prompt import TEXT_TOKENS
from pipeline.quiet import quiet
from pipeline.schedule import Schedules
from pipeline.tiny.checkpoint import scheduler
from pipeline.tiny.tokenizer import build_tokenizer

SEED = 20_251_124
LINEAR_WEIGHTS = 16
"""Of a block, for each token and in units of D²: queries, keys and values 3, the MLP (SwiGLU, inner width 4D) 8 in and
4 out, the way out 1. In a single-stream block the last two are one layer."""


@dataclass(frozen=True)
class Architecture:
    """What the parts' constructors are given."""

    name: str
    transformer: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    vae: Mapping[str, Any]


_QWEN3 = {"max_position_embeddings": 40960, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
_FLUX_VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 16,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "force_upcast": True,
}

FULL = Architecture(
    "random-7B",
    transformer={},  # diffusers' defaults are Ovis-Image's own
    text_encoder={
        **_QWEN3,
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    vae={**_FLUX_VAE, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32},
)
SMALL = Architecture(
    "random-small",
    transformer={
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,  # float8 products want widths that are multiples of 16
        "joint_attention_dim": 64,
        "axes_dims_rope": (4, 2, 2),
    },
    text_encoder={
        **_QWEN3,
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
    vae={**_FLUX_VAE, "block_out_channels": (4, 4, 8, 8), "layers_per_block": 1, "norm_num_groups": 4},
)


def build_model(
    architecture: Architecture, device: torch.device, *, fp8: bool = False, low_memory: bool = False
) -> Model:
    """A model of ``architecture`` in bf16 on ``device``, as ``pipeline.model.load_model`` would have loaded it."""
    with quiet(), _made_in_bf16_on(device):
        torch.manual_seed(SEED)
        transformer = _at_rest(OvisImageTransformer2DModel(**architecture.transformer))
        text_encoder = _at_rest(Qwen3Model(Qwen3Config(**architecture.text_encoder)))
        vae = _at_rest(AutoencoderKL(**architecture.vae))
    modulations, ovis_scheduler = Modulations(transformer), scheduler()
    if fp8:
        quantise(transformer)
    if low_memory:
        modulations.replace_layers(device, lowest=Schedules(ovis_scheduler).lowest_timestep)
        cpu_offload(text_encoder.to("cpu"), execution_device=device)
    return Model(
        transformer=transformer,
        modulations=modulations,
        text_encoder=text_encoder,
        tokenizer=build_tokenizer(),
        vae=vae,
        scheduler=ovis_scheduler,
        device=device,
        dtype=torch.bfloat16,
        name=architecture.name,
        revision="random",
    )


def twin(transformer: OvisImageTransformer2DModel) -> OvisImageTransformer2DModel:
    """Another module on the same weights, not a copy of them: to be compiled while ``transformer`` stays as it is."""
    with torch.device("meta"):
        other: OvisImageTransformer2DModel = OvisImageTransformer2DModel.from_config(transformer.config)
    other.load_state_dict(transformer.state_dict(), assign=True)
    return _at_rest(other)


def forward_flop(transformer: OvisImageTransformer2DModel, image_tokens: int) -> int:
    """Floating point operations of one sequence's forward, 2 for each multiply-add.

    Of L tokens, 256 of them text, I of them image, in B blocks of width D:
    B · (2 · 16 D² · L + 4 · L² · D) + 2 D · (I · (in + out channels) + 256 · context width).
    Counted are linear layers and attention. AdaLN and element-wise work are not: they are overhead, whoever does them.
    """
    config = transformer.config
    width: int = config.num_attention_heads * config.attention_head_dim
    tokens = TEXT_TOKENS + image_tokens
    block = 2 * LINEAR_WEIGHTS * width**2 * tokens + 4 * tokens**2 * width
    channels: int = config.in_channels + (config.out_channels or config.in_channels)
    ends = 2 * width * (image_tokens * channels + TEXT_TOKENS * config.joint_attention_dim)
    blocks: int = config.num_layers + config.num_single_layers
    return blocks * block + ends


@contextmanager
def _made_in_bf16_on(device: torch.device) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def _at_rest(part: Any) -> Any:
    return part.eval().requires_grad_(False)
