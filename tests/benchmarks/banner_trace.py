"""The mixed load of ``engine.py``: eighty banners and when they come, made once from a seed and committed.

Committed, so that every run, on every machine and at every commit, is asked for the same pictures in the same order.
The gaps between two arrivals are exponential, which makes the arrivals Poisson, and have no unit: a run scales them to
the machine that it finds. The sizes are the catalogue's of ``ovis-batch demo``. Half of the requests have its 8 steps
and half the default guidance, so that static batches find equals among those that wait; no prompt comes twice, so that
nobody gains by remembering one.

    python tests/benchmarks/banner_trace.py      writes the file again
"""

import csv
import io
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from pipeline.request import ImageRequest

PATH = Path(__file__).parent / "traces" / "banners.csv"
SEED = 20_251_123
LENGTH = 80

SIZES_PX = ((728, 90), (300, 250), (160, 600), (320, 100), (468, 64))
STEPS = (8, 8, 8, 6, 10, 12)
GUIDANCES = (5.0, 5.0, 5.0, 1.0, 3.5, 7.0)
THINGS = (
    "running shoes on warm sand, low sun",
    "black headphones on a marble table, soft studio light",
    "a mint green bicycle before a white wall, hard shadow",
    "a brass desk lamp over an open book, dark wood",
    "a clay teapot on a bamboo mat, morning light",
    "a leather bag on a rainy street, neon behind it",
    "一杯冒着热气的绿茶，竹席，清晨的光",
    "礼盒里的月饼，灯笼，深蓝色夜空和满月",
)
WORDS = (
    "SUMMER SALE",
    "HEAR MORE",
    "RIDE FREE",
    "50% OFF",
    "NEW IN",
    "LAST DAYS",
    "BUY TWO",
    "OPEN LATE",
    "新茶上市",
    "中秋快乐",
)


@dataclass(frozen=True)
class Banner:
    """One request of the trace. ``gap`` is what passes since the one before it came, 1 in the mean."""

    gap: float
    request: ImageRequest


@dataclass(frozen=True)
class Arrival:
    """A request that comes ``at_s`` seconds after the start. ``number`` counts from 0 in the order of coming."""

    number: int
    at_s: float
    request: ImageRequest


def make_trace() -> str:
    """The text of the committed file: a CSV with one request a row."""
    chance = random.Random(SEED)
    prompts = chance.sample(list(itertools.product(THINGS, WORDS)), LENGTH)
    file = io.StringIO()
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(("gap", "width", "height", "steps", "guidance", "seed", "prompt"))
    for thing, words in prompts:
        gap = f"{chance.expovariate(1.0):.4f}"
        size, steps, guidance = chance.choice(SIZES_PX), chance.choice(STEPS), chance.choice(GUIDANCES)
        rows.writerow(
            (gap, *size, steps, guidance, chance.randrange(2**32), f'A banner: {thing}, with the text "{words}"')
        )
    return file.getvalue()


def read_trace(path: Path = PATH) -> list[Banner]:
    """The committed requests, in the order in which they come. Raises InvalidRequest's cause for a bad row."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [Banner(float(row.pop("gap")), ImageRequest.model_validate_strings(row)) for row in rows]


def spread(banners: Sequence[Banner], mean_gap_s: float) -> list[Arrival]:
    """Arrivals whose own mean gap is exactly ``mean_gap_s``; the first comes at 0.

    Scaled by the mean of these very gaps: that of forty is easily 15 % off from 1, and a load that is meant to be 95 %
    would be more than the machine can draw.
    """
    gaps = [banner.gap for banner in banners[1:]]
    scale_s = mean_gap_s / fmean(gaps) if gaps else 0.0
    at_s = itertools.accumulate((gap * scale_s for gap in gaps), initial=0.0)
    return [Arrival(number, at, banner.request) for number, (at, banner) in enumerate(zip(at_s, banners, strict=True))]


def at_once(requests: Sequence[ImageRequest]) -> list[Arrival]:
    """All of them at 0: what a queue looks like that is always full."""
    return [Arrival(number, 0.0, request) for number, request in enumerate(requests)]


def reworded(request: ImageRequest, heat: int) -> ImageRequest:
    """The same picture with words of its own, so that a prompt's embedding is remembered from no earlier heat."""
    return request.model_copy(update={"prompt": f"{request.prompt} ({heat})"})


if __name__ == "__main__":
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(make_trace(), encoding="utf-8")
