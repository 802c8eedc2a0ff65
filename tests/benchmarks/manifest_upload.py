"""How long a large manifest takes through HTTP, and what it costs the server in memory.

``python tests/benchmarks/manifest_upload.py [ROWS]``: a real API process with its own Redis, Postgres and S3, a CSV of
so many rows with a template and names, sent three times under other names; the first one warms up. Prints seconds from
the first byte sent to the answer, rows a second, the API's seconds of processor, and the peak of its
resident memory (VmHWM) afterwards.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import psutil

from producer.jobs import schema
from producer.jobs.local import local_servers
from producer.jobs.settings import Settings
from tests.farm import environment, free_port
from tests.waiting import until

ROUNDS = 3
OPTIONS = {
    "template": 'A {style} banner for {product} with the text "{headline}"',
    "file_name": "{sku}_{size}.png",
    "default": "size=leaderboard",
}


def write(path: Path, rows: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write("sku,style,product,headline,steps,price\n")
        for row in range(rows):
            file.write(
                f'SKU-{row:07d},watercolour,"shoes, model {row % 977}",Autumn sale {row % 31},{20 + row % 20},9.90\n'
            )


def peak_mb(pid: int) -> float:
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def cpu_s(pid: int) -> float:
    """Of the API alone: Postgres works beside it."""
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def measure(url: str, pid: int, path: Path, rows: int) -> None:
    print(f"{rows:,} rows, {path.stat().st_size / 1e6:.1f} MB of CSV; API at rest: {peak_mb(pid):.0f} MB")
    times = []
    with httpx.Client(base_url=url, timeout=900) as client:
        for number in range(ROUNDS):
            began, used_s = time.perf_counter(), cpu_s(pid)
            with path.open("rb") as file:
                params = OPTIONS | {"name": f"round {number}"}
                answer = client.post(
                    "/api/v1/batches", params=params, content=file, headers={"Content-Type": "text/csv"}
                )
            times.append(time.perf_counter() - began)
            assert answer.status_code == 201, answer.text
            assert answer.json()["jobs"] == rows
            print(
                f"  {times[-1]:.1f} s, {cpu_s(pid) - used_s:.1f} s of processor, peak {peak_mb(pid):.0f} MB", flush=True
            )
    taken = statistics.median(times[1:])
    print(f"median without the first: {taken:.1f} s, {rows / taken:,.0f} rows/s; API's peak RSS {peak_mb(pid):.0f} MB")


def main(rows: int) -> None:
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "manifest.csv"
        write(path, rows)
        with local_servers(Settings(data_dir=Path(folder) / "data", api_port=port)) as farm:
            schema.upgrade(farm.settings.require("database_url"))
            url = f"http://127.0.0.1:{port}"
            api = subprocess.Popen((sys.executable, "-m", "producer.cli", "api"), env=environment(farm.settings))
            try:
                until(lambda: _answers(url), timeout_s=120, pause_s=0.5)
                measure(url, api.pid, path, rows)
            finally:
                api.terminate()
                api.wait(60)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.HTTPError:
        return False


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50_000)
