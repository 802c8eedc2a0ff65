"""What the OpenAPI document says of ``/v1`` and FastAPI cannot know: bodies that are read elsewhere, and errors."""

from typing import Any

from pydantic import BaseModel, Field

from producer.api.documents import REF


class ErrorBody(BaseModel):
    """What is wrong, as OpenAI's clients read it."""

    message: str
    type: str
    param: str | None = Field(description="Which field, if it is one.")
    code: str | None


class ErrorDocument(BaseModel):
    """Every error under ``/v1``."""

    error: ErrorBody


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The errors that an endpoint may answer with; those of access and 503 are every endpoint's."""
    return {
        status: {
            "description": "Error",
            "content": {"application/json": {"schema": {"$ref": REF.format(model="ErrorDocument")}}},
        }
        for status in sorted({*statuses, 400, 401, 403, 429, 503})
    }


UPLOAD: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "purpose": {"const": "batch"},
                        "file": {"type": "string", "format": "binary", "description": "JSONL, 200 MB at most."},
                    },
                }
            }
        },
    }
}
