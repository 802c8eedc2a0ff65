"""Webhooks: addresses that the farm tells of events, and what became of the telling."""

from collections.abc import AsyncIterator, Sequence
from typing import Any
from uuid import UUID

from producer.client._async.transport import AsyncTransport
from producer.client.bodies import document, given
from producer.client.models import Delivery, Webhook, WebhookKind


class AsyncWebhooks(AsyncTransport):
    """The client's part that knows webhooks."""

    async def create_webhook(
        self, url: str, *, kinds: Sequence[WebhookKind] | None = None, tenant: str | None = None
    ) -> Webhook:
        """Let ``url`` be told of events of these ``kinds``; None: when a batch has finished.

        ``Webhook.secret``, by which the receiver verifies what it is told, is to be kept now: it is shown never again.

        Raises:
            Refused: the address or a kind is not allowed.
            ClientError
        """
        body: dict[str, Any] = {"url": url} | ({} if kinds is None else {"kinds": list(kinds)})
        return await self._asked(Webhook, "POST", "webhooks", params=given(tenant=tenant), **document(body))

    async def webhooks(self) -> list[Webhook]:
        """All webhooks. Raises: ClientError."""
        return await self._listed(Webhook, "webhooks", "webhooks")

    async def webhook(self, webhook: Webhook | UUID | str) -> Webhook:
        """The webhook as it is now. Raises: NotFound, ClientError."""
        return await self._asked(Webhook, "GET", _path(webhook))

    async def delete_webhook(self, webhook: Webhook | UUID | str) -> None:
        """Tell that address nothing more, and forget what it was told. Raises: NotFound, ClientError."""
        await self._removed(_path(webhook))

    async def enable_webhook(self, webhook: Webhook | UUID | str) -> Webhook:
        """Go on telling an address that answered 410. Raises: NotFound, ClientError."""
        return await self._asked(Webhook, "POST", f"{_path(webhook)}/enable")

    def deliveries(self, webhook: Webhook | UUID | str, *, page: int = 100) -> AsyncIterator[Delivery]:
        """What the webhook was told or is to be told, the newest first, page by page. Raises: NotFound, ClientError."""
        return self._pages(Delivery, "deliveries", f"{_path(webhook)}/deliveries", "cursor", {"limit": page})

    async def resend(self, delivery: Delivery) -> Delivery:
        """Tell it once more, under the same id. Raises: NotFound, ClientError."""
        return await self._asked(Delivery, "POST", f"{_path(delivery.webhook_id)}/deliveries/{delivery.id}/resend")


def _path(webhook: Webhook | UUID | str) -> str:
    return f"webhooks/{UUID(str(webhook.id if isinstance(webhook, Webhook) else webhook))}"
