"""The database's schema against this code's: bring it up, or say plainly that the two do not match."""

from functools import cache
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory

from producer.jobs.errors import SchemaMismatch
from producer.jobs.postgres import reaching
from producer.jobs.store import Store

MIGRATIONS = Path(__file__).parents[2] / "migrations"


def upgrade(database_url: str, revision: str = "head") -> None:
    """Bring the schema to ``revision``. Safe to run from several processes at once: the second waits.

    Raises:
        Unavailable: Postgres does not answer.
    """
    with reaching("Postgres"):
        command.upgrade(_config(database_url), revision)


def downgrade(database_url: str, revision: str = "base") -> None:
    """Take the schema back to ``revision``. Drops what later revisions added, data included."""
    with reaching("Postgres"):
        command.downgrade(_config(database_url), revision)


@cache
def head() -> str:
    """The revision that this code was written for."""
    revision = ScriptDirectory.from_config(_config("")).get_current_head()
    if revision is None:
        raise SchemaMismatch(f"{MIGRATIONS} holds no migration: this installation is incomplete")
    return revision


def check(database_url: str) -> None:
    """Return if the schema is exactly this code's.

    Raises:
        SchemaMismatch: it is behind or ahead; the message says what to run.
        Unavailable: Postgres does not answer.
    """
    store = Store.at(database_url, connections=1)
    try:
        compare(store.schema_revision())
    finally:
        store.close()


def compare(current: str | None) -> None:
    """Return if ``current``, the database's revision, is this code's. Raises: SchemaMismatch."""
    if current == head():
        return
    known = {script.revision for script in ScriptDirectory.from_config(_config("")).walk_revisions()}
    if current is None or current in known:
        raise SchemaMismatch(
            f"the database's schema is {current or 'empty'}, behind this code ({head()}): run `ovis-batch migrate`"
        )
    raise SchemaMismatch(
        f"the database's schema is {current}, which this code ({head()}) does not know: "
        "it is ahead; update ovis-batch on this machine"
    )


def _config(database_url: str) -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["database_url"] = database_url
    return config
