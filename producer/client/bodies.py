"""What is sent: requests as JSON, lines of a batch, and the options of a manifest."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import IO, Any, TypedDict
from uuid import UUID, uuid4

from pipeline.request import ImageRequest
from producer.client.models import Batch, Job

Request = ImageRequest | Mapping[str, Any]

JSON = "application/json"
NDJSON = "application/x-ndjson"
MEDIA_TYPES = {
    "csv": "text/csv",
    "jsonl": NDJSON,
    "ndjson": NDJSON,
    "xlsx": "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet",
}
PIECE_BYTES = 65_536
SPOOL_BYTES = 8 * 2**20
"""Of a batch on its way; what is beyond lies in a temporary file."""


class ManifestOptions(TypedDict, total=False):
    """How a manifest is read and submitted."""

    name: str
    """Of the batch; without it: of the file."""
    tenant: str
    weight: float
    template: str
    """A prompt with columns as fields: ``'A {style} banner for {product}'``."""
    vary: Sequence[str]
    """Lists of which each row is multiplied: ``["size=1024x1024,728x90", "seed=1..4"]``."""
    file_name: str
    """Names the images from columns: ``'{sku}_{size}.png'``."""
    default: Mapping[str, object] | Sequence[str]
    """What rows leave empty: ``{"steps": 20}`` or ``["steps=20"]``."""
    partial: bool
    """Submit the good rows though others are bad."""
    previews: int
    """Unfinished pictures of each image on its way, up to 3: ``Job.preview_url``."""
    deduplicate: bool
    """What was drawn already is not drawn again; of the answer it is ``counts["succeeded"]``, where with the key of an
    earlier call what was drawn since counts too."""


def fields_of(request: Request) -> dict[str, Any]:
    if isinstance(request, ImageRequest):
        return request.model_dump(mode="json", exclude_none=True)
    return dict(request)


def lines_of(requests: Iterable[Request]) -> Iterator[bytes]:
    """One request a line, in pieces of some 64 kB: a piece for each line costs more than the lines themselves."""
    piece = bytearray()
    for request in requests:
        piece += json.dumps(fields_of(request)).encode() + b"\n"
        if len(piece) >= PIECE_BYTES:
            yield bytes(piece)
            piece.clear()
    yield bytes(piece)


def document(value: object) -> dict[str, Any]:
    """What httpx needs to send ``value`` as JSON, lone surrogates and all: the farm refuses those in its own words."""
    return {"content": json.dumps(value).encode(), "headers": {"Content-Type": JSON}}


def given(**parameters: str | float | Sequence[str] | None) -> dict[str, str | float | Sequence[str]]:
    """Those that are not None, as httpx writes them into a query."""
    return {name: value for name, value in parameters.items() if value is not None}


def query_of(file_name: str, options: ManifestOptions) -> dict[str, Any]:
    """The options of a manifest as a query; a batch without a name has the file's."""
    query: dict[str, Any] = {"name": PurePath(file_name).stem or "manifest", **options}
    default = query.get("default")
    if isinstance(default, Mapping):
        query["default"] = [f"{field}={value}" for field, value in default.items()]
    return {name: value for name, value in query.items() if value is not None}


def media_type_of(file_name: str, kind: str | None) -> str:
    """By ``kind`` or the name's suffix. Raises: ValueError."""
    suffix = kind or PurePath(file_name).suffix.removeprefix(".")
    try:
        return MEDIA_TYPES[suffix.lower()]
    except KeyError:
        raise ValueError(f"{file_name or 'the file'} is none of {', '.join(MEDIA_TYPES)}: give its kind") from None


def named(file: IO[bytes]) -> str:
    """The file's own name, without its folder; '' if it has none."""
    name = getattr(file, "name", "")
    return PurePath(name).name if isinstance(name, str) else ""


def key_headers(key: str | None) -> dict[bytes, bytes]:
    """As bytes: a key that is no ASCII is the farm's to refuse, in its words. None: a new one."""
    return {b"Idempotency-Key": (str(uuid4()) if key is None else key).encode()}


def id_of(what: Job | Batch | UUID | str) -> str:
    return str(UUID(str(what.id if isinstance(what, Job | Batch) else what)))
