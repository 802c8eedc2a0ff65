"""Which addresses a stranger may make this farm connect to: public ones alone.

A webhook's URL comes from whoever holds a key, and the farm stands where they do not: beside its own servers, and
beside a cloud's metadata service. So a name is resolved when something is sent, every address that it has is looked
at, and the connection goes to the very address that was looked at, whatever the name says a moment later.

The blocks that are not public stand here, since what Python calls global is another thing in each of its releases
(192.0.0.192, where Oracle's cloud has its metadata, was so before 3.11.10). It is asked besides.
"""

import asyncio
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import httpx

from producer.jobs.settings import PORT_MAX

URL_MAX_CHARACTERS = 2000
ADDRESSES_MAX = 4
"""Of one name that are tried, one after the other."""
HOST = re.compile(r"[A-Za-z0-9._:-]+")
"""A name as it is asked for, or an address."""
SPECIAL_V4 = tuple(
    ip_network(block)
    for block in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # behind a provider's gateway
        "127.0.0.0/8",  # loopback
        "169.254.0.0/16",  # link-local
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocols, and Oracle's metadata
        "192.0.2.0/24",  # examples
        "192.31.196.0/24",  # AS112
        "192.52.193.0/24",  # AMT
        "192.88.99.0/24",  # relays to 6to4, given up (RFC 7526)
        "192.168.0.0/16",  # private
        "192.175.48.0/24",  # AS112
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # examples
        "203.0.113.0/24",  # examples
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # to come, and broadcast
        "168.63.129.16/32",  # Azure's own services, beside every machine there; IANA knows nothing of it
    )
)
"""All of IANA's registry of special-purpose addresses, also those that are reached from everywhere."""
GLOBAL_V6 = ip_network("2000::/3")
"""All that is given out to be reached; the rest is local, multicast, mapped or to come (RFC 4291)."""
SPECIAL_V6 = tuple(
    ip_network(block)
    for block in (
        "2001::/23",  # protocols, Teredo among them
        "2001:db8::/32",  # examples
        "2620:4f:8000::/48",  # AS112
        "3fff::/20",  # examples
    )
)
"""Of these addresses, what is in IANA's registry; 6to4's hold others (``_hidden``)."""
NAT64 = ip_network("64:ff9b::/96")

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""From a host's name and a port to its addresses. Raises: OSError."""


class AddressRefused(Exception):
    """The farm connects to no such address; the message says why, and tells nothing of the network."""


async def resolved(host: str, port: int) -> Sequence[str]:
    """The addresses that this machine's resolver knows."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


def checked_url(url: str, *, private: bool) -> httpx.URL:
    """The URL, if something may be sent there by its form. Raises: AddressRefused."""
    try:
        parsed = httpx.URL(url)
        host = parsed.raw_host.decode("ascii")
    except (httpx.InvalidURL, UnicodeError, ValueError):
        raise AddressRefused("is no URL") from None
    if len(url) > URL_MAX_CHARACTERS:
        raise AddressRefused(f"is longer than {URL_MAX_CHARACTERS} characters")
    if parsed.scheme not in ({"https", "http"} if private else {"https"}):
        raise AddressRefused("must begin with https:// (http:// may, where OVIS_WEBHOOK_PRIVATE=1)")
    port = 443 if parsed.port is None else parsed.port
    if not HOST.fullmatch(host) or parsed.userinfo or parsed.fragment or not 0 < port <= PORT_MAX:
        raise AddressRefused("must be https://host/path, without a user and without #")
    literal = _literal(host)
    if not private and literal is not None and not is_public(literal):
        raise AddressRefused("its host is an address that is not public")
    return parsed


def _literal(host: str) -> str | None:
    """The address that a host is as it stands there, also as resolvers read '127.1'; None: it is a name."""
    if ":" in host:
        return host
    try:
        return socket.inet_ntoa(socket.inet_aton(host))
    except OSError:
        return None


async def pinned(url: httpx.URL, resolve: Resolve, *, private: bool) -> list[httpx.URL]:
    """The same URL with an address in the place of its host: one for each address of it, or the first of very many.

    Raises: AddressRefused.
    """
    try:
        addresses = await resolve(url.raw_host.decode("ascii"), url.port or (443 if url.scheme == "https" else 80))
    except (OSError, UnicodeError):
        addresses = ()
    if not addresses:
        raise AddressRefused("its host has no address")
    if not private and not all(map(is_public, addresses)):
        raise AddressRefused("its host has an address that is not public")
    return [url.copy_with(host=address) for address in dict.fromkeys(addresses)][:ADDRESSES_MAX]


def is_public(address: str) -> bool:
    """Whether the address is one of the internet, and no other address is hidden in it that is not."""
    try:
        found = ip_address(address)
    except ValueError:
        return False
    if isinstance(found, IPv6Address):
        hidden = _hidden(found)
        return _is_public_v4(hidden) if hidden else _is_public_v6(found)
    return _is_public_v4(found)


def _hidden(address: IPv6Address) -> IPv4Address | None:
    """The IPv4 address that a gateway on the way would take out of this one."""
    if address in NAT64:
        return IPv4Address(int(address) & 0xFFFF_FFFF)
    return address.ipv4_mapped or address.sixtofour


def _is_public_v4(address: IPv4Address) -> bool:
    return address.is_global and not any(address in block for block in SPECIAL_V4)


def _is_public_v6(address: IPv6Address) -> bool:
    given_out = address in GLOBAL_V6 and address.is_global and address.scope_id is None
    return given_out and not any(address in block for block in SPECIAL_V6)
