"""Prompts to embeddings, as OvisImagePipeline makes them, and a small memory of the last ones.

The model reads a prompt inside a chat template, behind a system prompt. The first 28 tokens are the template's and
the system prompt's; upstream drops them after encoding, and pads or cuts what follows to 256. Cutting would lose the
end of a long prompt without a word, so here it is refused.

Invariants: an embedding is [1, 256, D] in the text encoder's dtype, with zeros where upstream pads; it is computed
alone, so that it does not depend on its neighbours to the bit; at most ``remembered`` of them are kept.
"""

from collections import OrderedDict
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
REMEMBERED = 32  # 1 MB each for the 7B model


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

    def encode(self, prompt: str) -> torch.Tensor:
        """The embedding [1, 256, D] of ``prompt``, which must have passed ``check``."""
        if prompt in self._memory:
            self._memory.move_to_end(prompt)
            return self._memory[prompt]
        embedding = self._memory[prompt] = self._compute(prompt)
        if len(self._memory) > self._remembered:
            self._memory.popitem(last=False)
        return embedding

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

    def _compute(self, prompt: str) -> torch.Tensor:
        """Follows OvisImagePipeline._get_ovis_prompt_embeds."""
        tokens = self._model.tokenizer(
            [self._templated(SYSTEM_PROMPT + prompt)],
            padding="max_length",
            max_length=HEAD_TOKENS + TEXT_TOKENS,
            return_tensors="pt",
            add_special_tokens=False,
        )
        input_ids = tokens["input_ids"].to(self._model.device)  # [1, 284]
        mask: torch.Tensor = tokens["attention_mask"].to(self._model.device)
        with torch.inference_mode():
            hidden: torch.Tensor = self._model.text_encoder(input_ids=input_ids, attention_mask=mask).last_hidden_state
            return (hidden * mask[..., None])[:, HEAD_TOKENS:].clone()
