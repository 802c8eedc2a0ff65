"""The fourteen cells: each breaks one thing in all the ways that are known, on a farm of its own.

A cell gets a fresh ``Farm``, submits through it, does its faults through it, and returns; what was promised is
compared afterwards, in the same way for all. Each has a short form (``make test``) and a long one, which keeps the
product's own durations (``make chaos``).
"""

from collections.abc import Callable
from dataclasses import dataclass

from tests.chaos.cells import dispatching, drawing, hosts, kills, services
from tests.chaos.farm import Farm

RECOVERY_S = 30.0
LOST_MESSAGE_S = 5.0


@dataclass(frozen=True)
class Cell:
    """One row of the table. ``recovery_s``: within which the farm must go on after each fault."""

    number: int
    name: str
    run: Callable[[Farm], None]
    recovery_s: float = RECOVERY_S
    scaled_when_long: bool = False  # too many faults for the product's own durations


CELLS = [
    Cell(1, "workers killed at random", kills.at_random, scaled_when_long=True),
    Cell(2, "workers killed before their claim", kills.around_the_claim),
    Cell(3, "workers paused past their lease", kills.paused_past_the_lease),
    Cell(4, "Redis flushed, killed, emptied", services.redis_lost),
    Cell(5, "Postgres killed, cut off, full", services.postgres_lost),
    Cell(6, "bucket refusing, slow, cut, away", services.bucket_lost),
    Cell(7, "producer killed around its commit", dispatching.producer_killed),
    Cell(8, "dispatchers killed and frozen", dispatching.leader_lost),
    Cell(9, "a request that kills its process", drawing.poison),
    Cell(10, "device out of memory", drawing.out_of_memory),
    Cell(11, "SIGTERM, with and without grace", kills.told_to_stop),
    Cell(12, "rubbish and newer messages", dispatching.rubbish),
    Cell(13, "clocks off by an hour", hosts.clock_off),
    Cell(14, "disk full", hosts.disk_full),
]
