"""``/v1/models``: what the farm's workers draw with.

Whichever worker is free draws a job, whatever its model. So a request may name a model only while there is no other:
else somebody would be given another model's picture under the name of the one that was asked for.
"""

from collections.abc import Collection
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel

from producer.api.errors import Fault, Invalid
from producer.api.openai.documents import errors
from producer.api.services import Here
from producer.jobs import models
from producer.jobs.models import ModelNotFound, Models
from producer.jobs.postgres import Database

router = APIRouter(prefix="/v1/models", tags=["openai"])


def promised(name: str, database: Database) -> None:
    """Return if a job that is submitted now is drawn with this model, as far as anybody knows.

    Raises:
        ModelNotFound
        Invalid: there are others too.
    """
    names = [model.name for model in Models(database).all()]
    if name not in names:
        raise ModelNotFound(name, names)
    if len(names) > 1:
        raise Invalid([Fault(field="model", message=unpromised(names))])


def unpromised(names: Collection[str]) -> str:
    """Why one of these models, several, cannot be asked for."""
    return (
        f"this farm draws with several models at the moment ({', '.join(names)}) and cannot promise one: leave it out"
    )


class ModelObject(BaseModel):
    """A model by the name that workers give it."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "ovis-batch"

    @classmethod
    def of(cls, model: models.Model) -> "ModelObject":
        return cls(id=model.name, created=int(model.since.timestamp()))


class ModelObjects(BaseModel):
    """All of them: there is no second page."""

    object: Literal["list"] = "list"
    data: list[ModelObject]


@router.get("", responses=errors())
def all_models(here: Here) -> ModelObjects:
    """The models of the workers that live; if none does, of the one seen last."""
    return ModelObjects(data=[ModelObject.of(model) for model in Models(here.database).all()])


@router.get("/{name:path}", responses=errors(404))
def one_model(name: str, here: Here) -> ModelObject:
    """One model. Its name may hold slashes."""
    return ModelObject.of(Models(here.database).model(name))
