"""The engine beside diffusers, on the same weights and the same requests: ``make bench-engine``.

Who draws (``contestants.py``):
    engine                          packed steps; images join and leave between two of them
    one by one                      OvisImagePipeline in a loop
    static batches                  OvisImagePipeline on the oldest request and all waiting ones of equal size, steps
                                    and guidance, up to as many as the engine's capacity
    static batches, 2 s wait        likewise, and a batch that is not full waits 2 s after its oldest request came

What is measured, and how:
    equal      images a second of a full queue of 256×256 images, 8 steps, guided
    mixed      likewise of banners of mixed sizes, steps and guidance (``banner_trace.py``)
    open       seconds from submission to image, when these banners come at random at 70 % and at 95 % of what
               "one by one" can draw, which is measured just before; the trace is played in real time
    memory     each in a process of its own. CPU: the peak of the resident set while it draws (Linux: VmHWM, reset
               after loading). CUDA: the peak that torch allocated
    computing  the share of wall time in which torch's profiler sees the device compute: on a CPU at least one torch
               operator at work, on CUDA at least one kernel. The profiler slows everybody: no other figure is taken
               under it
    beside     the engine's step with 16 threads beside it that encode PNGs and upload them, against none
               (``beside_uploads.py``)

Prompts and decoding are in every clock but that of "beside". All contestants live in one process, take turns round by
round in changing order, and have the same torch threads; the warm-up is thrown away, after its pictures have been
compared. Ratios are medians of the ratios within single rounds. The prompts get other words in each heat, so that no
embedding is remembered from the last one; what else a warm engine keeps, it keeps.
"""

import argparse
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import count
from math import isfinite
from pathlib import Path
from statistics import fmean, median

import torch

from pipeline.engine import CAPACITY
from pipeline.model import Model, load_model
from pipeline.request import ImageRequest
from tests.benchmarks.banner_trace import Banner, at_once, read_trace, reworded, spread
from tests.benchmarks.beside_uploads import UPLOADERS, steps_beside_uploads
from tests.benchmarks.contestants import Contestant, PackedSteps, Pixels, Played, StaticBatches, play
from tests.benchmarks.figures import Row, percentile, psnr_db, ratio, table
from tests.benchmarks.footprint import computing_share, forget_peak_mib, peak_mib

ENGINE, ONE_BY_ONE = "engine", "one by one"
BATCHES, WAITING_BATCHES = "static batches", "static batches, 2 s wait"
LOADS = (0.70, 0.95)
TOLERATED_PSNR_DB = 30.0
"""Parity is for the tests to prove. This catches who draws something else: another seed's picture."""
EQUAL = ImageRequest(prompt='A poster that says "JAZZ"', width=256, height=256, steps=8, seed=1)
_SIZE = f"{EQUAL.width}×{EQUAL.height}"
PARTS = ("equal", "mixed", "open", "memory", "computing", "beside")


@dataclass(frozen=True)
class Amounts:
    """How much is drawn, by each contestant. The trace is played in pieces, so that all take turns within it."""

    equal_images: int
    mixed_images: int
    rounds: int
    piece_images: int
    pieces: int
    memory_images: int
    computing_images: int
    beside_steps: int
    beside_rounds: int


QUICK = Amounts(
    equal_images=2,
    mixed_images=2,
    rounds=1,
    piece_images=2,
    pieces=1,
    memory_images=1,
    computing_images=1,
    beside_steps=2,
    beside_rounds=1,
)
USUAL = Amounts(
    equal_images=8,
    mixed_images=16,
    rounds=3,
    piece_images=22,
    pieces=2,
    memory_images=4,
    computing_images=4,
    beside_steps=5,
    beside_rounds=4,
)
LONG = Amounts(
    equal_images=16,
    mixed_images=40,
    rounds=5,
    piece_images=40,
    pieces=2,
    memory_images=16,
    computing_images=8,
    beside_steps=10,
    beside_rounds=10,
)


@dataclass(frozen=True)
class Setting:
    """What a process needs to draw as this run does; travels to the processes that measure memory."""

    model: str
    device: str
    dtype: str
    threads: int
    capacity: int
    models_dir: Path

    def load(self) -> Model:
        torch.set_num_threads(self.threads)
        dtype = {"bf16": torch.bfloat16, "float32": torch.float32}[self.dtype]
        return load_model(self.model, device=self.device, models_dir=self.models_dir, dtype=dtype)


@dataclass(frozen=True)
class Part:
    """One table, and how to read it."""

    title: str
    reading: str
    rows: list[Row]

    def __str__(self) -> str:
        return f"{self.title}\n{table(self.rows)}\n{self.reading}"


@dataclass(frozen=True)
class Lineup:
    """Who takes part, alive for the whole run, and the banners that all draw."""

    model: Model
    contestants: dict[str, Contestant]
    banners: list[Banner]
    heats: "count[int]"

    def named(self, *names: str) -> dict[str, Contestant]:
        return {name: self.contestants[name] for name in names}

    def requests(self, images: int) -> list[ImageRequest]:
        return [banner.request for banner in self.banners[:images]]


def main() -> None:
    options = _parser().parse_args()
    setting = Setting(
        options.model, options.device, options.dtype, options.threads, options.capacity, options.models_dir
    )
    facts = _facts(setting)
    print("\n".join(f"{name}: {value}" for name, value in facts.items()), flush=True)
    model = setting.load()
    contestants = {name: make(model, setting.capacity) for name, make in CONTESTANTS.items()}
    lineup = Lineup(model, contestants, read_trace(), count(1))
    parts, began = {}, time.perf_counter()
    for name, part in _measured(lineup, setting, options.amounts, options.only):
        took_s, began = time.perf_counter() - began, time.perf_counter()
        parts[name] = {**asdict(part), "took_s": took_s}
        print(f"\n{part} ({took_s:.0f} s)", flush=True)
        if options.json:  # after each part, so that a run that is cut short leaves what it has
            _write(options.json, {"facts": facts, "parts": parts})


def _write(path: Path, figures: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _measured(lineup: Lineup, setting: Setting, amounts: Amounts, wanted: Sequence[str]) -> Iterator[tuple[str, Part]]:
    measures: dict[str, Callable[[], Part]] = {
        "equal": lambda: measure_equal(lineup, amounts),
        "mixed": lambda: measure_mixed(lineup, amounts),
        "open": lambda: measure_open(lineup, amounts),
        "memory": lambda: measure_memory(setting, amounts),
        "computing": lambda: measure_computing(lineup, amounts),
        "beside": lambda: measure_beside(lineup.model, amounts),
    }
    yield "warm-up", warm_up(lineup, amounts)
    for name in wanted:
        yield name, measures[name]()


CONTESTANTS: dict[str, Callable[[Model, int], Contestant]] = {
    ENGINE: PackedSteps,
    ONE_BY_ONE: lambda model, _: StaticBatches(model, largest=1),
    BATCHES: lambda model, capacity: StaticBatches(model, largest=capacity),
    WAITING_BATCHES: lambda model, capacity: StaticBatches(model, largest=capacity, wait_s=2.0),
}


def warm_up(lineup: Lineup, amounts: Amounts) -> Part:
    """Everybody draws what is measured later, and the pictures are compared: nobody is quick by drawing less."""
    requests = [*_equals(2), *lineup.requests(amounts.mixed_images)]
    pictures = {
        name: play(contestant, at_once(requests)).pictures
        for name, contestant in lineup.named(ONE_BY_ONE, ENGINE, BATCHES).items()
    }
    alike = {name: _alike_db(pictures[ONE_BY_ONE], drawn) for name, drawn in pictures.items() if name != ONE_BY_ONE}
    if min(alike.values()) < TOLERATED_PSNR_DB:
        raise SystemExit(f"not the same pictures as {ONE_BY_ONE!r}, so nothing can be compared: {alike} dB")
    return Part(
        f"Warm-up: {len(requests)} images, thrown away",
        f"lowest PSNR of an image against {ONE_BY_ONE!r}",
        [
            {"contestant": name, "psnr_db": f"{worst:.1f}" if isfinite(worst) else "equal"}
            for name, worst in alike.items()
        ],
    )


def _alike_db(pictures: Sequence[Pixels], others: Sequence[Pixels]) -> float:
    return min(psnr_db(one, other) for one, other in zip(pictures, others, strict=True))


def measure_equal(lineup: Lineup, amounts: Amounts) -> Part:
    """Images a second when all requests are of one kind."""
    return Part(
        f"Equal work: {amounts.equal_images} images {_SIZE}, {EQUAL.steps} steps, guided; all there at once",
        _ROUNDS_READING.format(amounts.rounds),
        _race(lineup, _equals(amounts.equal_images), amounts.rounds),
    )


def measure_mixed(lineup: Lineup, amounts: Amounts) -> Part:
    """Images a second when hardly two requests are of one kind."""
    return Part(
        f"Mixed banners: the trace's first {amounts.mixed_images}; all there at once",
        _ROUNDS_READING.format(amounts.rounds),
        _race(lineup, lineup.requests(amounts.mixed_images), amounts.rounds),
    )


_ROUNDS_READING = "medians of {} rounds; ratio: images/s over that of 'one by one'; cpu_s: of all cores"


def _race(lineup: Lineup, requests: Sequence[ImageRequest], rounds: int) -> list[Row]:
    """Every round everybody draws all of ``requests``."""
    contestants = lineup.named(ENGINE, ONE_BY_ONE, BATCHES)
    plays: dict[str, list[Played]] = {name: [] for name in contestants}
    for number in range(rounds):
        arrivals = at_once(_reworded(requests, next(lineup.heats)))
        for name in _order(contestants, number):
            plays[name].append(play(contestants[name], arrivals))
    rates = {name: [len(requests) / played.wall_s for played in plays[name]] for name in contestants}
    return [
        {
            "contestant": name,
            "images_per_s": median(rates[name]),
            "ratio": ratio(rates[name], to=rates[ONE_BY_ONE]),
            "cpu_s_per_image": median(played.cpu_s for played in plays[name]) / len(requests),
            "rounds_images_per_s": rates[name],
        }
        for name in contestants
    ]


def _equals(images: int) -> list[ImageRequest]:
    """One kind, but each with a seed and a prompt of its own: a prompt that is shared would be encoded once."""
    return [reworded(EQUAL.model_copy(update={"seed": seed}), seed) for seed in range(images)]


def _reworded(requests: Sequence[ImageRequest], heat: int) -> list[ImageRequest]:
    return [reworded(request, heat) for request in requests]


def _order(names: Iterable[str], number: int) -> list[str]:
    """There and back: what drifts during a run then hits the first and the last alike."""
    return list(names)[:: -1 if number % 2 else 1]


def measure_open(lineup: Lineup, amounts: Amounts) -> Part:
    """Waiting times when requests come at random."""
    waits_s: dict[tuple[float, str], list[float]] = {}
    capacities: list[float] = []
    for number in range(amounts.pieces):
        piece = lineup.banners[number * amounts.piece_images : (number + 1) * amounts.piece_images]
        image_s = _seconds_an_image(lineup, piece)
        capacities.append(1 / image_s)
        for load in LOADS:
            heat = next(lineup.heats)
            for name in _order(lineup.contestants, number):
                played = _play_open(lineup.contestants[name], piece, image_s / load, heat)
                waits_s.setdefault((load, name), []).extend(played.waits_s)
    return Part(
        f"Open load: {amounts.pieces} × {amounts.piece_images} banners of the trace, in real time; {ONE_BY_ONE!r} "
        f"can draw {', '.join(f'{capacity:.2f}' for capacity in capacities)} images/s",
        "seconds from submission to image; ratios: over the better, by mean, of the two kinds of static batches",
        [
            row
            for load in LOADS
            for row in _waiting_rows(load, {name: waits_s[load, name] for name in lineup.contestants})
        ],
    )


def _seconds_an_image(lineup: Lineup, banners: Sequence[Banner]) -> float:
    requests = _reworded([banner.request for banner in banners], next(lineup.heats))
    return play(lineup.contestants[ONE_BY_ONE], at_once(requests)).wall_s / len(requests)


def _play_open(contestant: Contestant, banners: Sequence[Banner], mean_gap_s: float, heat: int) -> Played:
    return play(contestant, spread([Banner(one.gap, reworded(one.request, heat)) for one in banners], mean_gap_s))


def _waiting_rows(load: float, waits_s: dict[str, list[float]]) -> list[Row]:
    best = min((waits_s[BATCHES], waits_s[WAITING_BATCHES]), key=fmean)
    return [
        {
            "load": f"{load:.0%}",
            "contestant": name,
            "p50_s": percentile(waits, 50),
            "p95_s": percentile(waits, 95),
            "mean_s": fmean(waits),
            "p50_ratio": percentile(waits, 50) / percentile(best, 50),
            "p95_ratio": percentile(waits, 95) / percentile(best, 95),
            "waits_s": waits,
        }
        for name, waits in waits_s.items()
    ]


def measure_memory(setting: Setting, amounts: Amounts) -> Part:
    """The peak of each contestant, alone in a process that is started for it."""
    rows: list[Row] = []
    for name in (ENGINE, ONE_BY_ONE, BATCHES):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            loaded, peak = process.submit(_memory_mib, name, setting, amounts.memory_images).result()
        rows.append({"contestant": name, "loaded_mib": loaded, "peak_mib": peak, "drawing_mib": peak - loaded})
    what = "resident set of the process" if setting.device == "cpu" else "allocated by torch on the device"
    return Part(
        f"Memory: {amounts.memory_images} images {_SIZE}, then as many mixed banners",
        f"{what}: after loading, its peak while drawing, and the difference",
        rows,
    )


def _memory_mib(name: str, setting: Setting, images: int) -> tuple[float, float]:
    """(after loading, peak while drawing). Runs in a fresh process."""
    model = setting.load()
    contestant = CONTESTANTS[name](model, setting.capacity)
    loaded = forget_peak_mib(model.device)
    play(contestant, at_once(_equals(images)))
    play(contestant, at_once([banner.request for banner in read_trace()[:images]]))
    return loaded, peak_mib(model.device)


def measure_computing(lineup: Lineup, amounts: Amounts) -> Part:
    """How much of the time the device computes."""
    requests = lineup.requests(amounts.computing_images)
    rows: list[Row] = []
    for name, contestant in lineup.named(ENGINE, ONE_BY_ONE, BATCHES).items():
        share = computing_share(contestant, _reworded(requests, next(lineup.heats)), lineup.model.device)
        rows.append({"contestant": name, "computing_share": share})
    return Part(
        f"Computing: {len(requests)} mixed banners, all there at once, under torch's profiler",
        "share of wall time in which at least one torch operator (CPU) or kernel (CUDA) is at work",
        rows,
    )


def measure_beside(model: Model, amounts: Amounts) -> Part:
    """The engine's step alone, and with threads beside it that do what a worker's do."""
    measured = steps_beside_uploads(model, EQUAL, steps=amounts.beside_steps, rounds=amounts.beside_rounds)
    alone, *_ = measured.values()
    return Part(
        f"Step time beside {UPLOADERS} threads that encode PNGs and upload them: one image {_SIZE}, guided",
        f"medians of {amounts.beside_rounds} rounds of {amounts.beside_steps} steps; the switch interval is a worker's",
        [
            {
                "beside": name,
                "step_ms": median(rounds.step_s) * 1e3,
                "ratio": ratio(rounds.step_s, to=alone.step_s),
                "uploads_per_s": median(rounds.uploads_per_s),
                "rounds_step_s": rounds.step_s,
            }
            for name, rounds in measured.items()
        ],
    )


def _facts(setting: Setting) -> dict[str, str | int]:
    """What a figure means nothing without."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "hardware": _hardware(setting.device),
        "versions": ", ".join(
            [f"Python {platform.python_version()}"]
            + [f"{name} {version(name)}" for name in ("ovis-batch", "torch", "diffusers", "transformers")]
        ),
        "model": setting.model,
        "dtype": setting.dtype,
        "torch threads": setting.threads,
        "capacity": setting.capacity,
    }


def _hardware(device: str) -> str:
    cpu = platform.processor() or platform.machine()
    if platform.system() == "Linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), cpu)
    gpu = f"{torch.cuda.get_device_name(device)}; " if device.startswith("cuda") else ""
    return f"{gpu}{cpu}, {os.cpu_count()} cores"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    amounts = parser.add_mutually_exclusive_group()
    amounts.add_argument(
        "--quick",
        dest="amounts",
        action="store_const",
        const=QUICK,
        help="a minute, to see that it works: the figures mean nothing",
    )
    amounts.add_argument(
        "--long", dest="amounts", action="store_const", const=LONG, help="half an hour, for firm figures"
    )
    parser.set_defaults(amounts=USUAL)
    parser.add_argument("--dtype", choices=("bf16", "float32"), default="bf16")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--model", default="tiny", help="'tiny', a checkpoint folder, or a hub name")
    parser.add_argument("--models-dir", type=Path, default=Path(".ovis/models"), help="where 'tiny' is kept")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads of everybody")
    parser.add_argument("--capacity", type=int, default=CAPACITY, help="images at once, in engine and static batch")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures, rounds included, as data")
    return parser


if __name__ == "__main__":
    main()
