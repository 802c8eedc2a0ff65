"""Refuses a query parameter that a path does not have, or that is given twice and takes one value: a misspelt one,
ignored, would make another batch than was meant, or answer with every job there is; so would all values but the last.

Of the native API alone: what OpenAI's package sends under ``/v1`` is not this farm's to say.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from itertools import islice
from typing import Any

from fastapi import Request
from fastapi._compat import field_annotation_is_sequence
from fastapi.dependencies.models import Dependant
from fastapi.dependencies.utils import get_flat_params
from fastapi.exceptions import RequestValidationError

from producer.api.answers import PREFIX

FAULTS_MAX = 20
"""Names that are told."""


async def known(request: Request) -> None:
    """A dependency of every path. Raises: RequestValidationError: a fault for each name that is wrong."""
    route = request.scope["route"]
    if not request.query_params or not route.path.startswith(f"{PREFIX}/"):
        return
    names = names_of(route.dependant)
    given = Counter(name for name, _ in request.query_params.multi_items())
    found = (_fault(name, times, names) for name, times in given.items())
    if faults := list(islice(filter(None, found), FAULTS_MAX)):
        raise RequestValidationError(faults)


def names_of(dependant: Dependant) -> dict[str, bool]:
    """All query parameters of an endpoint: its own, its models' fields, and its dependencies'; whether each takes
    several values."""

    def each(part: Dependant) -> Iterator[tuple[str, bool]]:
        for field in get_flat_params(Dependant(query_params=part.query_params)):
            yield field.alias, field_annotation_is_sequence(field.field_info.annotation)
        for further in part.dependencies:
            yield from each(further)

    return dict(each(dependant))


def _fault(name: str, times: int, names: Mapping[str, bool]) -> dict[str, Any] | None:
    """What is wrong with a name that is given so many times, if anything is."""
    if name not in names:
        near = get_close_matches(name[:100], names, 1)
        kind, said = "unknown_parameter", "is no parameter here" + (f"; '{near[0]}' is one" if near else "")
    elif times > 1 and not names[name]:
        kind, said = "repeated_parameter", f"is given {times} times, and takes one value"
    else:
        return None
    return {"type": kind, "loc": ("query", name), "msg": said}
