"""A seed to the noise that an image starts from, and latents to tokens and back.

Noise is drawn on the CPU by a generator of the image's own, whatever the device: so a seed means one picture on every
machine, and a neighbour never changes it.
"""

import torch


def draw_noise(seed: int, *, channels: int, height: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Noise of ``height`` × ``width`` latents, packed: [1, height/2 · width/2, 4 · channels], on the CPU."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return pack(torch.randn((1, channels, height, width), generator=generator, dtype=dtype))


def pack(latents: torch.Tensor) -> torch.Tensor:
    """[1, C, H, W] to one token for every 2×2 patch: [1, H/2 · W/2, 4C]."""
    _, channels, height, width = latents.shape
    patches = latents.view(1, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(1, (height // 2) * (width // 2), 4 * channels)


def unpack(tokens: torch.Tensor, *, height: int, width: int) -> torch.Tensor:
    """The inverse of ``pack``; ``height`` and ``width`` in latents."""
    channels = tokens.shape[-1] // 4
    patches = tokens.view(1, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(1, channels, height, width)


def positions(*, height: int, width: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Where each image token stands, for RoPE: [height/2 · width/2, 3] of (0, row, column)."""
    rows, columns = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij")
    ids = torch.stack((torch.zeros_like(rows), rows, columns), dim=-1).reshape(-1, 3)
    return ids.to(device=device, dtype=dtype)
