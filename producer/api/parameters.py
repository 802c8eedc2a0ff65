"""What stands beside a body when jobs are handed in: whose they are, what they weigh, and the idempotency key.

The key is the one of the IETF draft "The Idempotency-Key HTTP Header Field": the same key with the same submission is
answered as at first, with another it is refused. Keys are each tenant's own.
"""

import hashlib
import json
import re
from typing import Annotated
from uuid import UUID, uuid4, uuid5

from fastapi import Header, Path, Query, Request
from pydantic import AfterValidator, WithJsonSchema

from producer.jobs.answers import KEPT_DAYS
from producer.jobs.contract import SubmissionKey

IDEMPOTENCY_KEY = "Idempotency-Key"
WEIGHT_MIN, WEIGHT_MAX = 0.01, 100.0


def _spelled(pattern: str, otherwise: str) -> tuple[AfterValidator, WithJsonSchema]:
    """Text that is ``pattern`` from end to end; pydantic's own word for a mismatch is the bare pattern."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(otherwise)
        return text

    return AfterValidator(check), WithJsonSchema({"type": "string", "pattern": f"^{pattern}$"})


TenantName = Annotated[
    str,
    *_spelled(
        r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}",
        "must be 1 to 100 ASCII letters, digits, '-', '_' and '.', and begin with no '.'",
    ),
]
PREVIEWS_MAX = 3
KeyText = Annotated[str, *_spelled(r"[!-~]{1,255}", "must be 1 to 255 visible ASCII characters")]

Tenant = Annotated[
    TenantName | None,
    Query(description="Whose jobs these are; default: the caller's own. Another's only an administrator may name."),
]
TenantPath = Annotated[TenantName, Path()]
Weight = Annotated[
    float,
    Query(
        ge=WEIGHT_MIN,
        le=WEIGHT_MAX,
        allow_inf_nan=False,
        description="Of the batch's share beside the tenant's other batches.",
    ),
]
Previews = Annotated[
    int,
    Query(
        ge=0, le=PREVIEWS_MAX, description="Unfinished pictures of each image on its way; 'preview_url' leads there."
    ),
]
Key = Annotated[
    KeyText | None,
    Header(
        alias=IDEMPOTENCY_KEY,
        description="Asking again with the same key and submission gives the first answer, and submits nothing. "
        f"A key is known for {KEPT_DAYS} days.",
    ),
]


def id_by(key: str | None, tenant: str) -> UUID:
    """The id of what this tenant's caller makes: of one idempotency key it is always the same, so that nothing is made
    twice, whatever became of the first answer."""
    return uuid4() if key is None else uuid5(_MADE, f"{tenant} {key}")


_MADE = UUID("0d1f5b0e-3c55-4c1e-9a39-5f0a4cbb8a11")


class Fingerprint:
    """What a submission is known by: method, path, the parameters that count, and the body as received: its media
    type, and its bytes.

    ``tenant`` is none of them: it is part of the key.
    """

    def __init__(self, request: Request, **parameters: str | float | None) -> None:
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        asked = [request.method, request.scope["path"], media_type, parameters]
        self._digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode() + b"\n")

    def add(self, piece: bytes) -> None:
        """The body's next piece."""
        self._digest.update(piece)

    def hex(self) -> str:
        """To be asked when the whole body was added."""
        return self._digest.hexdigest()

    def with_key(self, key: str | None) -> SubmissionKey | None:
        """None without a key. To be asked when the whole body was added."""
        return SubmissionKey(key, self.hex()) if key is not None else None
