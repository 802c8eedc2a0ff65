"""The small tokenizer keeps the shape of the real one."""

import pytest
from transformers import Qwen2Tokenizer

from pipeline.prompt import HEAD_TOKENS, SYSTEM_PROMPT
from pipeline.tiny.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Qwen2Tokenizer:
    return build_tokenizer()


def templated(tokenizer: Qwen2Tokenizer, content: str) -> list[int]:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize(
    "text",
    [
        'A shop window: "OPEN LATE", the user\'s own.\n\nTwo  spaces, and a tab\t!',
        "红色横幅,写着“全场五折”。",
        "🐼 👩‍👩‍👧 🇫🇷",
        " the image: by texture, text and background",
    ],
)
def test_what_goes_in_comes_out(tokenizer: Qwen2Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_every_byte_is_a_token_of_its_own(tokenizer: Qwen2Tokenizer) -> None:
    assert len(tokenizer("qzx汉")["input_ids"]) == 3 + 3


def test_the_head_that_upstream_drops_ends_with_the_system_prompts_last_word(tokenizer: Qwen2Tokenizer) -> None:
    head = tokenizer.decode(templated(tokenizer, SYSTEM_PROMPT)[:HEAD_TOKENS])
    assert head == "<|im_start|>user\n" + SYSTEM_PROMPT.removesuffix(": ")


def test_the_templates_end_is_9_tokens_and_the_colon_1(tokenizer: Qwen2Tokenizer) -> None:
    assert len(templated(tokenizer, SYSTEM_PROMPT)) == HEAD_TOKENS + 1 + 9


def test_different_prompts_have_different_tokens(tokenizer: Qwen2Tokenizer) -> None:
    assert templated(tokenizer, SYSTEM_PROMPT + "a fox") != templated(tokenizer, SYSTEM_PROMPT + "a box")
