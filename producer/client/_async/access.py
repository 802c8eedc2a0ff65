"""Who may ask the farm, and how much: tenants and API keys. For keys with the scope admin."""

from collections.abc import Sequence
from typing import Unpack
from urllib.parse import quote
from uuid import UUID

from producer.client._async.transport import AsyncTransport
from producer.client.bodies import document
from producer.client.models import Key, Scope, Tenant, TenantChanges


class AsyncAccess(AsyncTransport):
    """The client's part that knows tenants and keys."""

    async def tenants(self) -> list[Tenant]:
        """Those that were given a weight or a limit; all others have 1 and none. Raises: ClientError."""
        return await self._listed(Tenant, "tenants", "tenants")

    async def set_tenant(self, name: str, **changes: Unpack[TenantChanges]) -> Tenant:
        """Give a tenant its weight beside others, 0.01 to 100, and its limits. Raises: Refused, ClientError."""
        return await self._asked(Tenant, "PUT", f"tenants/{quote(name, safe='')}", **document(changes))

    async def create_key(
        self, name: str, *, scopes: Sequence[Scope] = ("submit", "read"), tenant: str | None = None
    ) -> Key:
        """A new API key; ``Key.key`` is to be kept now, it is shown never again. Raises: Refused, ClientError."""
        whose = {} if tenant is None else {"tenant": tenant}
        return await self._asked(Key, "POST", "keys", **document({"name": name, "scopes": list(scopes)} | whose))

    async def keys(self) -> list[Key]:
        """All keys, the revoked ones too. Raises: ClientError."""
        return await self._listed(Key, "keys", "keys")

    async def revoke_key(self, key: Key | UUID | str) -> Key:
        """Let the key open nothing from now on. Raises: NotFound, ClientError."""
        return await self._asked(Key, "DELETE", f"keys/{UUID(str(key.id if isinstance(key, Key) else key))}")
