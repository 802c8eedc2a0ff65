"""Writes the small model to disk, once, in the layout that every diffusers checkpoint has.

Sizes are chosen for bf16 on a CPU that has no bf16 instructions, where torch reaches 2 to 7 GFLOP/s in a linear layer
and 1 in a convolution (measured on AVX2; float32 is some twenty times faster there). So the blocks are narrow, and
the VAE narrower still: a 728×90 banner at 8 guided steps takes 0.7 s of one such core, 0.2 s of them for decoding.

Invariants: the weights depend on ``SEED`` and the code of this file alone; a folder with the final name is complete,
for it is written under another name and renamed.
"""

import shutil
import tempfile
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    OvisImagePipeline,
    OvisImageTransformer2DModel,
)
from diffusers.models.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle
from torch import nn
from transformers import Qwen3Config, Qwen3Model

from pipeline.quiet import quiet
from pipeline.tiny.tokenizer import build_tokenizer

RECIPE = 1
"""Raise it whenever this file or the tokenizer changes what is written: old folders are then left aside."""
SEED = 20_251_122
CONTEXT_WIDTH = 64
HEAD_WIDTH = 8

CONTEXT_GAIN, MODULATION_GAIN, SHARPNESS, VELOCITY_GAIN = 4.0, 5.0, 2.0, 1.5
"""Freshly made weights hardly listen: another prompt moves a pixel by 0.5 of 255. With the text louder, the blocks'
gates open, attention less even and the answer larger it is 16, while weights that are 0.2 % off still draw the same
picture (52 dB). Larger ones make it chaotic (25 dB with the second at 10 and the fourth at 3): then no two kernels
would agree."""


def ensure_tiny(models_dir: Path) -> Path:
    """The small model's folder under ``models_dir``, written now if it is not there. Processes may race."""
    folder = models_dir / f"tiny-{RECIPE}"
    if not folder.is_dir():
        models_dir.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=".tiny-", dir=models_dir))
        try:
            write_tiny(unfinished)
            _settle(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def write_tiny(folder: Path) -> None:
    """Write the checkpoint into ``folder``: safetensors in bf16, as ``save_pretrained`` lays it out."""
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(SEED)
        pipeline = OvisImagePipeline(
            scheduler=scheduler(),
            vae=_vae(),
            text_encoder=_text_encoder(),
            tokenizer=build_tokenizer(),
            transformer=_transformer(),
        )
        pipeline.to(torch.bfloat16)
        pipeline.save_pretrained(folder, safe_serialization=True)


def _settle(unfinished: Path, folder: Path) -> None:
    try:
        _open_to_readers(unfinished)
        unfinished.rename(folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process was first, and wrote the same
            raise


def _open_to_readers(folder: Path) -> None:
    """mkdtemp and safetensors make what only its owner may read; a models folder is often shared."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def _transformer() -> OvisImageTransformer2DModel:
    transformer = OvisImageTransformer2DModel(
        in_channels=64,
        out_channels=64,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=2,
        joint_attention_dim=CONTEXT_WIDTH,
        axes_dims_rope=(4, 2, 2),
    )
    _amplify(transformer)
    return transformer


@torch.no_grad()
def _amplify(transformer: OvisImageTransformer2DModel) -> None:
    transformer.context_embedder.weight.mul_(CONTEXT_GAIN)
    transformer.proj_out.weight.mul_(VELOCITY_GAIN)
    for module in transformer.modules():
        if isinstance(module, AdaLayerNormZero | AdaLayerNormZeroSingle):
            module.linear.weight.mul_(MODULATION_GAIN)
            module.linear.bias.mul_(MODULATION_GAIN)
        if isinstance(module, nn.RMSNorm) and module.weight.numel() == HEAD_WIDTH:
            module.weight.mul_(SHARPNESS)


def _text_encoder() -> Qwen3Model:
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=CONTEXT_WIDTH,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        initializer_range=0.2,  # 0.02 is made for width 2048: here attention would mix next to nothing
    )
    return Qwen3Model(config)


def _vae() -> AutoencoderKL:
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=16,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=1024,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
    )
    for module in vae.decoder.modules():
        if isinstance(module, nn.Conv2d):  # torch's default shrinks the signal at every layer: a grey picture
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
    return vae


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """With the settings of Ovis-Image-7B."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
        time_shift_type="exponential",
    )
