"""Refuses a query parameter that a path does not have: a misspelt one, ignored, would make another batch than was
meant, or answer with every job there is.

Of the native API alone: what OpenAI's package sends under ``/v1`` is not this farm's to say.
"""

from collections.abc import Iterator
from difflib import get_close_matches
from itertools import islice
from typing import Any

from fastapi import Request
from fastapi.dependencies.models import Dependant
from fastapi.dependencies.utils import get_flat_params
from fastapi.exceptions import RequestValidationError

from producer.api.answers import PREFIX

FAULTS_MAX = 20
"""Unknown names that are told."""


async def known(request: Request) -> None:
    """A dependency of every path. Raises: RequestValidationError: a fault for each unknown name."""
    route = request.scope["route"]
    if not request.query_params or not route.path.startswith(f"{PREFIX}/"):
        return
    names = names_of(route.dependant)
    unknown = (name for name in request.query_params if name not in names)
    if faults := [_fault(name, names) for name in islice(unknown, FAULTS_MAX)]:
        raise RequestValidationError(faults)


def names_of(dependant: Dependant) -> set[str]:
    """Of all query parameters of an endpoint: its own, its models' fields, and its dependencies'."""

    def each(part: Dependant) -> Iterator[str]:
        yield from (field.alias for field in get_flat_params(Dependant(query_params=part.query_params)))
        for further in part.dependencies:
            yield from each(further)

    return set(each(dependant))


def _fault(name: str, names: set[str]) -> dict[str, Any]:
    near = get_close_matches(name[:100], names, 1)
    said = "is no parameter here" + (f"; '{near[0]}' is one" if near else "")
    return {"type": "unknown_parameter", "loc": ("query", name), "msg": said}
