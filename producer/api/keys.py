"""The paths of API keys, for administrators: make one, list them, revoke one."""

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Response
from pydantic import BaseModel, Field

from producer.api import parameters
from producer.api.answers import PREFIX
from producer.api.bodies import JSON, KeyRequest, parse, read_document, validated
from producer.api.documents import body_of, problems
from producer.api.services import Admin
from producer.jobs.keys import Key, Keys

router = APIRouter(prefix=f"{PREFIX}/keys", tags=["keys"])


class NewKey(Key):
    """A key that was just made."""

    key: str = Field(description="The key itself. It is shown this once, and kept nowhere.")


class KeyList(BaseModel):
    """All keys, in the order in which they were made."""

    keys: list[Key]


@router.post("", status_code=201, openapi_extra=body_of({JSON: "KeyRequest"}), responses=problems(400, 409, 413, 415))
def create(
    body: Annotated[bytes, Depends(read_document)],
    here: Admin,
    response: Response,
    idempotency_key: parameters.Key = None,
) -> NewKey:
    """Make a key. The answer alone holds it."""
    wanted = validated(KeyRequest, parse(body))
    tenant, key_id = here.whose(wanted.tenant), parameters.id_by(idempotency_key, here.caller.tenant)
    record, key = Keys(here.database).create(tenant, wanted.name, wanted.scopes, key_id=key_id)
    response.headers.update({"Location": f"{PREFIX}/keys/{record.id}", "Cache-Control": "no-store"})
    return NewKey(**record.model_dump(), key=key)


@router.get("", responses=problems())
def keys(here: Admin) -> KeyList:
    """All keys, revoked ones too; none of them can be read again."""
    return KeyList(keys=Keys(here.database).list())


@router.delete("/{key_id}", responses=problems(404))
def revoke(key_id: UUID, here: Admin) -> Key:
    """Revoke a key: it opens nothing from now on, and stays listed. Revoking it twice is one revocation."""
    return Keys(here.database).revoke(key_id)
