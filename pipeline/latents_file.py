"""An unfinished image to bytes and back, so that any worker with the same model can go on with it.

Between two steps an image is its request, the number of steps done and its latents. They are one safetensors file:
the tensor ``latents``, and all the rest in the file's metadata. (``image_file`` does the same for a finished image.)

Invariants: ``read(encode(unfinished, ...))`` gives the same request, step and latents, to the bit, and on the CPU;
bytes that were cut or changed anywhere are refused or give exactly that: a digest covers everything that is read.
"""

import hashlib
import json
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, deserialize
from safetensors.torch import save

from pipeline.errors import UnusableLatents
from pipeline.request import SIDE_STEP_PX, ImageRequest

FORMAT = "ovis-batch unfinished image 1"
"""Raise the number whenever an older ``read`` would misunderstand what ``encode`` writes."""
ENGINE = "1"
"""Raise it with every change by which an engine would go on to another picture than the one that wrote the bytes: of
the schedule, a step's arithmetic, guidance, or what the latents mean. A picture half by one and half by the other is
neither's, and nobody could draw it again."""
TOKEN_CHANNELS = 64  # 2×2 latents of 16 channels

_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}  # as safetensors names them
_FACTS = {"format", "engine", "model", "revision", "request", "step", "dtype", "sha256"}


@dataclass(frozen=True)
class UnfinishedImage:
    """An image after ``step`` of its request's steps."""

    request: ImageRequest  # with a seed
    step: int  # 0 to request.steps
    latents: torch.Tensor  # [1, tokens, 64] on the CPU, bfloat16 or float32


@dataclass(frozen=True)
class _Content:
    """What a file of ours holds, not yet judged."""

    facts: dict[str, str]
    kind: str
    shape: list[int]
    data: bytearray


def encode(unfinished: UnfinishedImage, model_name: str, revision: str) -> bytes:
    """The bytes of ``unfinished``, drawn by that model. Raises ValueError for what ``read`` would refuse."""
    if reason := _unfit(unfinished):
        raise ValueError(reason)
    latents = unfinished.latents.contiguous()
    facts = {
        "format": FORMAT,
        "engine": ENGINE,
        "model": model_name,
        "revision": revision,
        "request": unfinished.request.model_dump_json(),
        "step": str(unfinished.step),
        "dtype": str(latents.dtype).removeprefix("torch."),
    }
    return save({"latents": latents}, {**facts, "sha256": _digest(facts, latents.view(torch.uint8).numpy().tobytes())})


def read(body: bytes, model_name: str, revision: str) -> UnfinishedImage:
    """What ``encode`` made ``body`` of.

    Raises UnusableLatents for any other bytes, and for those of another model or of another engine's version.

    Whether their dtype is the one that this process draws in, is the caller's to ask.
    """
    content = _parse(body)
    facts = content.facts
    if facts["format"] != FORMAT:
        raise UnusableLatents(f"their format is {facts['format']!r}, and this version reads {FORMAT!r}")
    if facts["sha256"] != _digest(facts, content.data):
        raise UnusableLatents("they were changed on their way: the digest does not match")
    if facts["engine"] != ENGINE:
        raise UnusableLatents(f"they were drawn by engine {facts['engine']}, and here is {ENGINE}")
    if (facts["model"], facts["revision"]) != (model_name, revision):
        drawn_by = f"{facts['model']} {facts['revision']}"
        raise UnusableLatents(f"they were drawn by {drawn_by}, and here is {model_name} {revision}")
    unfinished = _unfinished(content)
    if reason := _unfit(unfinished):
        raise UnusableLatents(reason)
    return unfinished


def _parse(body: bytes) -> _Content:
    """Whatever body it is, this or UnusableLatents; safetensors has checked offsets, sizes and UTF-8."""
    try:
        ((name, tensor),) = deserialize(body)  # type: ignore[no-untyped-call]
        header_bytes = int.from_bytes(body[:8], "little")
        facts = json.loads(body[8 : 8 + header_bytes])["__metadata__"]
    except (SafetensorError, ValueError, KeyError) as error:
        raise UnusableLatents(f"they are no file of an unfinished image, or a part of one ({error})") from error
    if name != "latents" or not isinstance(facts, dict) or facts.keys() != _FACTS:  # safetensors allows a null
        raise UnusableLatents("they are a safetensors file, but not of an unfinished image")
    return _Content(facts, tensor["dtype"], tensor["shape"], tensor["data"])


def _unfinished(content: _Content) -> UnfinishedImage:
    dtype = _DTYPES.get(content.kind)
    if dtype is None or content.facts["dtype"] != str(dtype).removeprefix("torch."):
        raise UnusableLatents(f"their numbers are {content.kind}, and not one of {', '.join(_DTYPES)} as written down")
    if not content.data:
        raise UnusableLatents("they are empty")
    try:
        request, step = ImageRequest.model_validate_json(content.facts["request"]), int(content.facts["step"])
    except ValueError as error:  # pydantic's is one
        raise UnusableLatents("their request or step is none") from error
    return UnfinishedImage(request, step, torch.frombuffer(content.data, dtype=dtype).reshape(content.shape))


def _unfit(unfinished: UnfinishedImage) -> str | None:
    """Why nobody could go on with ``unfinished``, if so."""
    request, latents = unfinished.request, unfinished.latents
    width_px, height_px = request.drawn_size
    shape = (1, (width_px // SIDE_STEP_PX) * (height_px // SIDE_STEP_PX), TOKEN_CHANNELS)
    if request.seed is None:
        return "their request has no seed"
    if not 0 <= unfinished.step <= request.steps:
        return f"their step is {unfinished.step}, and the request has {request.steps}"
    if tuple(latents.shape) != shape:
        return f"their shape is {list(latents.shape)}, and a {width_px}×{height_px} image has {list(shape)}"
    if latents.dtype not in _DTYPES.values():
        return f"their numbers are {latents.dtype}, and must be bfloat16 or float32"
    if not torch.isfinite(latents).all():
        return "they hold NaN or infinite numbers"
    return None


def _digest(facts: dict[str, str], data: bytes | bytearray) -> str:
    """Of every fact but the digest itself, and of the latents."""
    others = sorted((name, fact) for name, fact in facts.items() if name != "sha256")
    digest = hashlib.sha256(json.dumps(others).encode())
    digest.update(data)
    return digest.hexdigest()
