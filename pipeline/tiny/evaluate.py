"""What a small model can: how many of the words it is asked for can be read, and whether the ground's colour is right.

``python -m pipeline.tiny.evaluate`` reads the true renderings alone, which says what the reader itself can; with a
checkpoint folder it has the engine draw the same prompts and reads those. It writes a table (Markdown) and a contact
sheet.

Invariants: prompts hold only strings that training never sees; prompts, seeds and sizes are the same on every run, so
that two checkpoints are asked the same.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pipeline.engine import Engine
from pipeline.model import load_model
from pipeline.request import ImageRequest
from pipeline.tiny.banner import COLOURS, Ground, GroundKind
from pipeline.tiny.data import Example, draw_example
from pipeline.tiny.drawing import render
from pipeline.tiny.reader import MissingReader, Reader, words_read

SIZES_PX = ((256, 64), (256, 256))
PROMPTS = 200
STEPS = 20
GUIDANCE = float(ImageRequest.model_fields["guidance"].default)  # what a newcomer gets
FRAME_PX = 4  # along the edge nothing but the ground is ever seen
SHEET_WIDTH_PX = 1024

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Score:
    """Of one size's pictures. Words are of all pictures together, the others are counts of pictures."""

    pictures: int
    words: int
    words_right: int
    whole_right: int  # pictures with all their words
    grounds_right: int

    def row(self) -> str:
        return (
            f"{self.words_right / self.words:.3f} ({self.words_right} of {self.words}) "
            f"| {self.whole_right / self.pictures:.3f} | {self.grounds_right / self.pictures:.3f}"
        )


def held_out_examples(width_px: int, height_px: int, count: int) -> list[Example]:
    """The first ``count`` of the prompts that every checkpoint is asked at this size."""
    return [
        draw_example(Random(f"held out {width_px}x{height_px} {number}"), width_px, height_px, of_held_out=True)
        for number in range(count)
    ]


def draw(
    folder: Path, examples: Sequence[Example], size_px: tuple[int, int], *, steps: int, guidance: float, device: str
) -> list[Pixels]:
    """What the checkpoint draws of ``examples``, number i with seed i.

    In bf16, but on a CPU in float32: most of them are many times slower in bf16.
    """
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = load_model(str(folder), device=device, models_dir=folder.parent, dtype=dtype)
    engine = Engine(model)
    drawn: dict[int, Pixels] = {}
    tickets: dict[int, int] = {}
    waiting = list(enumerate(examples))
    while waiting or not engine.idle:
        while waiting and len(tickets) - len(drawn) < engine.capacity:
            number, example = waiting.pop(0)
            tickets[engine.submit(_request(example, number, size_px, steps, guidance))] = number
        for finished in engine.step():
            if finished.error:
                raise finished.error
            assert finished.image is not None
            drawn[tickets[finished.ticket]] = finished.image.pixels
    return [drawn[number] for number in range(len(examples))]


def score(reader: Reader, examples: Sequence[Example], pictures: Sequence[Pixels]) -> Score:
    """Read ``pictures``, each of which should show the example of its place."""
    read = [
        words_read(example.banner.lines, reader.read(pixels))
        for example, pixels in zip(examples, pictures, strict=True)
    ]
    return Score(
        pictures=len(pictures),
        words=sum(of for _, of in read),
        words_right=sum(right for right, _ in read),
        whole_right=sum(right == of for right, of in read),
        grounds_right=sum(
            ground_is_right(example.banner.ground, pixels) for example, pixels in zip(examples, pictures, strict=True)
        ),
    )


def ground_is_right(ground: Ground, pixels: Pixels) -> bool:
    """Whether the picture's frame shows the ground's colours: a plain one's everywhere, each of two in a tenth of it.

    A pixel counts for the named colour that is nearest to it.
    """
    frame = np.ones(pixels.shape[:2], bool)
    frame[FRAME_PX:-FRAME_PX, FRAME_PX:-FRAME_PX] = False
    palette = np.array(list(COLOURS.values()), np.int32)
    nearest = ((pixels[frame][:, None].astype(np.int32) - palette) ** 2).sum(-1).argmin(-1)
    shares = [float((nearest == list(COLOURS).index(name)).mean()) for name in ground.colours]
    if ground.kind is GroundKind.GRADIENT:  # between its ends are colours of other names
        return min(shares) >= 0.1
    return min(shares) >= 0.1 and sum(shares) >= 0.9


def contact_sheet(pictures: Sequence[Pixels]) -> Image.Image:
    """Pictures of one size, row by row."""
    height, width, _ = pictures[0].shape
    columns = max(1, SHEET_WIDTH_PX // width)
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for number, pixels in enumerate(pictures):
        sheet.paste(Image.fromarray(pixels), (number % columns * width, number // columns * height))
    return sheet


def evaluate(
    sources: dict[str, Callable[[Sequence[Example], tuple[int, int]], list[Pixels]]], prompts: int, out: Path
) -> str:
    """The table of all ``sources`` (name to what draws), and in ``out`` a sheet of each and the table itself."""
    reader = Reader()
    out.mkdir(parents=True, exist_ok=True)
    rows = [
        "| pictures | size | words read | all words of a picture | ground's colour right |",
        "|---|---|---|---|---|",
    ]
    for name, source in sources.items():
        for width_px, height_px in SIZES_PX:
            examples = held_out_examples(width_px, height_px, prompts)
            pictures = source(examples, (width_px, height_px))
            rows.append(f"| {name} | {width_px}×{height_px} | {score(reader, examples, pictures).row()} |")
            contact_sheet(pictures[:32]).save(out / f"{name}-{width_px}x{height_px}.png")
            print(rows[-1], file=sys.stderr, flush=True)
    table = "\n".join(rows) + "\n"
    (out / "table.md").write_text(table, encoding="utf-8")
    return table


def true_renderings(examples: Sequence[Example], size_px: tuple[int, int]) -> list[Pixels]:
    """What the pictures should be."""
    return [render(example.banner, *size_px) for example in examples]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns 2 if the reader is not installed."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.tiny.evaluate", description="Score small models.")
    parser.add_argument("checkpoint", nargs="*", type=Path, help="a checkpoint folder; without one, only the truth")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="of each size")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("tiny-evaluation"), help="for the table and the sheets")
    asked = parser.parse_args(arguments)

    def drawing(folder: Path) -> Callable[[Sequence[Example], tuple[int, int]], list[Pixels]]:
        return lambda examples, size_px: draw(
            folder, examples, size_px, steps=asked.steps, guidance=asked.guidance, device=asked.device
        )

    sources = {"truth": true_renderings, **{folder.name: drawing(folder) for folder in asked.checkpoint}}
    try:
        print(evaluate(sources, asked.prompts, asked.out), end="")
    except MissingReader as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _request(example: Example, seed: int, size_px: tuple[int, int], steps: int, guidance: float) -> ImageRequest:
    width_px, height_px = size_px
    return ImageRequest(
        prompt=example.prompt, width=width_px, height=height_px, steps=steps, guidance=guidance, seed=seed
    )


if __name__ == "__main__":
    sys.exit(main())
