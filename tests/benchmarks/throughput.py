"""Jobs a second from submission to recorded, and rows a second of bulk submission: ``make bench``.

Real servers, a real dispatcher process and one real worker process; only the drawing costs nothing. Uploads switched
on and off, and the least that a worker could do (``bare_worker.py``), alternate, so that all are measured in one run on
the same, perhaps noisy, machine: the ratios say more than the rates. A round's clock runs from before the submission to
the last record; the process starts and one warm-up round are thrown away.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from producer.jobs import schema
from producer.jobs.contract import Submission
from producer.jobs.local import LocalFarm, local_servers
from producer.jobs.settings import Settings
from producer.jobs.storage import Storage
from producer.jobs.store import Store

BLANK_WORKER = Path(__file__).parents[1] / "blank_worker.py"
BARE_WORKER = Path(__file__).parent / "bare_worker.py"
KINDS = {
    "with uploads": (BLANK_WORKER,),
    "with uploads, bare loop": (BARE_WORKER,),
    "upload switched off": (BLANK_WORKER, "--no-upload"),
    "upload switched off, bare loop": (BARE_WORKER, "--no-upload"),
}
MAX_FAILURES = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1500, help="jobs in a round")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each kind")
    parser.add_argument("--rows", type=int, default=50_000, help="rows of a bulk submission")
    options = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory() as folder, local_servers(Settings(data_dir=Path(folder))) as farm:
        database_url = farm.settings.require("database_url")
        schema.upgrade(database_url)
        Storage(farm.settings).ensure_bucket()
        store = Store.at(database_url)
        _measure_jobs(farm, store, options.jobs, options.rounds)
        _measure_rows(store, options.rows, options.rounds)
        store.close()


def _measure_jobs(farm: LocalFarm, store: Store, jobs: int, rounds: int) -> None:
    environment = {**os.environ, "OVIS_DATA_DIR": str(farm.settings.data_dir)}
    farm.processes.start("dispatcher", [sys.executable, "-m", "producer.cli", "dispatcher"], environment)
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        for kind, measured in rates.items():
            with _worker(farm, environment, KINDS[kind]):
                _round(farm, store, jobs // 5)
                measured.append(jobs / _round(farm, store, jobs))
    for kind, measured in rates.items():
        print(
            f"{statistics.median(measured):6.0f} jobs/s {kind} (rounds: {', '.join(f'{r:.0f}' for r in measured)})",
            flush=True,
        )


@contextmanager
def _worker(farm: LocalFarm, environment: dict[str, str], words: tuple[str | Path, ...]) -> Iterator[None]:
    farm.processes.start("worker", [sys.executable, *words], environment)
    try:
        yield
    finally:
        farm.processes.stop("worker")


def _round(farm: LocalFarm, store: Store, jobs: int) -> float:
    """Seconds from the submission to the last record."""
    rows = [Submission(prompt=f"banner {number}", width=64, height=64) for number in range(jobs)]
    began = time.perf_counter()
    batch = store.submit_batch("round", rows, max_failures=MAX_FAILURES)
    while not (batch := store.batch(batch.id)).done:
        if ended := farm.processes.poll():
            raise SystemExit(f"{ended[0].name} ended:\n{ended[0].log_tail}")
        time.sleep(0.05)
    return time.perf_counter() - began


def _measure_rows(store: Store, rows: int, rounds: int) -> None:
    """Validation, the transaction and its commit are in the clock; reading a file is not."""
    prompt = 'A red banner for summer shoes with the text "SALE" in white'
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        batch = store.submit_batch(
            "rows",
            (Submission(prompt=f"{prompt} {n}", width=728, height=90) for n in range(rows)),
            max_failures=MAX_FAILURES,
        )
        seconds.append(time.perf_counter() - began)
        assert batch.jobs == rows
    middle = statistics.median(seconds)
    each = ", ".join(f"{second:.1f}" for second in seconds)
    print(f"{rows} rows submitted in {middle:.1f} s ({rows / middle:.0f} rows/s; rounds: {each} s)")


if __name__ == "__main__":
    main()
