"""A file found alone can be drawn again."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import InvalidRequest
from pipeline.image_file import encode, read_request
from pipeline.request import PROMPT_MAX_CHARACTERS, SEED_MAX, ImageFormat, ImageRequest

PROMPTS = {
    "chinese": "红色横幅,写着“全场五折”",
    "emoji": "a family 👩‍👩‍👧 and a 🐼",
    "quotes": "a sign that says \"it's 'OPEN'\"",
    "line ends": "one\ntwo\r\nthree\rfour\tfive ",
    "xml": "a < b && b > c; &amp; ]]> <!-- no --> <rdf:li>",
    "what XML cannot say": "bell \x07, escape \x1b, \ufffe and \uffff",
    "8,000 Chinese characters": "汉" * PROMPT_MAX_CHARACTERS,
    "8,000 ampersands": "&" * PROMPT_MAX_CHARACTERS,
    "8,000 emoji": "😀" * PROMPT_MAX_CHARACTERS,
}


@pytest.fixture
def pixels() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (64, 100, 3), dtype=np.uint8)


def request_for(prompt: str, file_format: ImageFormat, **fields: object) -> ImageRequest:
    return ImageRequest.model_validate(
        {"prompt": prompt, "width": 100, "height": 64, "seed": SEED_MAX, "format": file_format, **fields}
    )


@pytest.mark.parametrize("file_format", ImageFormat)
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_the_file_gives_its_request_back(prompt: str, file_format: ImageFormat, pixels: NDArray[np.uint8]) -> None:
    request = request_for(prompt, file_format, negative_prompt=prompt, steps=7, guidance=3.3, quality=77)
    content = encode(pixels, request, "模型/<7B>", "sha256-0123")
    assert read_request(content) == (request, "模型/<7B>", "sha256-0123")


@given(prompt=st.text(min_size=1, max_size=200), file_format=st.sampled_from(ImageFormat), guidance=st.floats(0, 20))
@settings(max_examples=60, deadline=None)
def test_any_request_comes_back(prompt: str, file_format: ImageFormat, guidance: float) -> None:
    prompt = "x" + prompt.replace("\x00", "")
    request = request_for(prompt, file_format, guidance=guidance)
    assert read_request(encode(np.zeros((64, 100, 3), np.uint8), request, "tiny", "r"))[0] == request


@pytest.mark.parametrize("file_format", ImageFormat)
def test_the_file_is_of_its_format_and_size(file_format: ImageFormat, pixels: NDArray[np.uint8]) -> None:
    with Image.open(io.BytesIO(encode(pixels, request_for("a fox", file_format), "tiny", "r"))) as image:
        assert (image.format, image.size, image.mode) == (file_format.value.upper(), (100, 64), "RGB")


def test_a_png_holds_the_very_pixels_and_readable_text(pixels: NDArray[np.uint8]) -> None:
    content = encode(pixels, request_for("狐狸", ImageFormat.PNG), "tiny", "r")
    with Image.open(io.BytesIO(content)) as image:
        assert np.array_equal(np.asarray(image), pixels)
        assert image.info["prompt"] == "狐狸"
        assert image.info["seed"] == str(SEED_MAX)
        assert image.info["Software"] == "ovis-batch"


def test_an_ordinary_jpeg_holds_its_prompt_readably(pixels: NDArray[np.uint8]) -> None:
    content = encode(pixels, request_for("狐狸", ImageFormat.JPEG), "tiny", "r")
    assert "<o:prompt>狐狸</o:prompt>".encode() in content


def test_a_lower_quality_makes_a_smaller_file(pixels: NDArray[np.uint8]) -> None:
    for file_format in (ImageFormat.JPEG, ImageFormat.WEBP):
        low, high = (
            encode(pixels, request_for("a fox", file_format, quality=quality), "tiny", "r") for quality in (10, 95)
        )
        assert len(low) < len(high)


def test_pixels_of_another_size_than_the_requests_are_refused(pixels: NDArray[np.uint8]) -> None:
    with pytest.raises(ValueError, match="64, 100"):
        encode(pixels, request_for("a fox", ImageFormat.PNG, width=96), "tiny", "r")


def foreign(file_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, file_format, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no image",
        foreign("PNG"),
        foreign("JPEG"),
        foreign("WEBP"),
        foreign("JPEG", xmp=b"<not xml"),
        foreign("JPEG", xmp=b'<!DOCTYPE x [<!ENTITY a "aa">]><x>&a;</x>'),
        foreign("PNG")[:60],
    ],
)
def test_a_file_that_is_not_ours_is_refused_as_such(content: bytes) -> None:
    with pytest.raises(InvalidRequest, match="carries no request of ovis-batch") as caught:
        read_request(content)
    assert caught.value.field == "file"
