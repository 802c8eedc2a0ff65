"""Alembic's entry: runs the migrations in one transaction, one process at a time.

The address comes from ``producer.jobs.schema`` (``ovis-batch migrate``), or, when the ``alembic`` command is run by
hand, from the settings.
"""

from alembic import context
from sqlalchemy import text

from producer.jobs.postgres import connect
from producer.jobs.settings import load_settings
from producer.jobs.table import metadata

LOCK = 0x0715  # any number; taken by nobody else in this database


def migrate() -> None:
    database_url = context.config.attributes.get("database_url") or load_settings().require("database_url")
    engine = connect(database_url)
    with engine.begin() as connection:
        connection.execute(text("SET LOCAL statement_timeout = 0"))  # a large farm's rows take minutes
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
        context.configure(connection=connection, target_metadata=metadata, transaction_per_migration=False)
        context.run_migrations()
    engine.dispose()


migrate()
