"""The paths of tenants: what each one's jobs weigh beside the others', and its limits."""

from typing import Annotated

from fastapi import APIRouter, Depends

from producer.api.answers import PREFIX, TenantList
from producer.api.bodies import JSON, TenantChange, parse, read_document, validated
from producer.api.documents import body_of, problems
from producer.api.parameters import TenantPath
from producer.api.services import Admin, Here
from producer.jobs.contract import Tenant

router = APIRouter(prefix=f"{PREFIX}/tenants", tags=["tenants"])


@router.get("", responses=problems())
def tenants(here: Here) -> TenantList:
    """The tenants that were given a weight or a limit; with a key that is no administrator's, its own alone.

    Others need not be known beforehand, weigh 1 and have no limit.
    """
    return TenantList(tenants=here.store.tenants())


@router.put("/{name}", openapi_extra=body_of({JSON: "TenantChange"}), responses=problems(400, 413, 415))
def change(name: TenantPath, body: Annotated[bytes, Depends(read_document)], here: Admin) -> Tenant:
    """Change a tenant's weight and limits, from now on and for what waits already. What is not named stays."""
    wanted = validated(TenantChange, parse(body))
    return here.store.set_tenant(name, wanted.model_dump(include=wanted.model_fields_set))
