"""Draws a few images by diffusers' own pipeline and by the engine, and compares.

For whoever has the real weights: it answers whether this engine, on this device, with these versions, draws what
OvisImagePipeline draws. Both use the same loaded weights.

    python -m pipeline.selftest --model PATH [--device cuda] [--json]

Exit codes: 0 all within tolerance, 1 some are not, 2 the checkpoint or the device is not there.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import OvisImagePipeline
from numpy.typing import NDArray

from pipeline.engine import Engine
from pipeline.errors import CheckpointError, DeviceError, PipelineError
from pipeline.model import Model, load_model
from pipeline.quiet import quiet
from pipeline.request import ImageRequest

TOLERATED_PSNR_DB = 40.0
"""In bf16 another shape of a forward means other kernels: the same image to the eye, not the same bits."""

REQUESTS = (
    ImageRequest(prompt='A shop window with the words "OPEN LATE"', width=512, height=512, steps=4, seed=1),
    ImageRequest(prompt="红色横幅,写着“全场五折”", width=728, height=90, steps=6, guidance=3.5, seed=2),
    ImageRequest(prompt="A lighthouse at dusk", width=300, height=250, steps=4, guidance=1.0, seed=3),
    ImageRequest(prompt='A poster that says "JAZZ"', negative_prompt="blurred", width=256, height=384, steps=5, seed=4),
)


@dataclass(frozen=True)
class Comparison:
    """One image, drawn twice."""

    width: int
    height: int
    steps: int
    guidance: float
    largest_difference: int  # of 255
    psnr_db: float | None  # None if the images are equal

    @property
    def passed(self) -> bool:
        return self.psnr_db is None or self.psnr_db >= TOLERATED_PSNR_DB


def compare(model: Model, requests: Sequence[ImageRequest] = REQUESTS) -> Iterator[Comparison]:
    """Draw ``requests`` together by the engine and one by one by diffusers."""
    drawn = _by_engine(model, requests)
    reference = _reference(model)
    for request, pixels in zip(requests, drawn, strict=True):
        difference = np.abs(pixels.astype(np.int16) - _by_diffusers(reference, request))
        error = float(np.mean(np.square(difference, dtype=np.float64)))
        yield Comparison(
            request.width,
            request.height,
            request.steps,
            request.guidance,
            largest_difference=int(difference.max()),
            psnr_db=round(float(10 * np.log10(255**2 / error)), 1) if error else None,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        model = load_model(
            options.model,
            device=options.device,
            revision=options.revision,
            offline=options.offline,
            models_dir=options.models_dir,
        )
    except (CheckpointError, DeviceError) as error:
        print(f"selftest: {error}", file=sys.stderr)
        return 2
    comparisons = list(compare(model))
    print(_as_json(model, comparisons) if options.json else _as_table(model, comparisons))
    return 0 if all(comparison.passed for comparison in comparisons) else 1


def _by_engine(model: Model, requests: Sequence[ImageRequest]) -> list[NDArray[np.uint8]]:
    engine = Engine(model, capacity=len(requests))
    tickets = [engine.submit(request) for request in requests]
    drawn: dict[int, NDArray[np.uint8]] = {}
    while not engine.idle:
        for finished in engine.step():
            if finished.image is None:
                raise finished.error or PipelineError("an image ended without a picture")
            drawn[finished.ticket] = finished.image.pixels
    return [drawn[ticket] for ticket in tickets]


def _reference(model: Model) -> OvisImagePipeline:
    with quiet():
        pipeline = OvisImagePipeline(
            scheduler=deepcopy(model.scheduler),
            vae=model.vae,
            text_encoder=model.text_encoder,
            tokenizer=model.tokenizer,
            transformer=model.transformer,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _by_diffusers(pipeline: OvisImagePipeline, request: ImageRequest) -> NDArray[np.int16]:
    width, height = request.drawn_size
    image = pipeline(
        request.prompt,
        negative_prompt=request.negative_prompt,
        guidance_scale=request.guidance,
        width=width,
        height=height,
        num_inference_steps=request.steps,
        generator=torch.Generator("cpu").manual_seed(request.seed or 0),
    ).images[0]
    left, top = (width - request.width) // 2, (height - request.height) // 2
    return np.asarray(image.crop((left, top, left + request.width, top + request.height)), dtype=np.int16)


def _as_table(model: Model, comparisons: Sequence[Comparison]) -> str:
    lines = [
        f"{model.name} at {model.revision} on {model.device}, {str(model.dtype).removeprefix('torch.')}",
        f"{'size':>11} {'steps':>6} {'guidance':>9} {'largest difference':>19} {'PSNR':>9}",
    ]
    for one in comparisons:
        size = f"{one.width}×{one.height}"
        psnr = "equal" if one.psnr_db is None else f"{one.psnr_db:.1f} dB"
        verdict = "" if one.passed else f"  below {TOLERATED_PSNR_DB:.0f} dB"
        lines.append(
            f"{size:>11} {one.steps:>6} {one.guidance:>9.1f} {one.largest_difference:>12} of 255 {psnr:>9}{verdict}"
        )
    good = sum(one.passed for one in comparisons)
    how = "to the bit" if all(one.psnr_db is None for one in comparisons) else f"to {TOLERATED_PSNR_DB:.0f} dB"
    return "\n".join([*lines, f"{good} of {len(comparisons)} images are what diffusers draws, {how}"])


def _as_json(model: Model, comparisons: Sequence[Comparison]) -> str:
    images = [{**asdict(one), "passed": one.passed} for one in comparisons]
    facts = {"model": model.name, "revision": model.revision, "device": str(model.device), "images": images}
    return json.dumps(facts, indent=2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="selftest", description="Compare the engine with diffusers' own pipeline.")
    parser.add_argument("--model", required=True, help="a checkpoint folder, a hub name, or 'tiny'")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--revision", help="pins a hub name; must match a folder's fingerprint")
    parser.add_argument("--offline", action="store_true", help="take a hub name from this machine's cache alone")
    parser.add_argument("--models-dir", type=Path, default=Path(".ovis/models"), help="where 'tiny' is kept")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


if __name__ == "__main__":
    sys.exit(main())
