"""Attention inside each of many sequences that lie one after the other, by the way that is fastest on the device.

All ways are exact and give the same numbers up to rounding. On a CPU there is one; on CUDA several are measured when
the worker starts (``measure``), with equal and with mixed lengths, for no way wins both.

Shapes: queries, keys and values [T, H, d] of all sequences, T the sum of their lengths; the answer is [T, H · d].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate, groupby
from statistics import median
from time import perf_counter

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

EQUAL, MIXED = (4352, 4352), (532, 532, 788, 788, 1280, 1280, 1552)
"""Lengths to measure with: one guided image of 1024², and banners of several sizes."""
REPEATS = 5


@dataclass(frozen=True)
class Spans:
    """The sequences of a pack: ``lengths`` of each, in tokens."""

    lengths: tuple[int, ...]
    device: torch.device

    @property
    def are_equal(self) -> bool:
        return len(set(self.lengths)) == 1

    @cached_property
    def groups(self) -> list[tuple[int, int]]:
        """(sequences, length) of neighbours of equal length."""
        return [(len(list(same)), length) for length, same in groupby(self.lengths)]

    @cached_property
    def starts(self) -> torch.Tensor:
        """Where each sequence starts, and the end: [sequences + 1]."""
        return torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=self.device)


Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # queries, keys and values, each [T, H, d]
Way = Callable[[Heads, Spans], torch.Tensor]


def by_groups(heads: Heads, spans: Spans) -> torch.Tensor:
    """One call for each group of neighbours of equal length."""
    tokens = [sequences * length for sequences, length in spans.groups]
    groups = zip(spans.groups, *(torch.split(one, tokens) for one in heads), strict=True)
    return torch.cat([_of_equal_length(length, group) for (_, length), *group in groups])


def by_ragged_kernel(heads: Heads, spans: Spans) -> torch.Tensor:
    """One call for all of them: FlashAttention's kernel for ragged sequences. CUDA only, 16 bits only."""
    longest = max(spans.lengths)
    attended = varlen_attn(*heads, spans.starts, spans.starts, longest, longest)
    assert isinstance(attended, torch.Tensor)
    return attended.flatten(1)


class Attention:
    """Attends by the way that ``measure`` found; by groups before that."""

    def __init__(self) -> None:
        self._for_equal: Way = by_groups
        self._for_mixed: Way = by_groups

    def __call__(self, heads: Heads, spans: Spans) -> torch.Tensor:
        way = self._for_equal if spans.are_equal else self._for_mixed
        return way(heads, spans)

    def measure(self, heads: int, width: int, device: torch.device, dtype: torch.dtype) -> dict[str, dict[str, float]]:
        """Find the fastest ways on ``device`` for ``heads`` of ``width``; returns the milliseconds of each, by case.

        Does nothing on a device that has one way alone.
        """
        if device.type != "cuda":
            return {}
        equal, mixed = (_timed(spans, heads, width, dtype) for spans in (Spans(EQUAL, device), Spans(MIXED, device)))
        # cuDNN plans each shape anew, for which mixed lengths have too many shapes.
        mixed.pop("groups, cuDNN", None)
        ways = dict(_ways())
        self._for_equal, self._for_mixed = (ways[min(ms, key=ms.__getitem__)] for ms in (equal, mixed))
        return {"equal lengths": equal, "mixed lengths": mixed}


def _of_equal_length(length: int, heads: Sequence[torch.Tensor]) -> torch.Tensor:
    queries, keys, values = (torch.unflatten(one, 0, (-1, length)).transpose(1, 2) for one in heads)
    attended = scaled_dot_product_attention(queries, keys, values)  # [sequences, H, length, d]
    return attended.transpose(1, 2).flatten(2).flatten(0, 1)


def _ways() -> list[tuple[str, Way]]:
    return [
        ("groups", by_groups),
        ("groups, cuDNN", partial(_with_kernel, SDPBackend.CUDNN_ATTENTION)),
        ("groups, FlashAttention", partial(_with_kernel, SDPBackend.FLASH_ATTENTION)),
        ("ragged kernel", by_ragged_kernel),
    ]


def _with_kernel(kernel: SDPBackend, heads: Heads, spans: Spans) -> torch.Tensor:
    with sdpa_kernel(kernel):
        return by_groups(heads, spans)


def _timed(spans: Spans, heads: int, width: int, dtype: torch.dtype) -> dict[str, float]:
    """Milliseconds of each way that this device and this build of torch can go; the median of a few."""
    shape = (sum(spans.lengths), heads, width)
    queries, keys, values = (torch.randn(shape, device=spans.device, dtype=dtype) for _ in range(3))
    timed = {}
    for name, way in _ways():
        try:
            timed[name] = _milliseconds(partial(way, (queries, keys, values), spans), spans.device)
        except torch.AcceleratorError:
            raise  # the device is dead
        except RuntimeError:  # no kernel for this device, width or dtype
            continue
    return timed


def _milliseconds(act: Callable[[], torch.Tensor], device: torch.device) -> float:
    """The median of a few calls, each until the device is done."""
    taken = []
    for _ in range(1 + REPEATS):
        torch.cuda.synchronize(device)
        began = perf_counter()
        act()
        torch.cuda.synchronize(device)
        taken.append((perf_counter() - began) * 1000)
    return median(taken[1:])
