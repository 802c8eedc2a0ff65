"""Hosts whose clock is off, and whose disk is full."""

import time

from tests.chaos.doomed import Plan
from tests.chaos.farm import Farm
from tests.chaos.proxy import Kind, Trouble

HOUR_S = 3600.0
FILE_LIMIT_BYTES = 4_000
"""Of any file that the worker writes: less than an image of this cell, more than what it logs until then."""


# 13


def clock_off(farm: Farm) -> None:
    """Workers and a dispatcher, their clocks an hour ahead or behind; the times that count are the database's."""
    ahead, behind = (farm.strange_clock("worker", shift_s) for shift_s in (HOUR_S, -HOUR_S))
    dispatcher = farm.strange_clock("dispatcher", HOUR_S)
    farm.await_live(ahead, behind)
    fault = farm.fault("three clocks off by an hour")
    fault.times = 3
    first = farm.submit(60)
    farm.recovered(fault, lambda: farm.succeeded() > 0)
    farm.until_ended(first)
    drew = farm.count("SELECT count(DISTINCT worker_id) AS n FROM claims WHERE outcome = 'succeeded'")
    farm.expect(drew == 2, f"only {drew} of two workers with strange clocks drew")
    fault = farm.kill(ahead, "SIGKILL: a worker an hour ahead")
    second = farm.submit(60)
    farm.until_ended(second)
    farm.stop(dispatcher)
    farm.dispatcher()
    farm.until_ended(farm.submit(20))
    farm.expect(not farm.charged(), "a strange clock was charged as a failure")
    waits = farm.rows("SELECT max(waiting_s) AS most, min(waiting_s) AS least FROM jobs")[0]
    farm.expect(-1 < waits["least"] <= waits["most"] < HOUR_S / 2, f"times are not the database's: {waits}")


# 14


def disk_full(farm: Farm) -> None:
    """No room where drawn images are held, and none in the bucket for checkpoints: drawing goes on, nothing is lost."""
    proxy = farm.through_proxy("s3")
    farm.dispatcher()
    worker = farm.live_worker(Plan(step_s=0.02, noisy=True, file_limit_bytes=FILE_LIMIT_BYTES), checkpoint_steps=5)
    fault = farm.fault("the bucket has no room for checkpoints")
    full = Trouble(Kind.REFUSE, b"PUT /" + farm.settings.s3_bucket.encode() + b"/checkpoints/", status=b"507 Full")
    with proxy.doing(full):
        job_ids = farm.submit(10, steps=20)
        farm.recovered(fault, lambda: farm.ended(job_ids))
    fault.times = proxy.done
    before = proxy.done
    fault = farm.fault("no disk for drawn images while the bucket refuses them")
    with proxy.doing(Trouble(Kind.REFUSE, b"/images/")):
        job_ids = farm.submit(10, steps=5)
        time.sleep(max(3.0, 20 * farm.time_scale))
    fault.at, fault.times = time.time(), proxy.done - before
    farm.recovered(fault, lambda: farm.ended(job_ids))
    farm.expect(worker.alive, "a worker ended for want of room")
    farm.expect("stays in memory" in worker.log(), "the disk was not full")
    farm.expect(not farm.steps_wasted(), f"a full disk cost {farm.steps_wasted()} drawn steps")
    farm.expect(not farm.charged(), "a full disk was charged as a failure")
