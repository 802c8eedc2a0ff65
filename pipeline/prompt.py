"""Prompts to embeddings, as OvisImagePipeline makes them, and a small memory of the last ones.

The model reads a prompt inside a chat template, behind a system prompt. The first 28 tokens are the template's and
the system prompt's; upstream drops them after encoding, and pads or cuts what follows to 256. Cutting would lose the
end of a long prompt without a word, so here it is refused.

Upstream runs the encoder over the padding too, and then zeroes what comes of it. Here prompts that wait are encoded
together, only as far as the longest of them goes, and the zeros are filled in: 6 ms instead of 18 for a short prompt
on the tiny model, with upstream's bits (bf16, two CPU cores).

Invariants: an embedding is [256, C] in the text encoder's dtype, with zeros where upstream pads; at most
``remembered`` of them are kept.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import cached_property

import torch

from pipeline.errors import PromptTooLong
from pipeline.model import Model

SYSTEM_PROMPT = (
    "Describe the image by detailing the color, quantity, text, shape, size, texture, spatial relationships of the "
    "objects and background: "
)
HEAD_TOKENS = 28
TEXT_TOKENS = 256
REMEMBERED = 64  # 1 MB each for the 7B model
TOGETHER = 16
"""Prompts in one forward of the encoder: some 1,000 tokens, which fill a device and take little of its memory."""
LENGTH_STEP = 16
"""Lengths are multiples of it, with at least one token of padding: only then is a prompt's embedding in bf16 upstream's
to the bit on a CPU (at any length, 4 of 23 prompts differed in the last place)."""


class PromptEncoder:
    """Encodes the prompts of one model. Its owner's thread alone may use it."""

    def __init__(self, model: Model, remembered: int = REMEMBERED) -> None:
        self._model = model
        self._remembered = remembered
        self._memory: OrderedDict[str, torch.Tensor] = OrderedDict()

    @cached_property
    def limit(self) -> int:
        """Tokens that a prompt may have: what the template leaves of 256. 246 for the real model."""
        return HEAD_TOKENS + TEXT_TOKENS - self._template_tokens

    def check(self, field: str, prompt: str) -> None:
        """Raise PromptTooLong, naming ``field``, if the model would not read ``prompt`` to its end."""
        tokens = self._count(SYSTEM_PROMPT + prompt) - self._template_tokens
        if tokens > self.limit:
            raise PromptTooLong(field, tokens, self.limit)

    def encode(self, prompts: Iterable[str]) -> list[torch.Tensor]:
        """The embedding [256, C] of each prompt; all must have passed ``check``. New ones are encoded together."""
        wanted = list(prompts)
        found = {prompt: self._memory[prompt] for prompt in wanted if prompt in self._memory}
        new = [prompt for prompt in dict.fromkeys(wanted) if prompt not in found]
        for start in range(0, len(new), TOGETHER):
            together = new[start : start + TOGETHER]
            found |= zip(together, self._compute(together), strict=True)
        self._remember(found)
        return [found[prompt] for prompt in wanted]

    def _remember(self, embeddings: dict[str, torch.Tensor]) -> None:
        for prompt, embedding in embeddings.items():
            self._memory[prompt] = embedding
            self._memory.move_to_end(prompt)
        while len(self._memory) > self._remembered:
            self._memory.popitem(last=False)

    @cached_property
    def _template_tokens(self) -> int:
        # Without its last space, which the real tokenizer glues to the user's first word.
        return self._count(SYSTEM_PROMPT.rstrip())

    def _count(self, content: str) -> int:
        return len(self._model.tokenizer(self._templated(content), add_special_tokens=False)["input_ids"])

    def _templated(self, content: str) -> str:
        text = self._model.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
        return str(text)

    def _compute(self, prompts: Sequence[str]) -> list[torch.Tensor]:
        """Follows OvisImagePipeline._get_ovis_prompt_embeds, but for the padding."""
        texts = [self._templated(SYSTEM_PROMPT + prompt) for prompt in prompts]
        tokens = self._model.tokenizer(texts, add_special_tokens=False)["input_ids"]
        length = (max(map(len, tokens)) // LENGTH_STEP + 1) * LENGTH_STEP
        padded = self._model.tokenizer.pad(
            {"input_ids": tokens}, padding="max_length", max_length=length, return_tensors="pt"
        ).to(self._model.device)
        with torch.inference_mode():
            hidden = self._model.text_encoder(**padded, use_cache=False).last_hidden_state
            meant = (hidden * padded["attention_mask"][..., None])[:, HEAD_TOKENS : HEAD_TOKENS + TEXT_TOKENS]
            embeddings = meant.new_zeros(len(prompts), TEXT_TOKENS, meant.shape[-1])
            embeddings[:, : meant.shape[1]] = meant
        return [embedding.clone() for embedding in embeddings]  # so that none keeps its neighbours' memory
