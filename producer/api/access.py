"""Who asks, and what they may do.

Every path but the few in ``OPEN_PATHS`` asks here first, before anything else of the request is read: a path that
somebody adds is closed until it is named there. A key comes as ``Authorization: Bearer ovis_…`` or in the page's
cookie; each request asks Postgres for it, so that a revoked one opens nothing from that moment on.

Where no key is required (on the loopback) whoever gives none may do everything; what begins like a key is checked
nevertheless. A browser on that machine gives none either, whichever page it shows: so what comes without a key must
ask for this machine by name (else a stranger's name that leads to 127.0.0.1 would make that stranger's page this
server's own), and what would change something must not come from another site's page.

Which tenant's rows are seen is no question of this module: ``services`` hands out a store that sees no others, and
Postgres holds to it.
"""

import ipaddress
import math
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from fastapi import Request

from producer.api.errors import Forbidden, Unauthorized
from producer.jobs.contract import DEFAULT_TENANT, Scope
from producer.jobs.errors import Overloaded
from producer.jobs.keys import PREFIX, Keys

COOKIE = "ovis_key"
OPEN_PATHS = frozenset({"/healthz", "/readyz", "/login", "/logout", "/static/{name}"})
"""Routes that answer everybody. The API's description is a file, and open too."""
READING = frozenset({"GET", "HEAD"})


@dataclass(frozen=True)
class Caller:
    """On whose behalf a request asks, and what it may do."""

    tenant: str
    scopes: frozenset[Scope]

    @property
    def admin(self) -> bool:
        """Whether it sees all tenants, and may change what concerns the farm."""
        return Scope.ADMIN in self.scopes

    def need(self, scope: Scope) -> None:
        """Return if the caller has it. Raises: Forbidden."""
        if scope not in self.scopes and not self.admin:
            raise Forbidden(f"this needs a key with the scope '{scope}'")

    def whose(self, asked: str | None) -> str:
        """For which tenant this caller makes something that should be ``asked``'s. Raises: Forbidden."""
        if asked is None or asked == self.tenant:
            return self.tenant
        if not self.admin:
            raise Forbidden("this key is of another tenant: leave the tenant out, or take a key of that tenant")
        return asked


ANYBODY = Caller(DEFAULT_TENANT, frozenset(Scope))
"""Who gives no key where none is required."""


class Access:
    """Finds the caller of each request. One a process, shared by its threads."""

    def __init__(self, keys: Keys, *, require_keys: bool, hosts: Collection[str] = ()) -> None:
        """``hosts``: the names by which whoever gives no key may ask for this server, beside the loopback's."""
        self._keys = keys
        self._require_keys = require_keys
        self._hosts = frozenset(map(str.lower, hosts))
        self._pace = Pace()

    def caller(self, request: Request, *, paced: bool = True) -> Caller:
        """``paced``: this counts among the tenant's requests a second.

        Raises: Unauthorized, Forbidden, Overloaded, Unavailable.
        """
        given = _given(request)
        if given is None:
            if self._require_keys:
                raise Unauthorized("a key is needed: send it as 'Authorization: Bearer ovis_…'")
            self._check_keyless(request)
            return ANYBODY
        return self.holder(given, paced=paced)

    def _check_keyless(self, request: Request) -> None:
        """Return if no page of another site can have sent this. Raises: Forbidden."""
        if not at_home(request.headers.get("host", ""), self._hosts):
            raise Forbidden(
                "without a key this farm answers only under this machine's own names (127.0.0.1, localhost, and those "
                "in OVIS_API_HOST and OVIS_API_URL): set OVIS_REQUIRE_KEYS=true, or ask with a key"
            )
        if request.method not in READING and not same_origin(request.headers):
            raise Forbidden("another web site's page may not ask without a key: set OVIS_REQUIRE_KEYS=true, or use one")

    def holder(self, key: str, *, paced: bool = True) -> Caller:
        """Whoever holds this key. Raises: Unauthorized, Overloaded, Unavailable."""
        bearer = self._keys.find(key)
        if bearer is None:
            raise Unauthorized("this key is none, or it was revoked")
        if paced and bearer.max_requests_s is not None:
            self._pace.keep(bearer.tenant, bearer.max_requests_s, time.monotonic())
        return Caller(bearer.tenant, bearer.scopes)


def _given(request: Request) -> str | None:
    """The key that came with the request. What does not begin like one is none: clients that must send something
    send anything. Raises: Forbidden."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip().startswith(PREFIX):
        return token.strip()
    key = request.cookies.get(COOKIE)
    if key and request.method not in READING and not same_origin(request.headers):
        raise Forbidden("another web site's page may not ask with this page's key")
    return key or None


def at_home(host: str, names: Collection[str]) -> bool:
    """Whether the header ``Host`` names the loopback, or one of ``names`` (in lower case, without port)."""
    name = host_name(f"//{host}")
    if name is None:
        return False
    if name == "localhost" or name in names:
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def host_name(url: str) -> str | None:
    """The host in ``url``, in lower case and without brackets; None: there is none that can be read."""
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def same_origin(headers: Mapping[str, str]) -> bool:
    """Whether this server's own page asks, or no browser. Other ports of this host are the same site to a browser, so
    that the cookie's SameSite alone would let their pages in."""
    origin = headers.get("origin")
    try:
        return origin is None or urlsplit(origin).netloc == headers.get("host")
    except ValueError:  # what no browser sends is no page of ours
        return False


class Pace:
    """Requests a second of each tenant that has such a limit, in this process: several APIs allow as many times more.

    A bucket of tokens each: it holds what one second brings, and at least one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._buckets: dict[str, tuple[float, float]] = {}  # tokens, and when that was

    def keep(self, tenant: str, most_s: float, now: float) -> None:
        """Take a token, at ``now`` in seconds of one clock. Raises: Overloaded."""
        size = max(1.0, most_s)
        with self._lock:
            tokens, at = self._buckets.get(tenant, (size, now))
            tokens = min(size, tokens + (now - at) * most_s)
            taken = tokens >= 1
            self._buckets[tenant] = (tokens - taken, now)
        if not taken:
            raise Overloaded(f"at most {most_s:g} requests a second are allowed", math.ceil((1 - tokens) / most_s))
