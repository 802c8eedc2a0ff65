"""Trains the small model until it writes, and writes it as an ordinary checkpoint: ``python -m pipeline.tiny.train``.

The VAE learns first; then, on its latents, the transformer with the text encoder. Each stage keeps a state file under
``--state``; the same command goes on from there, whether it was stopped by ``--minutes`` or killed. After each stage
and every few minutes of the second the averaged weights are written to ``--out``, in bf16, by
``OvisImagePipeline.save_pretrained``, and a sheet of held-out prompts is drawn from that very folder by the engine.

Plan for one H200 with 16 cores, lent for half an hour in calls of at most ten minutes, some 27 of which compute. The
state (138 MB) stays on that machine's disk, so the calls follow each other at once; the folder (22 MB) comes back from
each, and ``--from`` goes on from it should the machine be lost. diffusers and pydantic must be brought along.

1. Trial, 2 minutes: ``--vae-steps 300 --flow-steps 300 --state trial --minutes 1``, then the same in another folder
   with ``--compile``. Read how many pictures a second there are and how long the device ``waited`` for them; look at
   the sheets. Torch's loader keeps its batches in /dev/shm: some 3 GB of it with 16 processes.
2. VAE, 5 minutes: 4,000 steps. What it blurs nothing later makes sharp: on the first sheets after it edges must be
   crisp, whatever the letters are.
3. Transformer, 18 minutes in two calls with ``--minutes 9``: choose ``--flow-steps`` by the speed that was seen, so
   that the rate has fallen to 0 when the time is over, and keep to that number. Seven million pictures are hoped for.

Invariants: with one seed, one number of steps and one device, a run that was stopped and resumed ends with the weights
of one that was not (to the bit on a CPU); a folder at ``--out`` is whole.
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from diffusers import AutoencoderKL, OvisImagePipeline
from torch import nn

from pipeline.quiet import quiet
from pipeline.schedule import Schedules
from pipeline.tiny import batches
from pipeline.tiny.architecture import Parts, new_parts
from pipeline.tiny.batches import Batch
from pipeline.tiny.checkpoint import scheduler
from pipeline.tiny.evaluate import GUIDANCE, SIZES_PX, STEPS, contact_sheet, draw, held_out_examples
from pipeline.tiny.learning import Clock, Stage
from pipeline.tiny.losses import encode, flow_loss, vae_loss
from pipeline.tiny.tokenizer import build_tokenizer

SEED = 20_261_123
VAE_STEPS, VAE_RATE, VAE_SIZE = 4_000, 5e-4, 96
FLOW_STEPS, FLOW_RATE, FLOW_SIZE = 18_000, 1e-3, 512  # sizes: pictures of 256×64 in a batch
STATISTICS_BATCHES, STATISTICS_SIZE = 16, 32
TOLD_EVERY_S, SAVED_EVERY_S, WRITTEN_EVERY_S = 10, 60, 180
SHEET_PICTURES = 16


@dataclass(frozen=True)
class Run:
    """How a run was asked for, and where."""

    state: Path
    out: Path
    device: torch.device
    clock: Clock
    size: float  # of batches, in shares of the usual
    processes: int
    compiled: bool
    sheet: int  # pictures of each size on a sheet


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns 0 when everything is trained, 3 when time was over before."""
    asked = _arguments(arguments)
    asked.state.mkdir(parents=True, exist_ok=True)
    device = torch.device(asked.device)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.benchmark = False  # nearly every batch has another size
    torch.manual_seed(SEED)
    parts = _parts(asked.start)
    clock = Clock(asked.minutes)
    run = Run(asked.state, asked.out, device, clock, asked.size, asked.processes, asked.compile, asked.sheet)
    vae = parts.vae if asked.start else train_vae(run, parts.vae, asked.vae_steps)
    if vae is None:
        return 3
    return 0 if train_flow(run, replace(parts, vae=vae), asked.flow_steps) else 3


def train_vae(run: Run, vae: AutoencoderKL, steps: int) -> AutoencoderKL | None:
    """The finished VAE, with its latents' statistics in its config; trained now if that is not done. None: no time."""
    finished = run.state / "vae"
    if not finished.exists():
        stage = Stage(nn.ModuleDict({"vae": vae}), steps=steps, rate=VAE_RATE, seed=SEED, device=run.device)
        if run.compiled:
            vae.encoder.compile(dynamic=True)
            vae.decoder.compile(dynamic=True)
        if not _train(run, "vae", stage, partial(vae_loss, vae), max(1, round(VAE_SIZE * run.size))):
            return None
        stage.use_average()
        _measure(run, vae)
        unfinished = run.state / "vae.unfinished"
        vae.save_pretrained(unfinished)
        unfinished.rename(finished)
    return _read_part(AutoencoderKL, finished)


def train_flow(run: Run, parts: Parts, steps: int) -> bool:
    """Train transformer and text encoder on the finished VAE's latents. False if time was over before."""
    vae = parts.vae.to(run.device).eval().requires_grad_(False)
    learning = nn.ModuleDict({"transformer": parts.transformer, "text_encoder": parts.text_encoder})
    stage = Stage(learning, steps=steps, rate=FLOW_RATE, seed=SEED * 2, device=run.device)
    if run.compiled:
        parts.transformer.compile(dynamic=True)
    schedules = Schedules(scheduler())

    def loss(batch: Batch, generator: torch.Generator) -> torch.Tensor:
        latents = encode(vae, batch.pixels)
        return flow_loss(parts.transformer, parts.text_encoder, schedules, latents, batch, generator)

    def write() -> None:
        with stage.averaged():
            export(parts, run.out)
        if run.sheet:
            _draw_sheets(run, stage.step)

    done = _train(run, "flow", stage, loss, max(1, round(FLOW_SIZE * run.size)), write)
    write()
    return done


def export(parts: Parts, folder: Path) -> None:
    """Write the checkpoint: safetensors in bf16. What stood in ``folder`` before is replaced when it is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    with quiet():
        copies = {name: _halved(part) for name, part in vars(parts).items()}
        OvisImagePipeline(scheduler=scheduler(), tokenizer=build_tokenizer(), **copies).save_pretrained(unfinished)
    for path in (unfinished, *unfinished.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)  # mkdtemp's folders only their owner may read
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m pipeline.tiny.train", description="Train the small model.")
    parser.add_argument("--state", type=Path, default=Path("tiny-training"), help="where to go on from")
    parser.add_argument("--out", type=Path, default=Path("tiny-trained"), help="the checkpoint's folder")
    parser.add_argument(
        "--from", dest="start", type=Path, help="a folder of this command's: its VAE is kept, the rest learns on"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, help="save and stop after so many")
    parser.add_argument("--vae-steps", type=int, default=VAE_STEPS)
    parser.add_argument("--flow-steps", type=int, default=FLOW_STEPS)
    parser.add_argument("--size", type=float, default=1.0, help="of batches, in shares of the usual")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="that draw examples")
    parser.add_argument("--sheet", type=int, default=SHEET_PICTURES, help="pictures of each size to show; 0 for none")
    parser.add_argument("--compile", action="store_true", help="with torch.compile: slower to start, then faster")
    return parser.parse_args(arguments)


def _parts(start: Path | None) -> Parts:
    parts = new_parts()
    if start is None:
        return parts
    return Parts(**{name: _read_part(type(part), start / name) for name, part in vars(parts).items()})


def _read_part(kind: Any, folder: Path) -> Any:
    with quiet():
        return kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True)


def _train(
    run: Run,
    name: str,
    stage: Stage,
    loss: Callable[[Batch, torch.Generator], torch.Tensor],
    size: int,
    write: Callable[[], None] | None = None,
) -> bool:
    """Take ``stage`` on until it is done or time is over, and save it. True if it is done."""
    path = run.state / f"{name}.pt"
    stage.resume(path)
    progress = _Progress(name, stage)
    for batch in _timed(batches.load(f"{SEED} {name}", size, stage.step, stage.steps, run.processes), progress):
        value = stage.learn(partial(_in_bf16, run.device, loss, batch.to(run.device)))
        progress.count(len(batch.pixels))
        if run.clock.due(f"{name} told", TOLD_EVERY_S) or stage.done:
            progress.tell(value.item())
        if run.clock.due(f"{name} saved", SAVED_EVERY_S):
            stage.save(path)
        if write and run.clock.due(f"{name} written", WRITTEN_EVERY_S):
            write()
        if run.clock.over:
            break
    stage.save(path)
    return stage.done


def _in_bf16(
    device: torch.device,
    loss: Callable[[Batch, torch.Generator], torch.Tensor],
    batch: Batch,
    generator: torch.Generator,
) -> torch.Tensor:
    """On a GPU alone: most CPUs are slower in bf16."""
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        return loss(batch, generator)


@torch.no_grad()
def _measure(run: Run, vae: AutoencoderKL) -> None:
    """Note the latents' mean and spread in the VAE's config: the transformer then sees a mean of 0, a spread of 1."""
    loaded = batches.load(
        f"{SEED} statistics", max(1, round(STATISTICS_SIZE * run.size)), 0, STATISTICS_BATCHES, run.processes
    )
    means = torch.cat([encode(vae, batch.pixels.to(run.device)).flatten() for batch in loaded])
    vae.register_to_config(shift_factor=means.mean().item(), scaling_factor=1 / means.std().item())
    print(f"latents: mean {means.mean().item():.4f}, spread {means.std().item():.4f}", flush=True)


def _halved(part: Any) -> Any:
    """A copy in bf16, without whatever was compiled."""
    kind = type(part)
    copy = kind.from_config(part.config) if hasattr(kind, "from_config") else kind(part.config)
    copy.load_state_dict(part.state_dict())
    return copy.to(torch.bfloat16)


def _draw_sheets(run: Run, step: int) -> None:
    """Draw held-out prompts from the folder that was just written, as any checkpoint is drawn."""
    for width_px, height_px in SIZES_PX:
        examples = held_out_examples(width_px, height_px, run.sheet)
        pictures = draw(
            run.out, examples, (width_px, height_px), steps=STEPS, guidance=GUIDANCE, device=str(run.device)
        )
        contact_sheet(pictures).save(run.state / f"sheet-{step:06}-{width_px}x{height_px}.png")


class _Progress:
    """Lines for whoever watches: how far, how fast, and how long the device waited for pictures."""

    def __init__(self, name: str, stage: Stage) -> None:
        self._name = name
        self._stage = stage
        self._start = monotonic()
        self._pictures = 0
        self.waited_s = 0.0

    def count(self, pictures: int) -> None:
        self._pictures += pictures

    def tell(self, loss: float) -> None:
        spent_s = monotonic() - self._start
        print(
            f"{self._name} step {self._stage.step} of {self._stage.steps}: loss {loss:.4f}, "
            f"{self._pictures / spent_s:.0f} pictures a second, waited {self.waited_s / spent_s:.0%} for them",
            flush=True,
        )
        self._start, self._pictures, self.waited_s = monotonic(), 0, 0.0


def _timed(loaded: Iterator[Batch], progress: _Progress) -> Iterator[Batch]:
    while True:
        before = monotonic()
        for batch in islice(loaded, 1):
            progress.waited_s += monotonic() - before
            yield batch
            break
        else:
            return


if __name__ == "__main__":
    sys.exit(main())
