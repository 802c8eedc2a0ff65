"""``/v1/models``: what the farm's workers draw with."""

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel

from producer.api.openai.documents import errors
from producer.api.services import Here
from producer.jobs import models
from producer.jobs.models import Models

router = APIRouter(prefix="/v1/models", tags=["openai"])


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
