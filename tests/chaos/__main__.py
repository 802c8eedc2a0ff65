"""``python -m tests.chaos [--long] [--cell N ...]``: run the cells, print the table, write the report.

Exit code 1 if anything was lost, recorded twice, late, or not as a cell expects it.
"""

import argparse
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from tests.chaos import report, suite
from tests.chaos.cells import CELLS
from tests.chaos.nursery import Nursery
from tests.chaos.servers import running


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--long", action="store_true", help="at least 1,000 kills; the product's own durations")
    parser.add_argument("--cell", type=int, action="append", help="this one alone; may be given again")
    parser.add_argument("--keep", action="store_true", help="leave logs and data where they are, and say where")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: nothing is left running
    folder = Path(tempfile.mkdtemp(prefix="ovis-chaos-"))
    nursery = Nursery()
    results = []
    try:
        with running(folder) as servers:
            for cell in CELLS:
                if not options.cell or cell.number in options.cell:
                    results.append(suite.run(cell, servers, nursery, long=options.long))
                    print(report.table(results[-1:]), flush=True)
    finally:
        nursery.stop()
        if options.keep:
            print(f"logs and data: {folder}")
        else:
            shutil.rmtree(folder)
    report.write(results)
    print(f"\n{report.table(results)}\n\nwritten to {report.REPORT_PATH}")
    return 1 if any(result.problems for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
