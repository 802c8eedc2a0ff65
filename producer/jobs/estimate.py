"""What drawing costs before it is drawn: GPU-seconds, and when it would be done.

From the speed that the live workers measured and the work that is before it in the queue; without a measured one from
the model's arithmetic, and the answer says which. The backlog counts as a whole, whoever's it is and however urgent,
since nobody knows what is handed in meanwhile: of its owner a caller learns nothing but a time.
"""

from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, Field
from sqlalchemy import text

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


def estimate(database: Database, work: float, *, lease_s: float) -> Estimate:
    """What ``work`` (megapixel-steps, ``ImageRequest.work``) costs. Raises: Unavailable."""
    with database.begin() as connection:
        row = connection.execute(_NOW, {"lease": lease_s}).mappings().one()
    return _estimate(work, row)


def _estimate(work: float, now: Any) -> Estimate:
    measured = now["speed"] is not None
    speed = now["speed"] if measured else ASSUMED_FLOP_S / FLOP_A_MEGAPIXEL_STEP
    wait_s = (now["backlog"] + work) / (speed * max(1, now["workers"]))
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
    SELECT now() AS at, live.workers, live.speed,
           ((SELECT coalesce(sum(pixel_steps), 0) FROM tallies
             WHERE batch_id IS NULL AND state IN ('queued', 'running'))
            - (SELECT coalesce(sum(pixel_steps), 0) FROM tallies
               WHERE batch_id IN (SELECT id FROM batches WHERE paused AND finished_at IS NULL)
                 AND state IN ('queued', 'running')))::float / 1e6 AS backlog
    FROM (SELECT count(*) AS workers, avg(speed) FILTER (WHERE speed > 0) AS speed FROM workers
          WHERE stopped_at IS NULL AND heartbeat_at > now() - make_interval(secs => :lease)) AS live
    """
)
