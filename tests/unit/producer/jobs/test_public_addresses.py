"""Where a stranger may make this farm connect to."""

import asyncio
from collections.abc import Sequence

import httpx
import pytest

from producer.jobs.public_addresses import AddressRefused, checked_url, is_public, pinned, resolved

NOT_PUBLIC = (
    "0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "127.0.0.1", "127.8.9.10", "169.254.169.254", "172.16.0.1",
    "172.31.255.255", "192.0.0.1", "192.0.2.1", "192.88.99.1", "192.168.1.1", "198.18.0.1", "198.51.100.1",
    "203.0.113.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255", "168.63.129.16",
    "::", "::1", "fe80::1", "fe80::1%eth0", "fec0::1", "fc00::1", "fd00:ec2::254", "ff02::1", "2001:db8::1", "2001::1",
    "3fff::1", "5f00::1", "100::1", "4000::1",
    "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1", "64:ff9b::127.0.0.1", "64:ff9b::a00:1", "64:ff9b:1::1",
    "2002:7f00:1::", "2002:a00:1::1",
    # Python before 3.11.10 calls these global; 192.0.0.192 is the metadata of Oracle's cloud.
    "192.0.0.192", "192.0.0.9", "192.0.0.10", "::ffff:192.0.0.192", "64:ff9b::c000:c0", "2002:c000:c0::1",
    "192.31.196.1", "192.52.193.1", "192.175.48.1", "2620:4f:8000::1",
    "", "localhost", "2130706433",
)  # fmt: skip
PUBLIC = ("192.0.1.1", "1.1.1.1", "93.184.216.34", "2606:4700:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8")


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_what_is_not_of_the_internet_is_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", PUBLIC)
def test_what_is_of_the_internet_is_public(address: str) -> None:
    assert is_public(address)


def pin(url: str, addresses: Sequence[str], *, private: bool = False) -> list[httpx.URL]:
    asked: list[tuple[str, int]] = []

    async def resolve(host: str, port: int) -> Sequence[str]:
        asked.append((host, port))
        if not addresses:
            raise OSError("no such name")
        return addresses

    found = asyncio.run(pinned(checked_url(url, private=private), resolve, private=private))
    assert len(asked) == 1, "a second answer may be another"
    return found


def test_the_connection_goes_to_the_address_that_was_looked_at() -> None:
    assert pin("https://hooks.example.com:8443/a?b=c", ["93.184.216.34"]) == ["https://93.184.216.34:8443/a?b=c"]
    both = ["https://[2606:4700::1]/a", "https://1.1.1.1/a"]
    assert pin("https://hooks.example.com/a", ["2606:4700::1", "1.1.1.1", "1.1.1.1"]) == both
    assert pin("http://inside/a", ["10.0.0.7"], private=True) == ["http://10.0.0.7/a"]


def test_of_a_name_with_very_many_addresses_the_first_are_tried() -> None:
    assert len(pin("https://hooks.example.com/", [f"1.1.1.{number}" for number in range(100)])) == 4
    with pytest.raises(AddressRefused, match="not public"):
        pin("https://hooks.example.com/", [*(f"1.1.1.{number}" for number in range(100)), "10.0.0.1"])


@pytest.mark.parametrize("addresses", [["10.0.0.1"], ["93.184.216.34", "127.0.0.1"], ["::ffff:169.254.169.254"]])
def test_a_name_with_an_address_that_is_not_public_is_refused(addresses: list[str]) -> None:
    with pytest.raises(AddressRefused, match="not public") as refused:
        pin("https://hooks.example.com/", addresses)
    assert not any(address in str(refused.value) for address in addresses), "nothing is told of the network"


def test_a_name_without_an_address_is_refused() -> None:
    with pytest.raises(AddressRefused, match="no address"):
        pin("https://hooks.example.com/", [])


BAD = (
    "", "x", "//host/", "http://example.com/", "ftp://example.com/", "file:///etc/passwd", "https://", "https:///a",
    "https://user:secret@example.com/", "https://example.com/#a", "https://example.com:0/", "https://exa mple.com/",
    "https://example.com:99999/", "https://example.com/\x00", "https://example.com/\ud800", "https://[::1/", "https://\ud800/",
    "https://example.com/" + "a" * 2000,
)  # fmt: skip


@pytest.mark.parametrize("url", BAD)
def test_what_is_no_receivers_url_is_refused(url: str) -> None:
    with pytest.raises(AddressRefused):
        checked_url(url, private=False)


@pytest.mark.parametrize("host", ["127.1", "0x7f.0.0.1", "2130706433", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0"])
def test_other_spellings_of_this_machine_are_refused_as_the_resolver_reads_them(host: str) -> None:
    with pytest.raises(AddressRefused):
        asyncio.run(pinned(checked_url(f"https://{host}/", private=False), resolved, private=False))
