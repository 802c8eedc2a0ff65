"""Finished latents to pixels, beside the steps of the images that are still on their way.

On CUDA it has a stream of its own: ``collect`` launches, and hands a picture out once its bytes have reached the host.
What waits there together and is drawn in equal size goes through the VAE together, within ``pixels_a_call``. On a CPU
the same lines run at once, inside ``collect``, one image at a time and in float32: torch's bf16 convolutions are six
times slower there (176 against 26 ms for 736×96, the tiny model on one thread).

It may know no schedule and no prompt: a ticket, latents and the request are all that it is given.

Invariants:
- on a CPU an image's pixels do not depend on its company; a float32 model's are OvisImagePipeline's own to the bit. A
  bf16 model's differ from its pipeline's by that one's rounding (48 dB, the tiny model), as stacks do on CUDA;
- an image that fails, fails alone: a stack that torch refuses is split until the guilty one is by itself;
- a ticket leaves by exactly one of ``collect`` and ``withdraw``.

Where memory is too short for one image alone, it is decoded in overlapping tiles. Each tile has group norm's statistics
and the middle block's attention of its own, so it is the same picture with another shade here and there and blended
seams, not the same bits. Nothing but want of memory leads there.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch.nn import functional

from pipeline.errors import BrokenImage, Exhausted, Fatal, PipelineError
from pipeline.model import Model
from pipeline.noise import unpack
from pipeline.request import ImageRequest
from pipeline.torch_errors import classed

PIXELS_A_CALL = 1024 * 1024
"""Those of the usual image: a stack of banners fills a device and does not raise the peak of memory above that of one.
Reasoned, not measured yet. On a CPU in float32 a stack gains nothing."""
TILES_PX = (512, 256)
"""Sides of the tiles, tried in turn. Upstream's default is the VAE's ``sample_size``, for this model 1024: the whole of
most images. Memory goes with a tile's area; the overlap is upstream's quarter."""

Outcome = NDArray[np.uint8] | PipelineError
"""[height, width, 3] as the request asks, or why there is no picture."""


@dataclass(frozen=True)
class _Latents:
    """An image that waits to be decoded."""

    ticket: int
    tokens: torch.Tensor  # [1, tokens, 4 · channels]
    request: ImageRequest


class Decoder:
    """Takes finished latents, gives pictures. One thread owns it, always on the same current stream."""

    def __init__(self, model: Model, *, pixels_a_call: int | None = None) -> None:
        self._latent_px = model.latent_px
        self._device = model.device
        on_cpu = model.device.type == "cpu"
        self._vae = deepcopy(model.vae).float() if on_cpu and model.dtype != torch.float32 else model.vae
        self._pixels_a_call = (0 if on_cpu else PIXELS_A_CALL) if pixels_a_call is None else pixels_a_call
        self._stream = _stream(model.device)
        self._waiting: dict[int, _Latents] = {}
        self._under_way: list[_Decoding] = []

    def submit(self, ticket: int, latents: torch.Tensor, request: ImageRequest) -> None:
        """Take in ``latents`` [1, tokens, 64] after the last step. The device need not be done with them."""
        self._waiting[ticket] = _Latents(ticket, latents, request)

    def withdraw(self, ticket: int) -> None:
        """Forget a ticket; one that is not inside (any more) is nothing."""
        self._waiting.pop(ticket, None)
        for decoding in self._under_way:
            decoding.images.pop(ticket, None)
        self._under_way = [decoding for decoding in self._under_way if decoding.images]

    @torch.inference_mode()
    def collect(self, *, wait: bool) -> list[tuple[int, Outcome]]:
        """Launch what waits and give what is ready; with ``wait`` at least one, if any is inside.

        An image ends in its picture, Exhausted, BrokenImage (NaN or infinite pixels) or DrawingFailed. Fatal is raised.
        On CUDA call it before the next step is launched: what it launches waits for all that was launched before.
        """
        with self._beside_the_steps():
            waiting, self._waiting = list(self._waiting.values()), {}
            failed = [failure for group in self._groups(waiting) for failure in self._launch(group)]
        if wait and not failed and self._under_way:
            self._under_way[0].ready(wait=True)
        ready = [decoding for decoding in self._under_way if decoding.ready()]
        self._under_way = [decoding for decoding in self._under_way if decoding not in ready]
        return [*failed, *chain.from_iterable(decoding.outcomes() for decoding in ready)]

    @torch.inference_mode()
    def preview(self, latents: torch.Tensor, request: ImageRequest, *, longest_px: int = 256) -> NDArray[np.uint8]:
        """A small picture [h, w, 3], at most ``longest_px`` at its longest, of ``latents`` [1, tokens, 64].

        The latents are averaged before they are decoded, so its cost does not grow with the image; it is coarser than
        a finished picture made small. NaN becomes grey. Waits for the device. Raises Exhausted, DrawingFailed, Fatal.
        """
        width_px, height_px = request.drawn_size
        try:
            small = _shrink(self._unpack(latents, request), longest_px // self._latent_px)
            decoded = self._decode(small)
            pixels = _to_bytes(decoded.nan_to_num(nan=0.0))[0].cpu().numpy()
        except RuntimeError as error:
            raise classed(error, width_px, height_px) from error
        height, width, _ = pixels.shape
        return _crop(
            pixels,
            width=max(1, round(request.width * width / width_px)),
            height=max(1, round(request.height * height / height_px)),
        )

    def _groups(self, waiting: list[_Latents]) -> Iterator[list[_Latents]]:
        """Those of one drawn size together, as evenly as ``pixels_a_call`` allows; one alone is always allowed."""
        sizes: dict[tuple[int, int], list[_Latents]] = {}
        for latents in waiting:
            sizes.setdefault(latents.request.drawn_size, []).append(latents)
        for (width_px, height_px), equal in sizes.items():
            most = max(1, self._pixels_a_call // (width_px * height_px))
            calls = -(-len(equal) // most)
            yield from (equal[call::calls] for call in range(calls))

    def _launch(self, group: list[_Latents], tile_px: int | None = None) -> list[tuple[int, PipelineError]]:
        """Start decoding ``group``, split or in ever smaller tiles if it must be; gives those that failed."""
        size_px = group[0].request.drawn_size
        try:
            decoded = self._decode(self._gather(group), tile_px)
            self._under_way.append(_Decoding(group, decoded))
            return []
        except (RuntimeError, MemoryError) as error:
            failure = classed(error, *size_px)
        if isinstance(failure, Fatal):
            raise failure
        if len(group) > 1:
            half = len(group) // 2
            return [*self._launch(group[:half]), *self._launch(group[half:])]
        smaller_px = [side_px for side_px in TILES_PX if side_px < (tile_px or max(size_px))]
        if isinstance(failure, Exhausted) and smaller_px:
            return self._launch(group, smaller_px[0])
        return [(group[0].ticket, failure)]

    def _gather(self, group: list[_Latents]) -> torch.Tensor:
        """[B, C, H/8, W/8], on the stream that decodes."""
        if self._stream is not None:
            for latents in group:  # else their memory could be given away while this stream still reads it
                latents.tokens.record_stream(self._stream)
        return torch.cat([self._unpack(latents.tokens, latents.request) for latents in group])

    def _unpack(self, tokens: torch.Tensor, request: ImageRequest) -> torch.Tensor:
        width_px, height_px = request.drawn_size
        latent_px = self._latent_px
        return unpack(tokens, height=height_px // latent_px, width=width_px // latent_px)

    def _decode(self, latents: torch.Tensor, tile_px: int | None = None) -> torch.Tensor:
        """[B, C, H/8, W/8] to [B, 3, H, W] in -1 to 1, as OvisImagePipeline.__call__ ends."""
        vae = self._vae
        latents = (latents.to(vae.dtype) / vae.config.scaling_factor) + vae.config.shift_factor
        if tile_px is None:
            (decoded,) = vae.decode(latents, return_dict=False)
        else:
            with _tiles(vae, tile_px, tile_px // self._latent_px):
                (decoded,) = vae.tiled_decode(latents, return_dict=False)
        assert isinstance(decoded, torch.Tensor)
        return decoded

    def _beside_the_steps(self) -> AbstractContextManager[object]:
        """The decoder's own stream, behind what is launched so far; nothing where there are no streams."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return torch.cuda.stream(self._stream)


class _Decoding:
    """Images whose pixels are on their way from the device to the host."""

    def __init__(self, group: list[_Latents], decoded: torch.Tensor) -> None:
        self.images = {latents.ticket: (place, latents.request) for place, latents in enumerate(group)}
        self._size_px = group[0].request.drawn_size
        self._finite = _to_host(torch.isfinite(decoded).flatten(1).all(1))  # [B]
        self._pixels = _to_host(_to_bytes(decoded))  # [B, H, W, 3]
        self._copied = _record_event(decoded.device)

    def ready(self, *, wait: bool = False) -> bool:
        """Whether the host has them all. Raises Fatal if the device died over them."""
        if self._copied is None:
            return True
        try:
            if wait:
                self._copied.synchronize()
            return bool(self._copied.query())  # type: ignore[no-untyped-call]
        except RuntimeError as error:  # of work that was launched before: nothing of the device can be trusted
            raise Fatal(f"the device is dead: {error}") from error

    def outcomes(self) -> Iterator[tuple[int, Outcome]]:
        pixels = self._pixels.numpy()
        for ticket, (place, request) in self.images.items():
            if self._finite[place]:
                yield ticket, _crop(pixels[place], width=request.width, height=request.height)
            else:
                yield ticket, BrokenImage(request.steps)


def _to_bytes(decoded: torch.Tensor) -> torch.Tensor:
    """[B, 3, H, W] in -1 to 1 to uint8 [B, H, W, 3]; VaeImageProcessor.postprocess to its rounding, on the device.

    In place: ``decoded`` is lost. Its copies would be the peak of memory where it was decoded in tiles.
    """
    shades = decoded.mul_(0.5).add_(0.5).clamp_(0, 1).permute(0, 2, 3, 1).float()
    return shades.mul_(255).round_().to(torch.uint8, memory_format=torch.contiguous_format)


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    """A new stream, where there are any."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` on the CPU; from CUDA in pinned memory, and there only when the stream has come to this point."""
    if not tensor.is_cuda:
        return tensor.cpu()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _record_event(device: torch.device) -> torch.cuda.Event | None:
    """The current stream's work up to here, on CUDA."""
    if device.type != "cuda":
        return None
    # Blocking: a thread that waits for it sleeps.
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def _crop(pixels: NDArray[np.uint8], *, width: int, height: int) -> NDArray[np.uint8]:
    """The centre of ``pixels`` [H, W, 3], copied; an odd pixel too many goes at the bottom or the right."""
    top = (pixels.shape[0] - height) // 2
    left = (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width].copy()


def _shrink(latents: torch.Tensor, longest: int) -> torch.Tensor:
    """[1, C, h, w] averaged over areas until no side is over ``longest``; float32 if anything was to do."""
    height, width = latents.shape[-2:]
    scale = longest / max(height, width)
    if scale >= 1:
        return latents
    return functional.interpolate(
        latents.float(), size=(max(1, round(height * scale)), max(1, round(width * scale))), mode="area"
    )


@contextmanager
def _tiles(vae: AutoencoderKL, tile_px: int, tile_latents: int) -> Iterator[None]:
    """The VAE's tiles in another size, for as long as the block runs."""
    before = vae.tile_sample_min_size, vae.tile_latent_min_size
    vae.tile_sample_min_size, vae.tile_latent_min_size = tile_px, tile_latents
    try:
        yield
    finally:
        vae.tile_sample_min_size, vae.tile_latent_min_size = before
