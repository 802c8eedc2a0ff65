"""What the suite found: one result for each cell, printed as a table and written as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

REPORT_PATH = Path(__file__).with_name("report.json")
HEADINGS = ("cell", "", "jobs", "faults", "lost", "twice", "redrawn", "recovery", "took")


@dataclass(frozen=True)
class Result:
    """One cell. ``redrawn``: steps that were drawn more than once, of ``drawn``.

    ``recovery_s`` is the longest time from a fault until the jobs that it hit went on, as a clock shows it; divided by
    ``time_scale`` it is what the product's own durations would make of it, at most: what does not scale with them (a
    process that starts, a server that comes back, an image that is drawn alone) is enlarged by that.
    """

    cell: int
    name: str
    time_scale: float
    jobs: int
    faults: int
    lost: int
    recorded_twice: int
    drawn: int
    redrawn: int
    recovery_s: float
    took_s: float
    problems: list[str] = field(default_factory=list)
    by_kind: dict[str, int] = field(default_factory=dict)
    accepted: dict[str, str] = field(default_factory=dict)  # the ledger: id and the end that was promised

    def row(self) -> tuple[str, ...]:
        return (
            str(self.cell),
            self.name,
            str(self.jobs),
            str(self.faults),
            str(self.lost),
            str(self.recorded_twice),
            f"{self.redrawn} of {self.drawn}",
            f"{self.recovery_s:.1f} s" + ("" if self.time_scale == 1 else f" at {self.time_scale:g}"),
            f"{self.took_s:.0f} s",
        )


def table(results: Sequence[Result]) -> str:
    """A line for each cell, and each problem below."""
    rows = [HEADINGS, *(result.row() for result in results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    problems = [f"cell {result.cell}: {problem}" for result in results for problem in result.problems]
    return "\n".join([*lines, *problems])


def write(results: Sequence[Result], path: Path = REPORT_PATH) -> None:
    """The ledger of the whole run, as JSON."""
    path.write_text(json.dumps([asdict(result) for result in results], indent=1))
