"""The paths of webhooks: addresses that are told of a tenant's events, and what was told to each.

What is sent is signed as Standard Webhooks (standardwebhooks.com) asks, so its libraries verify it.
"""

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Query, Response
from pydantic import BaseModel, Field

from producer.api.answers import PREFIX
from producer.api.bodies import JSON, WebhookRequest, parse, read_document, validated
from producer.api.documents import body_of, problems
from producer.api.errors import Fault, Invalid
from producer.api.parameters import Key, Tenant, id_by
from producer.api.services import Here
from producer.jobs.contract import Delivery, Webhook
from producer.jobs.public_addresses import AddressRefused, checked_url
from producer.jobs.webhooks import Webhooks

router = APIRouter(prefix=f"{PREFIX}/webhooks", tags=["webhooks"])


class NewWebhook(Webhook):
    """A webhook that was just made."""

    secret: str = Field(description="By which its receiver verifies what it is told. It is shown this once.")


class WebhookList(BaseModel):
    """All webhooks, the oldest first."""

    webhooks: list[Webhook]


class DeliveryPage(BaseModel):
    """What a webhook was told or is to be told, the newest first."""

    deliveries: list[Delivery]
    next: UUID | None = Field(description="To be given as 'cursor'; null: the end.")


@router.post(
    "", status_code=201, openapi_extra=body_of({JSON: "WebhookRequest"}), responses=problems(400, 409, 413, 415)
)
def create(
    body: Annotated[bytes, Depends(read_document)],
    here: Here,
    response: Response,
    tenant: Tenant = None,
    key: Key = None,
) -> NewWebhook:
    """Let an address be told of events from now on. The answer alone holds the secret."""
    wanted = validated(WebhookRequest, parse(body))
    try:
        checked_url(wanted.url, private=here.settings.webhook_private)
    except AddressRefused as refused:
        raise Invalid([Fault(field="url", message=str(refused))]) from None
    webhook_id = id_by(key, here.caller.tenant)
    webhook, secret = Webhooks(here.database).create(
        here.whose(tenant), wanted.url, list(wanted.kinds), webhook_id=webhook_id
    )
    response.headers.update({"Location": f"{router.prefix}/{webhook.id}", "Cache-Control": "no-store"})
    return NewWebhook(**webhook.model_dump(), secret=secret)


@router.get("", responses=problems())
def webhooks(here: Here) -> WebhookList:
    """All webhooks, disabled ones too."""
    return WebhookList(webhooks=Webhooks(here.database).all())


@router.get("/{webhook_id}", responses=problems(404))
def webhook(webhook_id: UUID, here: Here) -> Webhook:
    """One webhook."""
    return Webhooks(here.database).webhook(webhook_id)


@router.delete("/{webhook_id}", status_code=204, responses=problems(404))
def delete(webhook_id: UUID, here: Here) -> None:
    """Tell that address nothing more, and forget what it was told."""
    Webhooks(here.database).delete(webhook_id)


@router.post("/{webhook_id}/enable", responses=problems(404))
def enable(webhook_id: UUID, here: Here) -> Webhook:
    """Go on telling an address that answered 410, of what happens from now on."""
    return Webhooks(here.database).enable(webhook_id)


@router.get("/{webhook_id}/deliveries", responses=problems(404))
def deliveries(
    webhook_id: UUID,
    here: Here,
    cursor: Annotated[UUID | None, Query(description="'next' of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=1000, description="Deliveries a page.")] = 100,
) -> DeliveryPage:
    """What the webhook was told or is to be told, the newest first, with how its last attempt went."""
    found = Webhooks(here.database).deliveries(webhook_id, after=cursor, limit=limit)
    return DeliveryPage(deliveries=found, next=found[-1].id if len(found) == limit else None)


@router.post("/{webhook_id}/deliveries/{delivery_id}/resend", responses=problems(404, 409))
def resend(webhook_id: UUID, delivery_id: UUID, here: Here) -> Delivery:
    """Tell it once more, at once and under the same id."""
    return Webhooks(here.database).resend(webhook_id, delivery_id)
