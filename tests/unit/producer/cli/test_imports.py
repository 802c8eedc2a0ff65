"""Whoever submits, waits or asks for help does not wait for the farm's own libraries."""

import subprocess
import sys

PROGRAM = """
import sys
import producer.cli
heavy = {"sqlalchemy", "psycopg", "celery", "redis", "boto3", "fastapi", "uvicorn", "alembic", "prometheus_client"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""


def test_the_command_line_starts_without_the_libraries_of_the_farm() -> None:
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=120)
