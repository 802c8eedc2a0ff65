"""All paths under ``/v1`` together, and the models that the OpenAPI document takes from elsewhere."""

from fastapi import APIRouter

from producer.api.documents import Described
from producer.api.openai import batches, files, images, models
from producer.api.openai.batches import BatchCreation
from producer.api.openai.documents import ErrorDocument
from producer.api.openai.generation import Generation

DESCRIBED: Described = (
    (Generation, "validation"),
    (BatchCreation, "validation"),
    (ErrorDocument, "serialization"),
)

router = APIRouter()
for part in (files.router, batches.router, images.router, models.router):
    router.include_router(part)
