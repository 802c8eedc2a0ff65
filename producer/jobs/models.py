"""The models that the farm draws with, as its workers tell."""

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import text

from producer.jobs.errors import NotFound
from producer.jobs.postgres import Database


class ModelNotFound(NotFound):
    """No worker draws with a model of this name."""

    def __init__(self, name: str, there_are: Sequence[str]) -> None:
        known = f": it draws with {', '.join(there_are)}" if there_are else ": no worker was seen yet"
        super().__init__("model", name + known)


class Model(NamedTuple):
    """A model by the name that workers give it, and since when the farm has it."""

    name: str
    since: datetime


class Models:
    """Those of the workers that live; if none does, those of the one seen last."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def all(self) -> list[Model]:
        """By name."""
        with self._database.single() as connection:
            return [Model(row.model, row.since) for row in connection.execute(_MODELS)]

    def model(self, name: str) -> Model:
        """Raises: ModelNotFound."""
        models = {model.name: model for model in self.all()}
        if name not in models:
            raise ModelNotFound(name, list(models))
        return models[name]


_MODELS = text(
    """
    WITH live AS (
        SELECT model FROM workers WHERE stopped_at IS NULL AND heartbeat_at > now() - interval '1 minute'
    )
    SELECT model, min(started_at) AS since FROM workers
    WHERE model IN (SELECT model FROM live)
       OR NOT EXISTS (SELECT FROM live) AND model = (SELECT model FROM workers ORDER BY heartbeat_at DESC LIMIT 1)
    GROUP BY model ORDER BY model
    """
)
