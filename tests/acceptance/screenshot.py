"""Takes README's screenshot of a running farm: ``python tests/acceptance/screenshot.py URL OUTPUT.png [WIDTHxHEIGHT]``.

Needs a chromium on PATH (on Debian: apt-get install chromium). No test; ``make screenshot`` calls it.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
QUIET = (
    "--headless",
    "--disable-gpu",
    "--disable-quic",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
LIMIT_S = 60


def take(url: str, output: Path, size: str = "1280x1000") -> None:
    """Write what a browser shows at ``url``, once its pictures are there, to ``output``."""
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    if browser is None:
        raise SystemExit("no chromium on PATH: on Debian, apt-get install chromium")
    width, height = size.split("x")
    with tempfile.TemporaryDirectory() as profile:
        command = [
            browser,
            *QUIET,
            *(["--no-sandbox"] if os.geteuid() == 0 else []),  # chromium's sandbox refuses to run as root
            f"--user-data-dir={profile}",
            f"--window-size={width},{height}",
            "--timeout=4000",
            f"--screenshot={output.resolve()}",
            url,
        ]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    if ended.returncode or not output.is_file():
        raise SystemExit(f"{browser} took no picture of {url}:\n{ended.stderr[-2000:]}")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        raise SystemExit(__doc__)
    take(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
    print(sys.argv[2])
