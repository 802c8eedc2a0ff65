"""An unfinished image travels as bytes: the very same, or a clear refusal."""

import json
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from pipeline.errors import UnusableLatents
from pipeline.latents_file import ENGINE, UnfinishedImage, _digest, encode, read
from pipeline.request import SEED_MAX, ImageRequest

DTYPES = (torch.bfloat16, torch.float32)
REQUEST = ImageRequest(
    prompt='狐狸 🦊: "it\'s\r\n\tOPEN" \x07\ufffe',
    negative_prompt="blurred",
    width=100,
    height=64,
    steps=7,
    guidance=0.1 + 0.2,
    seed=SEED_MAX,
)


def unfinished(dtype: torch.dtype = torch.bfloat16, step: int = 3, request: ImageRequest = REQUEST) -> UnfinishedImage:
    latents = torch.randn((1, 7 * 4, 64), generator=torch.Generator().manual_seed(0)).to(dtype)
    return UnfinishedImage(request, step, latents)


def body(**fields: object) -> bytes:
    return encode(unfinished(**fields), "tiny", "r1")  # type: ignore[arg-type]


def bits(latents: torch.Tensor) -> bytes:
    return latents.view(torch.uint8).numpy().tobytes()


def same(one: UnfinishedImage, other: UnfinishedImage) -> bool:
    return (
        (one.request, one.step) == (other.request, other.step)
        and (one.latents.dtype, one.latents.shape) == (other.latents.dtype, other.latents.shape)
        and bits(one.latents) == bits(other.latents)
    )


def refusal(content: bytes, model: str = "tiny", revision: str = "r1") -> str:
    with pytest.raises(UnusableLatents, match="Draw the image from its start") as caught:
        read(content, model, revision)
    return str(caught.value)


def forged(latents: torch.Tensor | None = None, **facts: str) -> bytes:
    """A file whose digest is right and whose content is not."""
    content = body()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    known = {**header["__metadata__"], **facts}
    latents = unfinished().latents if latents is None else latents
    return save({"latents": latents}, {**known, "sha256": _digest(known, bits(latents))})


@pytest.mark.parametrize("step", [0, 3, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_comes_back_to_the_bit(dtype: torch.dtype, step: int) -> None:
    assert same(read(body(dtype=dtype, step=step), "tiny", "r1"), unfinished(dtype, step))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_that_print_alike_stay_apart(dtype: torch.dtype) -> None:
    latents = torch.zeros(1, 28, 64, dtype=dtype)
    latents[0, 0, :4] = torch.tensor([-0.0, torch.finfo(dtype).tiny / 4, torch.finfo(dtype).max, 1 + 2**-7])
    image = UnfinishedImage(REQUEST, 3, latents)
    assert same(read(encode(image, "tiny", "r1"), "tiny", "r1"), image)


def test_latents_that_are_a_view_come_back_as_what_is_seen() -> None:
    image = UnfinishedImage(REQUEST, 3, torch.randn(1, 64, 28).transpose(1, 2))
    assert torch.equal(read(encode(image, "tiny", "r1"), "tiny", "r1").latents, image.latents)


@given(prompt=st.text(min_size=1, max_size=100), guidance=st.floats(0, 20), seed=st.integers(0, SEED_MAX))
@settings(max_examples=60, deadline=None)
def test_any_request_comes_back(prompt: str, guidance: float, seed: int) -> None:
    fields = {"prompt": "x" + prompt.replace("\x00", ""), "guidance": guidance, "seed": seed}
    request = ImageRequest.model_validate({**REQUEST.model_dump(), **fields})
    assert read(body(request=request), "tiny", "r1").request == request


def test_ordinary_tools_see_what_it_is() -> None:
    content = body()
    facts = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    assert (facts["model"], facts["revision"], facts["step"], facts["dtype"]) == ("tiny", "r1", "3", "bfloat16")
    assert json.loads(facts["request"])["prompt"] == REQUEST.prompt


@pytest.mark.parametrize(("model", "revision"), [("other", "r1"), ("tiny", "r2")])
def test_another_models_are_refused_with_both_names(model: str, revision: str) -> None:
    message = refusal(body(), model, revision)
    assert "tiny r1" in message
    assert f"{model} {revision}" in message


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no file",
        bytes(8),
        b"\xff" * 64,
        b"\x02" + bytes(7) + b"[]",
        save({}),
        save({"latents": torch.zeros(1), "more": torch.zeros(1)}),
    ],
    ids=["empty", "text", "zeros", "ones", "no header", "no tensor", "two tensors"],
)
def test_what_is_no_file_of_ours_is_refused(content: bytes) -> None:
    assert "no file of an unfinished image" in refusal(content)


@pytest.mark.parametrize(
    "content",
    [
        save({"latents": torch.zeros(1, 28, 64)}, {"format": "ovis-batch unfinished image 1"}),
        save({"weights": torch.zeros(1, 28, 64)}, {"step": "1"}),
    ],
)
def test_another_safetensors_file_is_refused(content: bytes) -> None:
    assert "not of an unfinished image" in refusal(content)


def test_one_whose_metadata_are_null_is_refused() -> None:
    header = json.dumps(
        {"__metadata__": None, "latents": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    ).encode()
    assert "not of an unfinished image" in refusal(len(header).to_bytes(8, "little") + header + bytes(4))


def test_one_without_metadata_is_refused() -> None:
    assert "no file of an unfinished image" in refusal(save({"latents": torch.zeros(1, 28, 64)}))


def test_a_format_of_another_day_is_refused_by_name() -> None:
    assert "'ovis-batch unfinished image 2'" in refusal(forged(format="ovis-batch unfinished image 2"))


def test_what_another_version_of_the_engine_drew_is_refused_with_both_versions() -> None:
    message = refusal(forged(engine="0"))
    assert "engine 0" in message
    assert f"here is {ENGINE}" in message


@pytest.mark.parametrize("step", ["-1", "8", "9" * 5000])
def test_a_step_that_the_request_has_not_is_refused(step: str) -> None:
    assert "step" in refusal(forged(step=step))


@pytest.mark.parametrize("facts", [{"step": "x"}, {"request": "{}"}, {"request": "["}, {"request": '{"prompt": ""}'}])
def test_a_request_or_step_that_is_none_is_refused(facts: dict[str, str]) -> None:
    assert "their request or step is none" in refusal(forged(**facts))


def test_a_request_without_a_seed_is_refused() -> None:
    request = REQUEST.model_copy(update={"seed": None})
    assert "no seed" in refusal(forged(request=request.model_dump_json()))


@pytest.mark.parametrize("shape", [(1, 27, 64), (28, 64), (1, 28, 32), (2, 28, 64), (1, 64, 28), (1, 0, 64)], ids=str)
def test_a_shape_that_does_not_fit_the_request_is_refused(shape: tuple[int, ...]) -> None:
    message = refusal(forged(torch.zeros(shape, dtype=torch.bfloat16)))
    assert "112×64 image has [1, 28, 64]" in message or "empty" in message


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_latents_that_are_not_finite_are_refused(dtype: torch.dtype, number: float) -> None:
    latents = torch.zeros(1, 28, 64, dtype=dtype)
    latents[0, 27, 63] = number
    assert "NaN" in refusal(forged(latents, dtype=str(dtype).removeprefix("torch.")))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32, torch.float8_e4m3fn], ids=str)
def test_numbers_of_another_kind_are_refused(dtype: torch.dtype) -> None:
    assert "BF16, F32" in refusal(forged(torch.zeros(1, 28, 64).to(dtype), dtype=str(dtype).removeprefix("torch.")))


def test_a_dtype_that_is_not_the_one_written_down_is_refused() -> None:
    assert "as written down" in refusal(forged(torch.zeros(1, 28, 64), dtype="bfloat16"))


def with_nan(latents: torch.Tensor) -> torch.Tensor:
    return torch.full_like(latents, float("nan"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda image: UnfinishedImage(image.request, 8, image.latents), "step is 8"),
        (lambda image: UnfinishedImage(image.request, 3, image.latents[:, 1:]), "shape"),
        (lambda image: UnfinishedImage(image.request, 3, with_nan(image.latents)), "NaN"),
        (lambda image: UnfinishedImage(image.request, 3, image.latents.half()), "float16"),
        (lambda image: UnfinishedImage(image.request.model_copy(update={"seed": None}), 3, image.latents), "seed"),
    ],
)
def test_what_could_not_be_read_is_not_written(
    spoil: Callable[[UnfinishedImage], UnfinishedImage], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        encode(spoil(unfinished()), "tiny", "r1")


def test_no_part_of_it_is_taken_for_the_whole() -> None:
    content = body()
    for length in [*range(1200), *range(1200, len(content), 97), len(content) - 1]:
        refusal(content[:length])


def test_more_than_the_whole_is_refused() -> None:
    refusal(body() + b"\x00")


@given(st.integers(0, len(body()) * 8 - 1))
@settings(max_examples=1500, deadline=None)
def test_a_flipped_bit_is_refused_or_changes_nothing(bit: int) -> None:
    content = bytearray(body())
    content[bit // 8] ^= 1 << bit % 8
    refused_or_the_same(bytes(content))


@given(st.integers(0, 1100), st.binary(min_size=1, max_size=12))
@settings(max_examples=1500, deadline=None)
def test_a_header_that_is_written_over_is_refused_or_changes_nothing(start: int, junk: bytes) -> None:
    content = bytearray(body())
    content[start : start + len(junk)] = junk
    refused_or_the_same(bytes(content))


@given(st.binary(max_size=300))
@settings(max_examples=500, deadline=None)
def test_any_bytes_are_refused(junk: bytes) -> None:
    refusal(junk)
    refusal(len(junk).to_bytes(8, "little") + junk)


def refused_or_the_same(content: bytes) -> None:
    try:
        image = read(content, "tiny", "r1")
    except UnusableLatents:
        return
    assert same(image, unfinished())
