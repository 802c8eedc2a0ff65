"""The parts of the small model that is trained, and how the 11 million parameters are shared out among them.

Every letter must be looked up in the prompt and put in its place, which takes depth more than width: the transformer
has eight blocks of 192 (6.8 M), most of them single-stream, for those cost less than half of the others. The text
encoder (1.8 M) reads bytes and has to tell each byte whether it stands in quotes, and where: four layers. Flat
colours and sharp edges are easy for a VAE (2.4 M), whose decoder gets most of it and keeps few channels at full
resolution, where a CPU spends its time.

Invariant: all parts together stay under 24 MB in bf16, the transformer under 7 M parameters.
"""

from dataclasses import dataclass

from diffusers import AutoencoderKL, OvisImageTransformer2DModel
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, AdaLayerNormZeroSingle
from torch import nn
from transformers import Qwen3Config, Qwen3Model

CONTEXT_WIDTH = 192
HEAD_WIDTH = 32


@dataclass(frozen=True)
class Parts:
    """Everything that learns."""

    vae: AutoencoderKL
    text_encoder: Qwen3Model
    transformer: OvisImageTransformer2DModel


def new_parts() -> Parts:
    """With fresh weights of torch's random state."""
    return Parts(vae=_vae(), text_encoder=_text_encoder(), transformer=_transformer())


def _transformer() -> OvisImageTransformer2DModel:
    transformer = OvisImageTransformer2DModel(
        in_channels=64,
        out_channels=64,
        num_layers=1,
        num_single_layers=7,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=6,
        joint_attention_dim=CONTEXT_WIDTH,
        axes_dims_rope=(4, 14, 14),
    )
    for module in transformer.modules():
        if isinstance(module, AdaLayerNormZero | AdaLayerNormZeroSingle | AdaLayerNormContinuous):
            nn.init.zeros_(module.linear.weight)  # each block begins as the identity (DiT, arXiv 2212.09748)
            nn.init.zeros_(module.linear.bias)
    nn.init.zeros_(transformer.proj_out.weight)
    return transformer


def _text_encoder() -> Qwen3Model:
    config = Qwen3Config(
        vocab_size=320,  # 256 bytes, and the tokens of the template
        hidden_size=CONTEXT_WIDTH,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        head_dim=32,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        initializer_range=0.05,  # 0.02 is made for width 2048
    )
    return Qwen3Model(config)


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=16,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 96, 96),
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=256,
        scaling_factor=1.0,  # both measured when it is trained
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
    )
