"""What a contestant of ``engine.py`` costs beside time: its peak memory, and the share of time the device is used."""

import os
import platform
import resource
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from torch.profiler import ProfilerActivity, profile

from pipeline.request import ImageRequest
from tests.benchmarks.banner_trace import at_once
from tests.benchmarks.contestants import Contestant, play
from tests.benchmarks.figures import covered


def forget_peak_mib(device: torch.device) -> float:
    """Memory in use now; from here on the peak counts. On a CPU that is the resident set of this process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 2**20
    if platform.system() == "Linux":
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak of the resident set
    return float(psutil.Process().memory_info().rss) / 2**20


def peak_mib(device: torch.device) -> float:
    """The peak since ``forget_peak_mib``; on a CPU that is not Linux's, since the process began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if platform.system() == "Linux":
        # Not getrusage: Linux hands its peak on from the process that started this one.
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS counts in bytes


def computing_share(contestant: Contestant, requests: Sequence[ImageRequest], device: torch.device) -> float:
    """The share of wall time in which at least one torch operator (CPU) or kernel (CUDA) is at work."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # else it writes a line at each start and stop
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity], acc_events=True) as profiler:
        wall_s = play(contestant, at_once(requests)).wall_s
    spans_us = [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if event.device_type.name == activity.name and not event.is_user_annotation
    ]
    return covered(spans_us) / 1e6 / wall_s
