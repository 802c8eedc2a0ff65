"""What drawing costs before it is drawn: GPU-seconds, and when it would be done.

From the speed that the live workers measured, and the work that has its turn before the last of this (``fairness``):
of whoever else waits, no more than its part while this is drawn. Without a measured speed from the model's arithmetic,
and the answer says which. Nobody knows what is handed in meanwhile. Of others a caller learns nothing but a time.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, NamedTuple

from pydantic import BaseModel, Field
from sqlalchemy import text

from producer.jobs.contract import DEFAULT_TENANT, Priority
from producer.jobs.postgres import Database

FLOP_A_MEGAPIXEL_STEP = 51.1e12 / 1.048576
"""Of the transformer, 2 a multiply-add: 51.1 TFLOP for one forward of one branch at 1024x1024. Small images take up to
half as much again, since the prompt's 256 tokens are drawn along with each."""
ASSUMED_FLOP_S = 0.38 * 989e12
"""An NVIDIA H100 (989 TFLOP/s, dense bf16) at 38 %: what the 13.74 s for 1024x1024 and 50 steps in the model's paper
(arXiv 2511.22982) come to."""
ASSUMED = "one NVIDIA H100 at 38 % of its 989 TFLOP/s"
YEARS_S = 100 * 365 * 86400


class Basis(StrEnum):
    """What an estimate is made from."""

    MEASURED = "measured"
    ARITHMETIC = "arithmetic"


class Estimate(BaseModel):
    """What so much work costs on this farm, as it is now."""

    gpu_s: float = Field(description="Seconds on one of its devices.")
    finishes_at: datetime | None = Field(description="If it is submitted now; null: not in a hundred years.")
    by: Basis = Field(description="Whether the speed was measured by live workers, or follows from arithmetic.")
    workers: int = Field(description="That live now. Where none does, one is assumed to start at once.")
    speed: float = Field(description="Megapixel-steps a second of one worker, as this was reckoned with.")
    assumed: str | None = Field(description="Of arithmetic: which device.")


def estimate(
    database: Database,
    work: float,
    *,
    lease_s: float,
    tenant: str = DEFAULT_TENANT,
    weight: float = 1.0,
    priority: Priority = Priority.STANDARD,
) -> Estimate:
    """What ``work`` (megapixel-steps, ``ImageRequest.work``) costs as such a batch. Raises: Unavailable."""
    with database.begin() as connection:
        row = connection.execute(_NOW, {"lease": lease_s}).mappings().one()
        waiting = [Waiting(*found) for found in connection.execute(_WAITING)]
        tenant_weight = connection.scalar(_WEIGHT, {"tenant": tenant}) or 1.0
    batch = Waiting(priority.rank, tenant, tenant_weight, weight, work)
    return _estimate(work, until_drawn(batch, waiting), row)


class Waiting(NamedTuple):
    """The work of a lane that is queued or running, in megapixel-steps."""

    rank: int  # of its priority
    tenant: str
    tenant_weight: float
    weight: float  # of its batch
    work: float


def until_drawn(batch: Waiting, waiting: Sequence[Waiting]) -> float:
    """Megapixel-steps that are drawn until the ``batch`` is, itself with them, beside those that are ``waiting``."""
    of_rank = [lane for lane in waiting if lane.rank == batch.rank]
    own = [(lane.weight, lane.work) for lane in of_rank if lane.tenant == batch.tenant]
    total = _shared(batch.work, batch.weight, own)
    tenants: dict[str, tuple[float, float]] = {}
    for lane in of_rank:
        if lane.tenant != batch.tenant:
            tenants[lane.tenant] = (lane.tenant_weight, tenants.get(lane.tenant, (0.0, 0.0))[1] + lane.work)
    total = _shared(total, batch.tenant_weight, tenants.values())
    others = [other for other in Priority if other.rank != batch.rank]
    works = [(other.share, sum(lane.work for lane in waiting if lane.rank == other.rank)) for other in others]
    return _shared(total, Priority.of_rank(batch.rank).share, works)


def _shared(work: float, weight: float, others: Iterable[tuple[float, float]]) -> float:
    """What is drawn until ``work`` is, where each of ``others`` (weight, work) gets its part beside it."""
    return work + sum(min(theirs, work * their_weight / weight) for their_weight, theirs in others)


def _estimate(work: float, total: float, now: Any) -> Estimate:
    measured = now["speed"] is not None
    speed = now["speed"] if measured else ASSUMED_FLOP_S / FLOP_A_MEGAPIXEL_STEP
    wait_s = total / (speed * max(1, now["workers"]))
    return Estimate(
        gpu_s=work / speed,
        finishes_at=now["at"] + timedelta(seconds=wait_s) if wait_s < YEARS_S else None,
        by=Basis.MEASURED if measured else Basis.ARITHMETIC,
        workers=now["workers"],
        speed=speed,
        assumed=None if measured else ASSUMED,
    )


_NOW = text(
    """
    SELECT now() AS at, count(*) AS workers, avg(speed) FILTER (WHERE speed > 0) AS speed FROM workers
    WHERE stopped_at IS NULL AND heartbeat_at > now() - make_interval(secs => :lease)
    """
)

_WEIGHT = text("SELECT weight FROM tenants WHERE name = :tenant")

# Of a tenant's jobs those that were submitted alone are what is left when all batches' are taken away.
_WAITING = text(
    """
    WITH of_batches AS (
        SELECT priority, t.tenant, weight, paused, sum(pixel_steps) AS work
        FROM batches JOIN tallies AS t ON t.batch_id = batches.id
        WHERE finished_at IS NULL AND state IN ('queued', 'running')
        GROUP BY priority, t.tenant, batches.id
    ), alone AS (
        SELECT priority, tenant, sum(work) AS work FROM (
            SELECT priority, tenant, pixel_steps AS work FROM tallies
            WHERE batch_id IS NULL AND state IN ('queued', 'running')
            UNION ALL SELECT priority, tenant, -work FROM of_batches) AS both_kinds
        GROUP BY priority, tenant
    )
    SELECT priority, tenant, coalesce(tenants.weight, 1) AS tenant_weight, lanes.weight, work::float / 1e6 AS work
    FROM (SELECT priority, tenant, weight, work FROM of_batches WHERE NOT paused
          UNION ALL SELECT priority, tenant, 1, work FROM alone) AS lanes
    LEFT JOIN tenants ON tenants.name = lanes.tenant
    WHERE work > 0
    """
)
