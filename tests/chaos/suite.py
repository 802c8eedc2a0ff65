"""Runs one cell: its faults, then the same comparison for all."""

import math
import time
import traceback
from collections import Counter

from tests.chaos.cells import Cell
from tests.chaos.farm import Farm, Fault, farm
from tests.chaos.nursery import Nursery
from tests.chaos.report import Result
from tests.chaos.servers import Servers

SHORT_SCALE = 0.1
LONG_SCALE = 1.0
UNSCALED_S = 5.0
"""What a recovery may take besides, where durations are scaled down: processes start and images are drawn as ever."""
END_S = {False: 60.0, True: 900.0}
"""Until all jobs must have ended after the last fault, in the short form and in the long one."""


def run(cell: Cell, servers: Servers, nursery: Nursery, *, long: bool) -> Result:
    """Put one farm through ``cell``; whatever is not as it must be is among the result's problems."""
    began = time.monotonic()
    scale = LONG_SCALE if long and not cell.scaled_when_long else SHORT_SCALE
    with farm(servers, nursery, time_scale=scale, long=long) as under_fire:
        broken = _broken_off(cell, under_fire)
        findings, redrawn = under_fire.finish(END_S[long])
        drawn = len(under_fire.steps_drawn())
    faults = sum(fault.times for fault in under_fire.faults)
    problems = broken + findings.lost + findings.recorded_twice + findings.other + under_fire.broken
    problems += [problem for fault in under_fire.faults if (problem := _late(fault, cell, scale))]
    if not faults:
        problems.append("no fault was injected: nothing was tested")
    by_kind: Counter[str] = Counter()
    for fault in under_fire.faults:
        by_kind[fault.kind] += fault.times
    return Result(
        cell=cell.number,
        name=cell.name,
        time_scale=scale,
        jobs=len(under_fire.ledger.accepted),
        faults=faults,
        lost=len(findings.lost),
        recorded_twice=len(findings.recorded_twice),
        drawn=drawn,
        redrawn=redrawn,
        recovery_s=max(
            (fault.recovered_s or 0.0 for fault in under_fire.faults if fault.limit_s != math.inf), default=0.0
        ),
        took_s=time.monotonic() - began,
        problems=problems,
        by_kind=dict(by_kind),
        accepted={str(job_id): str(end.state) for job_id, end in under_fire.ledger.accepted.items()},
    )


def _broken_off(cell: Cell, under_fire: Farm) -> list[str]:
    try:
        cell.run(under_fire)
    except Exception:  # noqa: BLE001  # the other cells shall run, and this one's ledger be compared
        return [f"the cell broke off: {traceback.format_exc()}"]
    return []


def _late(fault: Fault, cell: Cell, scale: float) -> str | None:
    limit_s = fault.limit_s or cell.recovery_s
    allowed_s = limit_s * scale + (UNSCALED_S if scale < 1 else 0.0)
    if fault.recovered_s is None or fault.recovered_s <= allowed_s:
        return None
    return f"{fault.kind}: went on after {fault.recovered_s:.1f} s, {allowed_s:.1f} s at most"
