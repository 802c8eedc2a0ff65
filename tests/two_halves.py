"""Runs the whole suite as two pytests side by side: ``make test``. Most of it is waiting, so that takes half the time.

What is not named here is in the first half. What the second prints comes when both have ended.
"""

import shutil
import subprocess
import sys
import tempfile

SECOND_HALF = ("tests/integration/producer", "tests/integration/worker")


def main() -> int:
    pytest = (sys.executable, "-m", "pytest")
    with tempfile.TemporaryFile() as printed:
        second = subprocess.Popen([*pytest, *SECOND_HALF], stdout=printed, stderr=subprocess.STDOUT)
        try:
            code = subprocess.call([*pytest, *(f"--ignore={folder}" for folder in SECOND_HALF)])
        finally:
            second_code = second.wait()  # Ctrl-C reaches both
            printed.seek(0)
            shutil.copyfileobj(printed, sys.stdout.buffer)
    return code or second_code


if __name__ == "__main__":
    sys.exit(main())
