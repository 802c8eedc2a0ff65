"""A Qwen2 tokenizer over bytes, whose prompts have the real one's shape.

Two facts of the real tokenizer must hold here too, or tests of the prompt's limit would test something else: the
template and the system prompt up to its last word are 28 tokens (upstream drops exactly so many), and what the
template leaves of the other 256 for the user is 246. So the words of the system prompt are tokens of their own,
and so are ``user``, ``assistant`` and the blank line of the template. Everything else is bytes: whatever text goes
in comes out again (after NFC, as in the real one).

Invariant: a token's number is its place in ``vocabulary()``. Changing the order changes every picture.
"""

from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer

END_OF_TEXT = "<|endoftext|>"
CONTROLS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>", "<think>", "</think>")

WORDS = (
    *("user", "assistant", "\n\n"),
    *("Describe", " the", " image", " by", " detailing", " color", " quantity", " text", " shape", " size"),
    *(" texture", " spatial", " relationships", " of", " objects", " and", " background"),
    # The real tokenizer glues the system prompt's last space to the user's first word, so the colon alone costs the
    # user a token. Bytes cannot be glued: here colon and space are that one token.
    ": ",
)

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{- '<|im_start|>assistant\\n' -}}"
    "{%- if not enable_thinking -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}"
    "{%- endif -%}"
)


def vocabulary() -> dict[str, int]:
    """All 256 bytes, as byte-level BPE spells them, then the controls."""
    symbols = sorted(ByteLevel.alphabet())
    return {symbol: number for number, symbol in enumerate((*symbols, *CONTROLS))}


def build_tokenizer() -> Qwen2Tokenizer:
    """The tokenizer, made in memory; ``save_pretrained`` writes it as an ordinary ``tokenizer.json``."""
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary(), merges=[], pad_token=END_OF_TEXT, model_max_length=4096, padding_side="right"
    )
    tokenizer.add_tokens([AddedToken(control, special=True, normalized=False) for control in CONTROLS])
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in WORDS])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
