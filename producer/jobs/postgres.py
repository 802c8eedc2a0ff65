"""The way to Postgres: pools, transactions, and which tenant's rows they see.

A ``Database`` sees every row, as the tables' owner. ``Database.of(tenant)`` sees and changes the rows of that tenant
alone, whatever the statement says: each of its transactions takes on a role that owns nothing (``ROLE``), and
Postgres's row-level security does the rest. The policies are in the migrations; a test walks all tables.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from sqlalchemy import Connection, Engine, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from producer.jobs.errors import Unavailable

ROLE = "ovis_tenant"
TENANT = "ovis.tenant"
"""The setting of a transaction by which the policies know whose rows it may see."""

CONNECT_ARGS: dict[str, Any] = {
    "connect_timeout": 5,
    "application_name": "ovis-batch",
    "keepalives_idle": 10,
    "keepalives_interval": 3,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,  # ms; keepalives say nothing while what was sent is not acknowledged
    # A frozen process must not hold a row for ever.
    "options": "-c timezone=UTC -c idle_in_transaction_session_timeout=10s -c statement_timeout=60s"
    " -c tcp_keepalives_idle=10 -c tcp_keepalives_interval=3 -c tcp_keepalives_count=3",
}


def connect(database_url: str, *, connections: int = 5, ping: bool = True) -> Engine:
    """A pool on the database. Connects on first use, with psycopg 3 whatever the address's scheme says.

    ``ping`` asks each connection whether it lives before it is used: a round trip that a caller who tries again
    anyway can do without.
    """
    url = make_url(database_url).set(drivername="postgresql+psycopg")
    return create_engine(
        url, pool_size=connections, max_overflow=0, pool_timeout=10, pool_pre_ping=ping, connect_args=CONNECT_ARGS
    )


AWAY = ("08", "25", "53", "57", "58")
"""Classes of SQLSTATE that pass by themselves and are no OperationalError for psycopg: no connection, a standby or a
broken transaction, no resources, an operator's doing, the system's fault."""


@contextmanager
def reaching(dependency: str) -> Iterator[None]:
    """Turns the ways in which Postgres can be away into ``Unavailable``."""
    try:
        yield
    except PoolTimeout as error:
        raise Unavailable(dependency, _first_line(error)) from error
    except DBAPIError as error:
        if error.connection_invalidated or _away(error.orig):
            raise Unavailable(dependency, _first_line(error)) from error
        raise
    except psycopg.Error as error:
        if _away(error):
            raise Unavailable(dependency, _first_line(error)) from error
        raise


def _away(error: BaseException | None) -> bool:
    if isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
        return True
    return isinstance(error, psycopg.Error) and (error.sqlstate or "").startswith(AWAY)


def _first_line(error: Exception) -> str:
    original = getattr(error, "orig", None) or error
    return str(original).strip().splitlines()[0] if str(original).strip() else type(original).__name__


class Database:
    """A pool on one database, and whose rows are seen through it. Safe to share between threads."""

    def __init__(self, engine: Engine, tenant: str | None = None) -> None:
        self._engine = engine
        self._autocommitting = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._tenant = tenant

    @classmethod
    def at(cls, database_url: str, *, connections: int = 5, ping: bool = True) -> "Database":
        return cls(connect(database_url, connections=connections, ping=ping))

    def of(self, tenant: str) -> "Database":
        """The same pool, through which only this tenant's rows are there."""
        return Database(self._engine, tenant)

    @property
    def tenant(self) -> str | None:
        """Whose rows alone are there; None: everybody's."""
        return self._tenant

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        """A transaction. Raises: Unavailable."""
        with reaching("Postgres"), self._engine.begin() as connection:
            if self._tenant is not None:
                connection.execute(_TAKE_ON, {"tenant": self._tenant})
            yield connection

    @contextmanager
    def single(self) -> Iterator[Connection]:
        """For one statement, which is its own transaction: one round trip instead of three. Raises: Unavailable."""
        if self._tenant is not None:
            with self.begin() as connection:
                yield connection
            return
        with reaching("Postgres"), self._autocommitting.connect() as connection:
            yield connection

    @contextmanager
    def listening(self, channel: str) -> Iterator["psycopg.Connection[Any]"]:
        """A connection of its own that hears what is notified on ``channel``. Raises: Unavailable."""
        url = self._engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
        with reaching("Postgres"), psycopg.connect(url, autocommit=True, **CONNECT_ARGS) as connection:
            connection.execute(f"LISTEN {channel}")
            yield connection


@contextmanager
def as_owner(connection: Connection) -> Iterator[None]:
    """For what Postgres refuses where row-level security holds: COPY, and an index for an operator that is not
    leakproof. What is copied must be the tenant's own, and a statement must name the tenant itself."""
    role = connection.scalar(text("SELECT current_user"))
    if role != ROLE:
        yield
        return
    connection.execute(text("RESET ROLE"))
    yield
    connection.execute(text(f"SET LOCAL ROLE {ROLE}"))


_TAKE_ON = text(f"SELECT set_config('role', '{ROLE}', true), set_config('{TENANT}', :tenant, true)")
