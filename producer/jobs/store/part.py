"""What the parts of the store have in common."""

from sqlalchemy import Connection, text

from producer.jobs.postgres import Database

CHANNEL = "ovis_jobs"
"""Notified by every commit that queues a job."""


class Part:
    """Statements over one database. Safe to share between threads."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self._begin = database.begin
        self._single = database.single


def notify(connection: Connection) -> None:
    """Wake the dispatcher when this commits."""
    connection.execute(text(f"SELECT pg_notify('{CHANNEL}', '')"))
