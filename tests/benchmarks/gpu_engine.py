"""The engine on a GPU, at the full size, beside diffusers and beside what the device can do: one call, ten minutes.

    python -m tests.benchmarks.gpu_engine --out tests/benchmarks/results/DATE-DEVICE
    python -m tests.benchmarks.gpu_engine --small --device cpu --out FOLDER      every line of it, on a laptop

It needs what a worker needs to draw, and no checkpoint: the weights are random (``full_size.py``). What is drawn stands
in ``gpu_scene.py``, how steps are timed in ``timed_steps.py``, what else is measured in ``gpu_measures.py``, and what
the columns mean in ``results/README.md``.

Each row stands alone. One that fails is written with its reason, and the rest goes on; one that would not end within
``--minutes`` is written as skipped. Rows are written as they finish, the table is written again after each: a run that
is killed leaves what it has. The most important come first. What each takes on an H200 (``about_s``) is a guess, most
of it compiling:
    ceiling, attention, building      25 s
    1024², three ways                115 s   the engine compiles for one timestep in a step, diffusers for one size
    512², five ways                  100 s   both compile again, for several timesteps and for any size
    banners, mixed                    75 s
    the rest in bf16                  85 s
    low memory, fp8                  120 s   fp8 compiles both of the engine's again
"""

import argparse
import faulthandler
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.errors import Fatal
from pipeline.request import ImageRequest
from tests.benchmarks.beside_encoding import THREADS
from tests.benchmarks.gpu_measures import (
    Facts,
    measure_attention,
    measure_beside,
    measure_ceiling,
    measure_encoder,
    measure_fp8_parity,
    measure_low_memory,
    measure_overlap,
    measure_parity,
    measure_vae,
    shares,
)
from tests.benchmarks.gpu_report import Report, machine, row_name
from tests.benchmarks.gpu_scene import (
    BF16,
    DIFFUSERS,
    DIFFUSERS_EAGER,
    ENGINE,
    ENGINE_EAGER,
    FP8,
    LOW_MEMORY,
    SMALL_SCENE,
    WHOLE_SCENE,
    Bench,
    Scene,
    tokens,
)
from tests.benchmarks.timed_steps import diffusers_rounds, engine_rounds, synchronise

GRACE_S = 15.0  # after --minutes, until the process ends itself wherever it hangs


@dataclass(frozen=True)
class Row:
    """One measurement. ``about_s``: what it takes on an H200."""

    name: str
    about_s: float
    measure: Callable[[Bench], Facts]
    variant: str = BF16


def rows(scene: Scene) -> list[Row]:
    """All of them, the most important first."""
    square, half, banner = scene.singles
    mixed = scene.mixed
    two_squares = [square] * 2
    return [
        Row("matmul ceiling", 15, measure_ceiling),
        Row("ways of attention", 10, measure_attention),
        _engine_row([square], tokens(square), about_s=60),
        _diffusers_row([square], compiled=False, about_s=8),
        _diffusers_row([square], compiled=True, about_s=45),
        *_set_rows(half, scene.budgets, compiling_s=40),
        *_set_rows(banner, scene.budgets, compiling_s=5),
        *(_engine_row(mixed, budget, about_s=10) for budget in scene.budgets),
        _diffusers_row(mixed, compiled=True, about_s=12),
        _diffusers_row(mixed, compiled=False, about_s=12),
        _engine_row(two_squares, 2 * tokens(square), about_s=8),
        Row("parity after a few steps", 15, measure_parity),
        Row(f"step beside {THREADS} threads", 12, measure_beside),
        Row("step beside decoding", 5, measure_overlap),
        _engine_row([square], tokens(square), compiled=False, about_s=5),
        *(_engine_row(some, scene.budgets[0], compiled=False, about_s=6) for some in ([half], [banner], mixed)),
        Row("encoder", 5, measure_encoder),
        Row("VAE", 10, measure_vae),
        Row(row_name(ENGINE_EAGER, [square], LOW_MEMORY), 15, measure_low_memory, LOW_MEMORY),
        _engine_row([square], tokens(square), about_s=60, variant=FP8),
        Row("parity of fp8", 5, measure_fp8_parity, FP8),
        _engine_row(mixed, scene.budgets[0], about_s=40, variant=FP8),
    ]


def _set_rows(request: ImageRequest, budgets: Sequence[int], *, compiling_s: float) -> list[Row]:
    """One image alone, and as many equal ones as each budget holds."""
    full = [[request] * max(1, budget // tokens(request)) for budget in budgets]
    return [
        _engine_row(full[0], budgets[0], about_s=4 + compiling_s),
        _diffusers_row([request], compiled=False, about_s=4),
        _diffusers_row([request], compiled=True, about_s=4 + compiling_s),
        _engine_row([request], tokens(request), about_s=3),
        *(_engine_row(some, budget, about_s=6) for some, budget in list(zip(full, budgets, strict=True))[1:]),
    ]


def _engine_row(
    requests: list[ImageRequest], budget_tokens: int, *, about_s: float, compiled: bool = True, variant: str = BF16
) -> Row:
    if len(set(requests)) == 1 and not compiled:
        requests = requests[:1] * max(1, budget_tokens // tokens(requests[0]))

    def measure(bench: Bench) -> Facts:
        packed = bench.packed(compiled=compiled)
        return shares(bench, engine_rounds(bench.model, packed, requests, budget_tokens, bench.scene.amounts))

    how = f"{variant}, " if variant != BF16 else ""
    how += "one image" if len(requests) == 1 else f"{len(requests)} images, {budget_tokens} tokens"
    return Row(row_name(ENGINE if compiled else ENGINE_EAGER, requests, how), about_s, measure, variant)


def _diffusers_row(requests: list[ImageRequest], *, compiled: bool, about_s: float) -> Row:
    def measure(bench: Bench) -> Facts:
        pipeline = bench.pipeline(compiled=compiled)
        return shares(bench, diffusers_rounds(bench.model, pipeline, requests, bench.scene.amounts))

    return Row(row_name(DIFFUSERS if compiled else DIFFUSERS_EAGER, requests, "one by one"), about_s, measure)


def measure_all(bench: Bench, report: Report, began: float, limit_s: float) -> None:
    """Every row that the time allows. A dead device ends it."""
    dead = False
    for row in rows(bench.scene):
        elapsed_s = time.perf_counter() - began
        if dead or elapsed_s + row.about_s > limit_s:
            reason = (
                "the device is dead" if dead else f"takes some {row.about_s:.0f} s, and {limit_s:.0f} s are the limit"
            )
            report.add({"row": row.name, "status": "skipped", "reason": reason, "elapsed_s": elapsed_s})
            continue
        facts = _measured(bench, row)
        dead = bool(facts.pop("dead", False))
        now = time.perf_counter()
        report.add({"row": row.name, **facts, "took_s": now - began - elapsed_s, "elapsed_s": now - began})
        bench.tidy()


def _measured(bench: Bench, row: Row) -> Facts:
    """The row's facts, or why there are none."""
    compiled = _graphs_compiled()
    try:
        bench.load(row.variant)
        return {"status": "done", **row.measure(bench), "graphs_compiled": _graphs_compiled() - compiled}
    except Exception as error:  # noqa: BLE001 whatever it is, it is this row's alone
        said = f"{type(error).__name__}: {error}"
        if error.__cause__:
            said += f" ({type(error.__cause__).__name__}: {error.__cause__})"
        return {"status": "failed", "reason": " ".join(said.split())[:600], "dead": _is_fatal(error)}


def _is_fatal(error: Exception) -> bool:
    out_of_memory = isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)
    return isinstance(error, Fatal) or (isinstance(error, torch.AcceleratorError) and not out_of_memory)


def _graphs_compiled() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code, 1 if a row failed."""
    began = time.perf_counter()
    options = _parser().parse_args(arguments)
    device = torch.device(options.device)
    scene = SMALL_SCENE if options.small else WHOLE_SCENE
    limit_s = options.minutes * 60
    faulthandler.dump_traceback_later(limit_s + GRACE_S, exit=True, file=sys.__stderr__ or sys.stderr)
    compiling: AbstractContextManager[object] = nullcontext()
    if not options.compile:
        compiling = torch.compiler.set_stance("force_eager")
    try:
        # One process holds what several would: more variants of one function than torch keeps by default.
        with compiling, torch._dynamo.config.patch(recompile_limit=64):
            facts = {**machine(device), "model": scene.architecture.name, "compiled": options.compile}
            report = Report(options.out, facts, scene)
            measure_all(Bench(scene, device), report, began, limit_s)
    finally:
        faulthandler.cancel_dump_traceback_later()
    synchronise(device)
    print(f"\n{report}")
    return int(any(row["status"] == "failed" for row in report.rows))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0", help="cuda:0, cpu, ...")
    parser.add_argument("--small", action="store_true", help="a small model and small images; figures mean nothing")
    parser.add_argument(
        "--no-compile", dest="compile", action="store_false", help="what is to be compiled runs as it is written"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="no row is begun that would not end within these")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where rows.jsonl and table.md go")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
