# Written by `make client` from producer/client/_async/access.py: change that one.
"""Who may ask the farm, and how much: tenants and API keys. For keys with the scope admin."""

from collections.abc import Sequence
from typing import Unpack
from urllib.parse import quote
from uuid import UUID

from producer.client._sync.transport import Transport
from producer.client.bodies import document
from producer.client.models import Key, Scope, Tenant, TenantChanges


class Access(Transport):
    """The client's part that knows tenants and keys."""

    def tenants(self) -> list[Tenant]:
        """Those that were given a weight or a limit; all others have 1 and none. Raises: ClientError."""
        return self._listed(Tenant, "tenants", "tenants")

    def set_tenant(self, name: str, **changes: Unpack[TenantChanges]) -> Tenant:
        """Give a tenant its weight beside others, 0.01 to 100, and its limits. Raises: Refused, ClientError."""
        return self._asked(Tenant, "PUT", f"tenants/{quote(name, safe='')}", **document(changes))

    def create_key(self, name: str, *, scopes: Sequence[Scope] = ("submit", "read"), tenant: str | None = None) -> Key:
        """A new API key; ``Key.key`` is to be kept now, it is shown never again. Raises: Refused, ClientError."""
        whose = {} if tenant is None else {"tenant": tenant}
        return self._asked(Key, "POST", "keys", **document({"name": name, "scopes": list(scopes)} | whose))

    def keys(self) -> list[Key]:
        """All keys, the revoked ones too. Raises: ClientError."""
        return self._listed(Key, "keys", "keys")

    def revoke_key(self, key: Key | UUID | str) -> Key:
        """Let the key open nothing from now on. Raises: NotFound, ClientError."""
        return self._asked(Key, "DELETE", f"keys/{UUID(str(key.id if isinstance(key, Key) else key))}")
