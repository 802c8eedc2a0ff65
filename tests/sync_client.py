"""Writes the client that waits from the one that is awaited.

    python tests/sync_client.py

``producer/client/_async`` is written by hand; ``producer/client/_sync`` is what comes out, checked in. A test compares.
"""

import subprocess
import sys
from pathlib import Path

import unasync

CLIENT = Path(__file__).parents[1] / "producer" / "client"
RENAMED = {
    "AsyncAccess": "Access",
    "AsyncBatches": "Batches",
    "AsyncClient": "Client",
    "AsyncJobs": "Jobs",
    "AsyncPieces": "Pieces",
    "AsyncTransport": "Transport",
    "AsyncWebhooks": "Webhooks",
    "_async": "_sync",
    "aclose": "close",
    "aiter_bytes": "iter_bytes",
    "aiter_lines": "iter_lines",
    "aread": "read",
    "aside_async": "aside",
    "pause_async": "pause",
}
HEADER = "# Written by `make client` from {source}: change that one.\n"


def write(to: Path) -> None:
    """Fill the folder ``to`` with the client that waits."""
    sources = sorted((CLIENT / "_async").glob("*.py"))
    rule = unasync.Rule(f"{CLIENT}/_async/", f"{to}/", additional_replacements=RENAMED)
    unasync.unasync_files([str(source) for source in sources], [rule])
    for source in sources:
        written = to / source.name
        written.write_text(HEADER.format(source=source.relative_to(CLIENT.parents[1])) + written.read_text())
    _ruff("check", "--quiet", "--fix", "--select", "I", str(to))
    _ruff("format", "--quiet", str(to))


def _ruff(*words: str) -> None:
    """With the project's own rules, wherever the folder is."""
    rules = CLIENT.parents[1] / "pyproject.toml"
    subprocess.run((sys.executable, "-m", "ruff", words[0], "--config", str(rules), *words[1:]), check=True)


if __name__ == "__main__":
    write(CLIENT / "_sync")
