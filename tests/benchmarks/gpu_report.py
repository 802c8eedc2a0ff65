"""What ``gpu_engine.py`` leaves: every row as data, a table, and the issue's targets beside what was measured."""

import json
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from pipeline.request import ImageRequest
from tests.benchmarks.beside_encoding import THREADS
from tests.benchmarks.gpu_measures import Facts
from tests.benchmarks.gpu_scene import (
    DIFFUSERS,
    DIFFUSERS_EAGER,
    ENGINE,
    ENGINE_EAGER,
    FP8,
    LOW_MEMORY,
    WHOLE_SCENE,
    Scene,
    size_of,
)


def row_name(who: str, requests: Sequence[ImageRequest], how: str) -> str:
    """By which ``targets`` finds a row."""
    return f"{who}; {size_of(requests)}; {how}"


@dataclass
class Report:
    """What was measured so far, kept in ``folder`` as ``rows.jsonl`` and ``table.md``."""

    folder: Path
    facts: Facts
    scene: Scene
    rows: list[Facts] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "rows.jsonl").write_text(_line(self.facts), encoding="utf-8")

    def add(self, row: Facts) -> None:
        if not self.facts["compiled"]:
            row = {_uncompiled(key): value for key, value in row.items()} | {"row": _uncompiled(row["row"])}
        self.rows.append(row)
        with (self.folder / "rows.jsonl").open("a", encoding="utf-8") as file:
            file.write(_line(row))
        (self.folder / "table.md").write_text(str(self), encoding="utf-8")
        print(f"{row['elapsed_s']:6.1f} s  {row['row']}: {_told(row)}", flush=True)

    def __str__(self) -> str:
        facts = "\n".join(f"- {name}: {value}" for name, value in self.facts.items())
        timed = [row for row in self.rows if "seconds_an_image" in row]
        others = "\n".join(f"- {row['row']}: {_told(row)}" for row in self.rows if row not in timed)
        parts = [facts, _table(timed, _COLUMNS), others]
        if self.scene == WHOLE_SCENE and self.facts["compiled"]:  # other figures say nothing of the targets
            parts.append(_table(targets(self.scene, self.rows), _TARGET_COLUMNS))
        return "\n\n".join(part for part in parts if part) + "\n"


def _uncompiled(name: str) -> str:
    """What a row is called when the stance of the compiler lets nothing be compiled."""
    return name.replace(ENGINE, "engine not compiled").replace(DIFFUSERS, "diffusers not compiled")


def _line(facts: Facts) -> str:
    return json.dumps(facts, ensure_ascii=False) + "\n"


def _told(row: Facts) -> str:
    if "reason" in row:
        return f"{row['status']}: {row['reason']}"
    hidden = ("row", "status", "elapsed_s", "took_s")
    return ", ".join(f"{key.replace('_', ' ')} {_said(value)}" for key, value in row.items() if key not in hidden)


def _said(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_said(inner)}" for key, inner in value.items()) + "}"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


_COLUMNS = {
    "row": "contestant; size; how",
    "images": "images",
    "seconds_an_image": "s an image",
    "share_of_ceiling": "of ceiling",
    "tflop_per_s": "TFLOP/s",
    "round_ms_median": "round, ms",
    "round_ms_mean": "mean",
    "round_ms_min": "min",
    "peak_gb": "peak GB",
    "first_round_s": "first round, s",
    "graphs_compiled": "graphs",
}
_TARGET_COLUMNS = {"target": "target", "wanted": "wanted", "measured": "measured", "reached": "reached"}


def _table(lines: Sequence[Facts], columns: dict[str, str]) -> str:
    if not lines:
        return ""
    head = ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
    return "\n".join(
        [*head, *("| " + " | ".join(_said(line.get(key, "")) for key in columns) + " |" for line in lines)]
    )


def targets(scene: Scene, measured: Sequence[Facts]) -> list[Facts]:
    """What issue 3 wants to reach on an H200, beside what was measured; ``open`` where a row is missing."""
    square, half, banner = ([request] for request in scene.singles)
    best = {size_of(some): _best(measured, some) for some in (square, half, banner, scene.mixed)}
    wanted = [
        _at_least("1024²: share of the ceiling", 0.75, best[size_of(square)].get("share_of_ceiling")),
        _at_least("512²: share of the ceiling", 0.70, best[size_of(half)].get("share_of_ceiling")),
        _at_least("mixed banners: share of the ceiling", 0.70, best[size_of(scene.mixed)].get("share_of_ceiling")),
        _at_most("1024²: seconds an image", 8.6, best[size_of(square)].get("seconds_an_image")),
        _at_most("512²: seconds an image", 2.45, best[size_of(half)].get("seconds_an_image")),
        _at_most("96×736: seconds an image", 1.0, best[size_of(banner)].get("seconds_an_image")),
        _at_least("1024²: times as fast as diffusers eager", 1.4, _gain(measured, square, DIFFUSERS_EAGER)),
    ]
    for some in (square, half, banner, scene.mixed):
        gain = _gain(measured, some, DIFFUSERS)
        wanted.append(_at_least(f"{size_of(some)}: times as fast as diffusers compiled", 1.0, gain))
    low = _find(measured, row_name(ENGINE_EAGER, square, LOW_MEMORY))
    beside = _find(measured, f"step beside {THREADS} threads")
    fp8 = _find(measured, row_name(ENGINE, square, f"{FP8}, one image"))
    return [
        *wanted,
        _at_most("fp8, 1024²: seconds an image", 6.0, fp8.get("seconds_an_image")),
        _at_most("low memory, 1024²: peak GB", 16.0, low.get("peak_gb_with_decoding")),
        _at_most("step beside encoding at its own pace: ratio", 1.02, beside.get("ratio_at_its_own_pace")),
        _at_most("step beside encoding without a pause: ratio", 1.02, beside.get("ratio_without_a_pause")),
    ]


def _best(measured: Sequence[Facts], requests: Sequence[ImageRequest]) -> Facts:
    """The engine's quickest row on such images in bf16, by seconds an image."""
    ours = [
        row for row in measured if row["row"].startswith(f"{ENGINE}; {size_of(requests)}; ") and FP8 not in row["row"]
    ]
    return min((row for row in ours if row["status"] == "done"), key=lambda row: row["seconds_an_image"], default={})


def _gain(measured: Sequence[Facts], requests: Sequence[ImageRequest], over: str) -> float | None:
    ours, theirs = _best(measured, requests), _find(measured, row_name(over, requests, "one by one"))
    return theirs["seconds_an_image"] / ours["seconds_an_image"] if ours and theirs else None


def _find(measured: Sequence[Facts], name: str) -> Facts:
    return next((row for row in measured if row["row"] == name and row["status"] == "done"), {})


def _at_least(target: str, limit: float, value: float | None) -> Facts:
    return _target(target, f"≥ {limit:g}", value, value is not None and value >= limit)


def _at_most(target: str, limit: float, value: float | None) -> Facts:
    return _target(target, f"≤ {limit:g}", value, value is not None and value <= limit)


def _target(target: str, wanted: str, value: float | None, reached: bool) -> Facts:
    verdict = "open" if value is None else "yes" if reached else "no"
    return {"target": target, "wanted": wanted, "measured": "" if value is None else value, "reached": verdict}


def machine(device: torch.device) -> Facts:
    """What a figure means nothing without."""
    facts: Facts = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "triton", "diffusers", "transformers")},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["device"] = f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"
        facts |= {"CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version(), "driver": _driver()}
    return facts


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not there"


def _driver() -> str:
    question = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
    try:
        return subprocess.run(question, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: {error}"
