"""What ``engine.py`` says of its measurements: medians, ratios, percentiles, and tables of them.

A ratio is taken inside each round, between plays that ran within the same minute, and the median is taken of these:
a machine that is slow for a while then slows both sides of a ratio.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median

import numpy as np
from numpy.typing import NDArray

Row = dict[str, str | int | float | list[float]]
"""One line of a table, and of the data beside it. Lists, the single rounds, are in the data alone."""


def ratio(rounds: Sequence[float], to: Sequence[float]) -> float:
    """The median of ``rounds`` over ``to``, round by round."""
    return median(one / other for one, other in zip(rounds, to, strict=True))


def percentile(values: Sequence[float], share: float) -> float:
    """Below which ``share`` percent of ``values`` are, linear between the two nearest."""
    return float(np.percentile(values, share))


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of the union of ``intervals`` (start, end): overlapping or nested ones count once."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def psnr_db(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """How alike two pictures of one shape are; infinite if they are equal."""
    error = float(np.mean(np.square(one.astype(np.float64) - other)))
    return float(10 * np.log10(255**2 / error)) if error else math.inf


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """``rows``, which all have the same keys, as lines under these keys: words to the left, numbers to the right."""
    columns = [key for key, value in rows[0].items() if not isinstance(value, list)]
    return "\n".join(map("  ".join, zip(*(_column(key, [row[key] for row in rows]) for key in columns), strict=True)))


def _column(key: str, values: Sequence[object]) -> list[str]:
    cells = [key.replace("_", " "), *map(_said, values)]
    width = max(map(len, cells))
    return [cell.ljust(width) if isinstance(values[0], str) else cell.rjust(width) for cell in cells]


def _said(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"
