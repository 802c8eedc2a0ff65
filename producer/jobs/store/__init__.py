"""The jobs' way in SQL, from submission to record: a part for each who takes it. Other nouns of the farm have files of
their own beside this package; SQL stands in no other folder.

Invariants that the statements keep, whoever calls them and whatever dies in between:

- a job's state moves only along ``contract.TRANSITIONS``, each move one conditional UPDATE;
- every write of a worker is fenced by job, claim and worker: it changes the row or raises ``LostClaim``;
- a row of ``messages`` exists only for a queued job and its next claim;
- a lane that holds a queued job is open: whoever queues one writes the lane's row in the same transaction, and the
  leader closes a lane only after it has locked that row and looked again;
- no transaction is open while anything is drawn, encoded or uploaded; times are the database's clock.

Every method raises ``Unavailable`` when Postgres does not answer, and the caller may simply ask again. A claim may
then stand though its answer was lost: asked again it looks like a duplicate, and the worker's claim check
(``worker.lease``) gives the job back.
"""

from sqlalchemy import text

from producer.jobs.postgres import Database
from producer.jobs.store.changes import Changes
from producer.jobs.store.claims import Claims
from producer.jobs.store.leading import Leading
from producer.jobs.store.leftovers import Leftovers
from producer.jobs.store.submissions import Submissions


class Store(Submissions, Changes, Claims, Leading, Leftovers):
    """The farm's Postgres, as producers, workers and the dispatcher use it. Safe to share between threads."""

    @classmethod
    def at(cls, database_url: str, *, connections: int = 5, ping: bool = True) -> "Store":
        return cls(Database.at(database_url, connections=connections, ping=ping))

    def of(self, tenant: str) -> "Store":
        """The same, for which no other tenant's jobs are there."""
        return Store(self.database.of(tenant))

    def close(self) -> None:
        self.database.close()

    def ping(self) -> None:
        """Return if Postgres answers."""
        with self._single() as connection:
            connection.execute(text("SELECT 1"))

    def schema_revision(self) -> str | None:
        """The migration that the database is at, None if it is empty. ``schema.compare`` says whether it fits."""
        with self._single() as connection:
            if connection.scalar(text("SELECT to_regclass('alembic_version')")) is None:
                return None
            revision: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
            return revision
