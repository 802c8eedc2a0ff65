"""The OpenAPI document where FastAPI cannot write it by itself: bodies that ``bodies`` reads, and problem documents."""

from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from producer.api.bodies import NDJSON, BatchSubmission, TenantWeight
from producer.api.problems import MEDIA_TYPE, Problem
from producer.jobs.contract import Submission

REF = "#/components/schemas/{model}"

DESCRIPTION = """Hand in prompts; every one ends as one image. Errors are problem documents (RFC 9457)."""


def body_of(schemas: dict[str, str]) -> dict[str, Any]:
    """The request body of an endpoint that reads it itself: the name of a schema for each media type."""
    content = {media_type: _content(media_type, name) for media_type, name in schemas.items()}
    return {"requestBody": {"required": True, "content": content}}


def _content(media_type: str, name: str) -> dict[str, Any]:
    schema: dict[str, Any] = {"$ref": REF.format(model=name)}
    if media_type == NDJSON:
        # A stream of lines is no JSON value; 3.1 has no words for it, so the item's schema is named in prose.
        return {"schema": {"type": "string", "description": f"One {name} a line."}}
    return {"schema": schema}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The problem documents that an endpoint may answer with; 503 is every endpoint's."""
    return {
        status: {"description": "Problem", "content": {MEDIA_TYPE: {"schema": {"$ref": REF.format(model="Problem")}}}}
        for status in (*statuses, 503)
    }


def complete(app: FastAPI) -> None:
    """Let ``app`` describe itself with the schemas that only ``body_of`` and ``problems`` name."""
    plain = app.openapi

    def described() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = plain()
            _, extra = models_json_schema(
                [
                    (Submission, "validation"),
                    (BatchSubmission, "validation"),
                    (TenantWeight, "validation"),
                    (Problem, "serialization"),
                ],
                ref_template=REF,
            )
            document.setdefault("components", {}).setdefault("schemas", {}).update(extra["$defs"])
        return plain()

    app.openapi = described  # type: ignore[method-assign]  # FastAPI's documented way
