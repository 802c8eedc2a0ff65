"""A producer installs no torch, so none of its doors may reach for it."""

import subprocess
import sys

PROGRAM = """
import sys
import producer.api, producer.client
heavy = {"torch", "diffusers", "transformers"} & set(sys.modules)
assert not heavy, heavy
"""

CLIENT_ALONE = """
import sys
import producer.client
other = {name for name in sys.modules if name.startswith("producer.") and not name.startswith("producer.client")}
assert not other, other
assert not {"sqlalchemy", "celery", "boto3", "fastapi"} & set(sys.modules)
"""


def run(program: str) -> None:
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_the_api_and_the_client_reach_no_torch() -> None:
    run(PROGRAM)


def test_the_client_reaches_nothing_of_the_server() -> None:
    run(CLIENT_ALONE)
