"""What the VAE and the transformer are trained to lessen.

The transformer's is flow matching as the pipeline samples it: the noise levels that a picture of its size is drawn
at, the prompt read as ``pipeline.prompt`` reads it, padding and all.

Invariant: a loss draws from ``generator`` alone.
"""

import math

import torch
from diffusers import AutoencoderKL, OvisImageTransformer2DModel
from torch.nn import functional
from transformers import Qwen3Model

from pipeline.noise import positions
from pipeline.prompt import HEAD_TOKENS, TEXT_TOKENS
from pipeline.schedule import Schedules
from pipeline.tiny.batches import Batch

EDGES = 0.5  # beside plain differences: letters are edges, and a blurred one costs little elsewhere
DIVERGENCE = 1e-6  # keeps latents within bounds, no more


def as_input(pixels: torch.Tensor) -> torch.Tensor:
    """[B, H, W, 3] bytes to [B, 3, H, W] from -1 to 1, as the VAE takes them."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def vae_loss(vae: AutoencoderKL, batch: Batch, generator: torch.Generator) -> torch.Tensor:
    """How far decode(encode(pixels)) is off, in values and in edges, and a trace of divergence from a normal."""
    wanted = as_input(batch.pixels)
    posterior = vae.encode(wanted).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator, device=wanted.device)
    got = vae.decode(posterior.mean + posterior.std * noise).sample.float()
    across, down = (got - wanted).diff(dim=-1).abs().mean(), (got - wanted).diff(dim=-2).abs().mean()
    divergence = posterior.kl().mean() / noise[0].numel()
    off: torch.Tensor = functional.l1_loss(got, wanted) + EDGES * (across + down)
    off += DIVERGENCE * divergence
    return off


def flow_loss(
    transformer: OvisImageTransformer2DModel,
    text_encoder: Qwen3Model,
    schedules: Schedules,
    latents: torch.Tensor,
    batch: Batch,
    generator: torch.Generator,
) -> torch.Tensor:
    """How far the velocity is off, for ``latents`` [B, 16, H, W] as the transformer knows them: scaled, shifted."""
    height, width = latents.shape[-2:]
    clean = _packed(latents)
    noise = torch.randn(clean.shape, generator=generator, device=clean.device)
    sigmas = _sigmas(clean, schedules.shift(clean.shape[1]), generator)
    noisy = torch.lerp(clean, noise, sigmas[:, None, None])
    places = torch.arange(TEXT_TOKENS, device=clean.device, dtype=torch.float32)
    velocity = transformer(
        hidden_states=noisy,
        encoder_hidden_states=_read(text_encoder, batch),
        timestep=sigmas,
        img_ids=positions(height=height, width=width, device=clean.device, dtype=torch.float32),
        txt_ids=torch.stack((torch.zeros_like(places), places, places), dim=-1),
        return_dict=False,
    )[0]
    return functional.mse_loss(velocity.float(), noise - clean)


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Latents [B, 16, H/8, W/8] of ``pixels`` [B, H, W, 3], as the transformer knows them."""
    means: torch.Tensor = vae.encode(as_input(pixels)).latent_dist.mode().float()
    latents: torch.Tensor = (means - vae.config.shift_factor) * vae.config.scaling_factor
    return latents


def _packed(latents: torch.Tensor) -> torch.Tensor:
    """``pipeline.noise.pack`` for many: [B, C, H, W] to [B, H/2 · W/2, 4C]."""
    count, channels, height, width = latents.shape
    patches = latents.view(count, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(count, (height // 2) * (width // 2), 4 * channels)


def _sigmas(clean: torch.Tensor, shift: float, generator: torch.Generator) -> torch.Tensor:
    """[B] noise levels, most of them where sampling steps are, none at an end: FlowMatchEuler's exponential shift."""
    middling = torch.randn(clean.shape[0], generator=generator, device=clean.device)
    even = torch.rand(clean.shape[0], generator=generator, device=clean.device).clamp(1e-4, 1 - 1e-4)
    half = torch.arange(clean.shape[0], device=clean.device) % 2 == 0
    level = torch.where(half, even, torch.sigmoid(middling))
    return math.exp(shift) / (math.exp(shift) + (1 / level - 1))


def _read(text_encoder: Qwen3Model, batch: Batch) -> torch.Tensor:
    """[B, 256, D] embeddings of the prompts: ``pipeline.prompt.PromptEncoder`` for many, with gradients."""
    hidden = text_encoder(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False).last_hidden_state
    meant = (hidden * batch.mask[..., None])[:, HEAD_TOKENS : HEAD_TOKENS + TEXT_TOKENS]
    return functional.pad(meant, (0, 0, 0, TEXT_TOKENS - meant.shape[1]))
