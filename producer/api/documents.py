"""The OpenAPI document where FastAPI cannot write it by itself: bodies that ``bodies`` reads, and problem documents."""

from collections.abc import Sequence
from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import models_json_schema

from producer.api.bodies import NDJSON, BatchPriority, BatchSubmission, KeyRequest, TenantChange, WebhookRequest
from producer.api.parameters import IDEMPOTENCY_KEY, KeyText
from producer.api.problems import MEDIA_TYPE, Problem
from producer.jobs.answers import KEPT_DAYS
from producer.jobs.contract import Submission

Described = Sequence[tuple[type[BaseModel], Literal["validation", "serialization"]]]
"""Models, and as what each is described."""
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
    """The problem documents that an endpoint may answer with; those of access, 422 (a query parameter that is none)
    and 503 are every endpoint's."""
    return {
        status: {"description": "Problem", "content": {MEDIA_TYPE: {"schema": {"$ref": REF.format(model="Problem")}}}}
        for status in sorted({*statuses, 401, 403, 422, 429, 503})
    }


def complete(app: FastAPI, more: Described = ()) -> None:
    """Let ``app`` describe itself with the schemas that only ``body_of`` and ``problems`` name, and ``more``."""
    plain = app.openapi

    def described() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = plain()
            _, extra = models_json_schema(
                [
                    (Submission, "validation"),
                    (BatchSubmission, "validation"),
                    (BatchPriority, "validation"),
                    (TenantChange, "validation"),
                    (KeyRequest, "validation"),
                    (WebhookRequest, "validation"),
                    (Problem, "serialization"),
                    *more,
                ],
                ref_template=REF,
            )
            components = document.setdefault("components", {})
            components.setdefault("schemas", {}).update(extra["$defs"])
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            document["security"] = [{"key": []}, {}]  # where no key is required, none need be given
            _offer_keys(document["paths"])
        return plain()

    app.openapi = described  # type: ignore[method-assign]  # FastAPI's documented way


def _offer_keys(paths: dict[str, Any]) -> None:
    """Every POST takes an idempotency key: where no endpoint asks for it, ``idempotency`` does."""
    key = {
        "name": IDEMPOTENCY_KEY,
        "in": "header",
        "description": "Asking again with the same key and request gives the first answer, and does nothing more. "
        f"A key is known for {KEPT_DAYS} days.",
        "schema": TypeAdapter(KeyText).json_schema(),
    }
    for operation in [path["post"] for path in paths.values() if "post" in path]:
        parameters = operation.setdefault("parameters", [])
        if all(known["name"] != IDEMPOTENCY_KEY for known in parameters):
            parameters.append(key)
