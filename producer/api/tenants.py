"""The paths of tenants: what each one's jobs weigh beside the others'."""

from typing import Annotated

from fastapi import APIRouter, Depends

from producer.api.answers import PREFIX, TenantList
from producer.api.bodies import JSON, TenantWeight, parse, read_document, validated
from producer.api.documents import body_of, problems
from producer.api.parameters import TenantPath
from producer.api.services import Here
from producer.jobs.contract import Tenant

router = APIRouter(prefix=f"{PREFIX}/tenants", tags=["tenants"])


@router.get("", responses=problems())
def tenants(here: Here) -> TenantList:
    """The tenants that were given a weight. Others need not be known beforehand, and weigh 1."""
    return TenantList(tenants=here.store.tenants())


@router.put("/{name}", openapi_extra=body_of({JSON: "TenantWeight"}), responses=problems(400, 413, 415, 422))
def weigh(name: TenantPath, body: Annotated[bytes, Depends(read_document)], here: Here) -> Tenant:
    """Give a tenant its weight, from now on and for what waits already."""
    return here.store.set_tenant_weight(name, validated(TenantWeight, parse(body)).weight)
