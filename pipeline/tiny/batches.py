"""Training batches, each made from its number alone: so a run that was killed goes on as if it had not been.

Drawing is done by the loader's processes, 500 to 900 examples a second each (measured on one slow CPU core), so that
16 cores keep up with the device.

Invariants: batch n of a seed is the same whoever makes it; all pictures of a batch have one size; no line in it is
held out.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import Qwen2Tokenizer

from pipeline.prompt import SYSTEM_PROMPT
from pipeline.tiny.banner import SIDE_MAX_PX, SIDE_MIN_PX
from pipeline.tiny.data import draw_example
from pipeline.tiny.drawing import render
from pipeline.tiny.tokenizer import build_tokenizer

SIDE_STEP_PX = 16
FAVOURED_PX = ((256, 64), (256, 64), (256, 256))
FAVOURED_SHARE = 0.6
TEXT_TOKENS = 256
UNPROMPTED_SHARE = 0.1
"""Of pictures whose prompt is dropped, so that guidance knows what a banner is when nothing is asked."""
PREFETCHED = 4


@dataclass(frozen=True)
class Batch:
    """``pixels`` [B, H, W, 3] as bytes; ``tokens`` and ``mask`` [B, L] of the templated prompts."""

    pixels: torch.Tensor
    tokens: torch.Tensor
    mask: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(part.to(device, non_blocking=True) for part in (self.pixels, self.tokens, self.mask)))

    def pin_memory(self) -> "Batch":
        """Called by torch's loader."""
        return Batch(self.pixels.pin_memory(), self.tokens.pin_memory(), self.mask.pin_memory())


class Batches(Dataset[Batch]):
    """All batches of a seed, by number. ``size`` is the pictures of 256×64 in one; larger ones are fewer."""

    def __init__(self, seed: str, size: int) -> None:
        self._seed = seed
        self._size = size
        self._tokenizer = build_tokenizer()

    def __getitem__(self, number: int) -> Batch:
        random = Random(f"{self._seed} {number}")
        width_px, height_px = _draw_size(random)
        count = max(1, self._size * _sequence(256, 64) // _sequence(width_px, height_px))
        examples = [draw_example(random, width_px, height_px) for _ in range(count)]
        prompts = ["" if random.random() < UNPROMPTED_SHARE else example.prompt for example in examples]
        pixels = np.stack([render(example.banner, width_px, height_px) for example in examples])
        return Batch(torch.from_numpy(pixels), *tokenised(self._tokenizer, prompts))


def load(seed: str, size: int, first: int, last: int, processes: int) -> Iterator[Batch]:
    """Batches ``first`` to ``last`` - 1, made ahead by ``processes`` (0: by this one, when asked)."""
    return iter(
        DataLoader(
            Batches(seed, size),
            batch_size=None,
            sampler=range(first, last),
            num_workers=processes,
            prefetch_factor=PREFETCHED if processes else None,
            pin_memory=torch.cuda.is_available(),
        )
    )


def tokenised(tokenizer: Qwen2Tokenizer, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and mask [B, L] of the prompts in their template, as ``pipeline.prompt`` makes them."""
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": SYSTEM_PROMPT + prompt}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
        for prompt in prompts
    ]
    padded = tokenizer(texts, add_special_tokens=False, padding=True, pad_to_multiple_of=32, return_tensors="pt")
    return padded["input_ids"], padded["attention_mask"]


def _draw_size(random: Random) -> tuple[int, int]:
    if random.random() < FAVOURED_SHARE:
        return random.choice(FAVOURED_PX)
    sides = range(SIDE_MIN_PX, SIDE_MAX_PX + 1, SIDE_STEP_PX)
    return random.choice(sides), random.choice(sides)


def _sequence(width_px: int, height_px: int) -> int:
    """Tokens of one picture in the transformer."""
    return TEXT_TOKENS + (width_px // 16) * (height_px // 16)
