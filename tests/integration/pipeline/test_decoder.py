"""Latents to pixels: upstream's to the bit, together or alone, in tiles where memory is short."""

import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import OvisImagePipeline
from diffusers.image_processor import VaeImageProcessor
from numpy.typing import NDArray
from PIL import Image

from pipeline.decoder import Decoder, Outcome
from pipeline.errors import BrokenImage, DrawingFailed, Exhausted, Fatal, PipelineError
from pipeline.model import Model, load_model
from pipeline.noise import draw_noise
from pipeline.request import ImageRequest
from pipeline.torch_errors import classed, out_of_memory

DTYPES = ("bfloat16", "float32")
SIZES = ((64, 64), (101, 67), (176, 64), (96, 159))


@pytest.fixture
def model(request: pytest.FixtureRequest, tiny: Model, tiny_float32: Model) -> Model:
    return tiny if request.param == "bfloat16" else tiny_float32


def request_for(width: int = 64, height: int = 64, steps: int = 9) -> ImageRequest:
    return ImageRequest(prompt="A fox", width=width, height=height, steps=steps, seed=1)


def latents_for(model: Model, request: ImageRequest, seed: int = 0) -> torch.Tensor:
    """What a finished image's latents are like: as many, as large."""
    width, height = request.drawn_size
    return draw_noise(seed, channels=16, height=height // 8, width=width // 8, dtype=model.dtype).to(model.device)


def decode_upstream(model: Model, latents: torch.Tensor, request: ImageRequest) -> NDArray[np.uint8]:
    """The end of OvisImagePipeline.__call__, by its own functions; uncropped."""
    width, height = request.drawn_size
    with torch.inference_mode():
        unpacked = OvisImagePipeline._unpack_latents(latents, height, width, 8)
        unpacked = (unpacked / model.vae.config.scaling_factor) + model.vae.config.shift_factor
        decoded = model.vae.decode(unpacked, return_dict=False)[0]
        (image,) = VaeImageProcessor(vae_scale_factor=16).postprocess(decoded, output_type="pil")
    return np.asarray(image)


def decode(decoder: Decoder, *images: tuple[torch.Tensor, ImageRequest]) -> list[Outcome]:
    """All together, in the order given."""
    for ticket, (latents, request) in enumerate(images):
        decoder.submit(ticket, latents, request)
    outcomes: dict[int, Outcome] = {}
    while ended := decoder.collect(wait=True):
        outcomes |= dict(ended)
    return [outcomes[ticket] for ticket in range(len(images))]


def picture(outcome: Outcome) -> NDArray[np.uint8]:
    assert isinstance(outcome, np.ndarray), outcome
    return outcome


def some(model: Model, *sizes: tuple[int, int]) -> list[tuple[torch.Tensor, ImageRequest]]:
    requests = [request_for(*size) for size in sizes]
    return [(latents_for(model, request, seed), request) for seed, request in enumerate(requests)]


def apart(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> int:
    """The largest difference, of 255."""
    return int(np.abs(one.astype(int) - other).max())


def psnr_db(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    return float(10 * np.log10(255**2 / max(np.mean((one.astype(float) - other) ** 2), 1e-9)))


def alike(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """The correlation of two pictures, 1 for equal ones."""
    return float(np.corrcoef(one.ravel(), other.ravel())[0, 1])


class Vae:
    """The real one, with an accident before ``decode``; ``calls`` are the batches that it was asked for."""

    def __init__(self, model: Model, accident: Callable[[torch.Tensor], None]) -> None:
        self.__dict__["real"] = model.vae
        self.__dict__["accident"] = accident
        self.__dict__["calls"] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.real, name, value)

    def decode(self, latents: torch.Tensor, return_dict: bool) -> Any:
        self.calls.append(len(latents))
        self.accident(latents)
        return self.real.decode(latents, return_dict=return_dict)


def nothing(latents: torch.Tensor) -> None:
    pass


def with_vae(model: Model, accident: Callable[[torch.Tensor], None]) -> tuple[Model, list[int]]:
    vae = Vae(model, accident)
    return replace(model, vae=vae), vae.calls


@pytest.mark.parametrize("model", DTYPES, indirect=True)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_on_a_cpu_it_is_what_upstream_decodes_in_float32_to_the_bit_from_the_centre(
    size: tuple[int, int], model: Model, tiny_float32: Model
) -> None:
    ((latents, request),) = some(model, size)
    (outcome,) = decode(Decoder(model), (latents, request))
    whole = decode_upstream(tiny_float32, latents.float(), request)
    top, left = (whole.shape[0] - size[1]) // 2, (whole.shape[1] - size[0]) // 2
    assert np.array_equal(picture(outcome), whole[top : top + size[1], left : left + size[0]])
    assert picture(outcome).dtype == np.uint8


def test_a_bf16_picture_differs_from_its_pipelines_by_that_ones_rounding(tiny: Model) -> None:
    ((latents, request),) = some(tiny, (128, 96))
    (outcome,) = decode(Decoder(tiny), (latents, request))
    assert psnr_db(picture(outcome), decode_upstream(tiny, latents, request)) > 40


def test_the_models_own_vae_stays_as_it_was_loaded(tiny: Model) -> None:
    Decoder(tiny)
    assert tiny.vae.dtype == torch.bfloat16


def test_in_float32_on_a_cpu_company_changes_no_bit(tiny_float32: Model) -> None:
    images = some(tiny_float32, *SIZES, *SIZES)
    for (latents, request), outcome in zip(images, decode(Decoder(tiny_float32), *images), strict=True):
        assert np.array_equal(picture(outcome), picture(decode(Decoder(tiny_float32), (latents, request))[0]))


def test_in_one_call_of_the_vae_float32_stays_within_1_of_255(tiny_float32: Model) -> None:
    model, calls = with_vae(tiny_float32, nothing)
    images = some(model, (128, 96), (128, 96), (121, 81), (128, 96), (64, 64))
    outcomes = decode(Decoder(model, pixels_a_call=10**7), *images)
    assert sorted(calls) == [1, 4]
    for (latents, request), outcome in zip(images, outcomes, strict=True):
        assert apart(picture(outcome), picture(decode(Decoder(tiny_float32), (latents, request))[0])) <= 1


def test_a_call_holds_no_more_pixels_than_it_may_and_calls_are_even(tiny_float32: Model) -> None:
    model, calls = with_vae(tiny_float32, nothing)
    images = some(model, *[(64, 64)] * 5, (80, 64))
    decode(Decoder(model, pixels_a_call=4 * 64 * 64), *images)
    assert sorted(calls) == [1, 2, 3]


def test_collect_gives_each_picture_once(tiny: Model) -> None:
    decoder = Decoder(tiny)
    assert decoder.collect(wait=True) == []
    for ticket, (latents, request) in enumerate(some(tiny, (64, 64), (80, 64))):
        decoder.submit(ticket, latents, request)
    assert sorted(ticket for ticket, _ in decoder.collect(wait=False)) == [0, 1]
    assert decoder.collect(wait=True) == []


def test_a_withdrawn_ticket_never_comes_and_an_unknown_one_is_nothing(tiny: Model) -> None:
    decoder = Decoder(tiny)
    for ticket, (latents, request) in enumerate(some(tiny, (64, 64), (64, 64), (64, 64))):
        decoder.submit(ticket, latents, request)
    decoder.withdraw(1)
    decoder.withdraw(7)
    assert [ticket for ticket, _ in decoder.collect(wait=True)] == [0, 2]
    decoder.withdraw(0)
    assert decoder.collect(wait=True) == []


def test_a_picture_is_memory_of_its_own(tiny: Model) -> None:
    first, second = (picture(outcome) for outcome in decode(Decoder(tiny), *some(tiny, (64, 64), (64, 64))))
    assert first.base is None
    assert first.flags.c_contiguous
    before = second.copy()
    first[:] = 0
    assert np.array_equal(second, before)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_broken_image_fails_alone_and_its_neighbours_in_the_call_are_whole(
    number: float, tiny_float32: Model
) -> None:
    images = some(tiny_float32, *[(64, 64)] * 3)
    images[1][0][0, 3, 5] = number
    first, broken, third = decode(Decoder(tiny_float32, pixels_a_call=10**7), *images)
    assert isinstance(broken, BrokenImage)
    assert broken.step == 9
    for outcome, (latents, request) in ((first, images[0]), (third, images[2])):
        assert apart(picture(outcome), decode_upstream(tiny_float32, latents, request)) <= 1


def test_what_torch_refuses_fails_alone(tiny_float32: Model) -> None:
    images = some(tiny_float32, *[(64, 64)] * 5)
    model, calls = with_vae(tiny_float32, raise_at_mark)
    images[4][0][0, 0, 0] = 99
    outcomes = decode(Decoder(model, pixels_a_call=10**7), *images)
    assert isinstance(outcomes[4], DrawingFailed)
    assert isinstance(outcomes[4].__cause__, RuntimeError)
    assert calls == [5, 2, 3, 1, 2, 1, 1]
    for place in range(4):
        assert apart(picture(outcomes[place]), decode_upstream(tiny_float32, *images[place])) <= 1


def raise_at_mark(latents: torch.Tensor) -> None:
    if (latents > 50).any():
        raise RuntimeError("a shape that does not fit")


@pytest.mark.parametrize(
    "error",
    [torch.AcceleratorError("CUDA error: an illegal memory access"), RuntimeError("CUDA error: device-side assert")],
    ids=str,
)
def test_a_dead_device_is_raised(error: RuntimeError, tiny_float32: Model) -> None:
    def die(latents: torch.Tensor) -> None:
        raise error

    with pytest.raises(Fatal, match="the device is dead"):
        decode(Decoder(with_vae(tiny_float32, die)[0]), *some(tiny_float32, (64, 64), (64, 64)))


def short_of_memory(most_px: int) -> Callable[[torch.Tensor], None]:
    """A device with room for ``most_px`` pixels a call."""

    def accident(latents: torch.Tensor) -> None:
        batch, _, height, width = latents.shape
        if batch * height * width * 64 > most_px:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 139.81 GiB in all")

    return accident


def test_out_of_memory_halves_the_batch_until_it_fits(tiny_float32: Model) -> None:
    model, calls = with_vae(tiny_float32, short_of_memory(2 * 64 * 64))
    images = some(model, *[(64, 64)] * 5)
    outcomes = decode(Decoder(model, pixels_a_call=10**7), *images)
    assert calls == [5, 2, 3, 1, 2]
    for (latents, request), outcome in zip(images, outcomes, strict=True):
        assert apart(picture(outcome), decode_upstream(tiny_float32, latents, request)) <= 1


def test_one_that_does_not_fit_alone_is_decoded_in_tiles_and_looks_the_same(tiny_float32: Model) -> None:
    model, calls = with_vae(tiny_float32, short_of_memory(512 * 512))
    before = model.vae.tile_sample_min_size, model.vae.tile_latent_min_size
    ((latents, request),) = some(model, (809, 600))
    (outcome,) = decode(Decoder(model), (latents, request))
    whole = picture(decode(Decoder(tiny_float32), (latents, request))[0])
    assert calls == [1]
    assert picture(outcome).shape == (600, 809, 3)
    assert psnr_db(picture(outcome), whole) > 25
    assert not np.array_equal(picture(outcome), whole)
    assert (model.vae.tile_sample_min_size, model.vae.tile_latent_min_size) == before


def test_one_smaller_than_every_tile_is_exhausted_and_names_size_and_memory(tiny_float32: Model) -> None:
    model, calls = with_vae(tiny_float32, short_of_memory(0))
    (failed,) = decode(Decoder(model), *some(model, (100, 250)))
    assert isinstance(failed, Exhausted)
    assert (failed.width_px, failed.height_px) == (112, 256)
    assert "2.00 GiB" in str(failed)
    assert calls == [1]


SHORT_OF_ADDRESSES = """
import json, resource, sys
from pathlib import Path
import torch
from pipeline.decoder import Decoder
from pipeline.errors import Exhausted
from pipeline.model import load_model
from pipeline.noise import draw_noise
from pipeline.request import ImageRequest

torch.set_num_threads(1)
model = load_model(sys.argv[1], device="cpu", models_dir=Path("not-used"), dtype=torch.float32)
decoder, whole_calls, decode = Decoder(model), [], model.vae.decode
model.vae.decode = lambda *given, **named: whole_calls.append(1) or decode(*given, **named)

def outcome(side_px):
    request = ImageRequest(prompt="A fox", width=side_px, height=side_px, seed=1)
    decoder.submit(1, draw_noise(0, channels=16, height=side_px // 8, width=side_px // 8, dtype=model.dtype), request)
    ((_, found),) = decoder.collect(wait=True)
    return str(found) if isinstance(found, Exhausted) else list(found.shape)

def leave(extra_mib):
    used_kib = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize"))
    resource.setrlimit(resource.RLIMIT_AS, (used_kib * 1024 + extra_mib * 2**20, resource.RLIM_INFINITY))

outcome(64)
leave(int(sys.argv[2]))
found, tried = outcome(1536), len(whole_calls) - 1
leave(4000)
print(json.dumps([found, tried, outcome(64)]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and only Linux keeps to the limit")
@pytest.mark.parametrize(
    ("left_mib", "ending"),
    [(170, [1536, 1536, 3]), (4, "1536×1536 does not fit the device's memory: ")],
    ids=["tiles", "exhausted"],
)
def test_with_really_too_little_memory_it_is_tiles_and_with_almost_none_exhausted(
    left_mib: int, ending: object, tiny_folder: Path
) -> None:
    """In a process of its own. Whole, 1536² in float32 takes some 230 MiB of addresses, its tiles under 80."""
    command = [sys.executable, "-c", SHORT_OF_ADDRESSES, str(tiny_folder), str(left_mib)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    found, tried_whole, small_one_afterwards = json.loads(ended.stdout)
    assert found == ending or str(found).startswith(str(ending))
    assert tried_whole == 1
    assert small_one_afterwards == [64, 64, 3]


@pytest.mark.parametrize("model", DTYPES, indirect=True)
@pytest.mark.parametrize(
    ("size", "small"), [((512, 512), (256, 256)), ((728, 90), (253, 30)), ((65, 79), (65, 79)), ((2048, 64), (256, 8))]
)
def test_a_preview_is_small_and_of_the_images_shape(
    size: tuple[int, int], small: tuple[int, int], model: Model
) -> None:
    request = request_for(*size)
    pixels = Decoder(model).preview(latents_for(model, request), request)
    assert (pixels.shape, pixels.dtype) == ((small[1], small[0], 3), np.uint8)


def test_a_preview_decodes_no_more_than_it_shows(tiny_float32: Model) -> None:
    sizes: list[torch.Size] = []
    model, _ = with_vae(tiny_float32, lambda latents: sizes.append(latents.shape))
    request = request_for(2048, 1024)
    Decoder(model).preview(latents_for(model, request), request, longest_px=128)
    assert sizes == [(1, 16, 8, 16)]


def test_a_preview_of_a_small_image_is_the_image(tiny: Model) -> None:
    ((latents, request),) = some(tiny, (101, 67))
    assert np.array_equal(
        Decoder(tiny).preview(latents, request), picture(decode(Decoder(tiny), (latents, request))[0])
    )


@pytest.mark.parametrize("model", DTYPES, indirect=True)
def test_a_preview_resembles_the_finished_picture(model: Model) -> None:
    """Of latents as smooth as a picture's, for averaged noise is another picture; both blurred, in shades alone."""
    request = request_for(512, 384)
    coarse = torch.randn((1, 16, 3, 4), generator=torch.Generator().manual_seed(3))
    smooth = torch.nn.functional.interpolate(coarse, size=(48, 64), mode="bicubic").to(model.dtype)
    latents = OvisImagePipeline._pack_latents(smooth, 1, 16, 48, 64)
    preview = blurred(Decoder(model).preview(latents, request))
    finished = blurred(picture(decode(Decoder(model), (latents, request))[0]))
    assert alike(preview, finished) > 0.9
    assert alike(preview[:, ::-1], finished) < 0.3


def blurred(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(pixels).resize((32, 24), Image.Resampling.BOX))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_preview_of_what_is_broken_is_grey_and_no_error(number: float, tiny: Model) -> None:
    request = request_for(64, 64)
    pixels = Decoder(tiny).preview(torch.full_like(latents_for(tiny, request), number), request)
    assert (pixels == 128).all()


def test_a_preview_that_fails_has_its_class(tiny_float32: Model) -> None:
    model, _ = with_vae(tiny_float32, short_of_memory(0))
    request = request_for()
    with pytest.raises(Exhausted):
        Decoder(model).preview(latents_for(model, request), request)


def test_a_preview_takes_latents_in_float32_too(tiny: Model) -> None:
    request = request_for()
    latents = latents_for(tiny, request)
    assert np.array_equal(Decoder(tiny).preview(latents.float(), request), Decoder(tiny).preview(latents, request))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_pictures_come_from_another_stream_and_are_the_cpus(models_dir: Path, tiny_float32: Model) -> None:
    model = load_model("tiny", device="cuda", models_dir=models_dir, dtype=torch.float32)
    decoder, images = Decoder(model), some(model, *SIZES, *SIZES)
    outcomes: dict[int, Outcome] = {}
    for ticket, (latents, request) in enumerate(images):
        decoder.submit(ticket, latents + 0, request)
        outcomes |= dict(decoder.collect(wait=False))
    while ended := decoder.collect(wait=True):
        outcomes |= dict(ended)
    for ticket, (latents, request) in enumerate(images):
        (expected,) = decode(Decoder(tiny_float32), (latents.cpu(), request))
        assert psnr_db(picture(outcomes[ticket]), picture(expected)) > 40


def failing_allocation() -> None:
    torch.empty(2**46, dtype=torch.uint8)


def test_a_failed_allocation_of_this_torch_is_known_for_what_it_is() -> None:
    with pytest.raises(RuntimeError) as caught:
        failing_allocation()
    assert out_of_memory(caught.value)
    failure = classed(caught.value, 96, 64)
    assert isinstance(failure, Exhausted)
    assert str(2**46) in str(failure)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), Exhausted),
        (torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be"), Exhausted),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), Exhausted),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), Fatal),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"), Fatal),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), DrawingFailed),
        (RuntimeError(), DrawingFailed),
    ],
    ids=str,
)
def test_errors_of_torch_have_their_class(error: RuntimeError, kind: type[PipelineError]) -> None:
    failure = classed(error, 96, 64)
    assert type(failure) is kind
    assert failure.__cause__ is error


def test_an_error_that_is_kept_keeps_no_tensor(tiny_float32: Model) -> None:
    kept: list[weakref.ref[torch.Tensor]] = []

    def fail(latents: torch.Tensor) -> None:
        kept.append(weakref.ref(latents))
        raise RuntimeError("a shape that does not fit")

    (failed,) = decode(Decoder(with_vae(tiny_float32, fail)[0]), *some(tiny_float32, (64, 64)))
    assert isinstance(failed, DrawingFailed)
    assert kept[0]() is None
