"""Requests a second, and whose page asks."""

from contextlib import suppress

import pytest
from fastapi import Request

from producer.api.access import ANYBODY, Access, Caller, Pace, at_home, host_name, same_origin
from producer.api.errors import Forbidden
from producer.jobs.contract import Scope
from producer.jobs.errors import Overloaded
from producer.jobs.keys import Keys
from producer.jobs.postgres import Database


def allowed(pace: Pace, tenant: str, most_s: float, *moments: float) -> int:
    """How many requests at these moments were let in."""
    count = 0
    for now in moments:
        with suppress(Overloaded):
            pace.keep(tenant, most_s, now)
            count += 1
    return count


def test_a_second_brings_as_many_requests_as_are_allowed() -> None:
    pace = Pace()
    assert allowed(pace, "a", 5, *[100.0] * 9) == 5
    assert allowed(pace, "a", 5, *[100.5] * 9) == 2, "half a second brings two and a half"
    assert allowed(pace, "a", 5, *[900.0] * 9) == 5, "nobody saves up more than a second's"
    assert allowed(pace, "b", 5, *[900.0] * 9) == 5, "each tenant has its own"


def test_less_than_one_a_second_is_one_in_so_many_seconds() -> None:
    pace = Pace()
    assert allowed(pace, "a", 0.1, 100.0, 101.0, 109.0, 110.1) == 2
    with pytest.raises(Overloaded) as refused:
        pace.keep("a", 0.1, 111.1)
    assert refused.value.retry_after_s == 9


def test_only_this_servers_own_page_asks_with_the_pages_key() -> None:
    assert same_origin({"host": "farm:8000"}), "no browser"
    assert same_origin({"host": "farm:8000", "origin": "http://farm:8000"})
    assert same_origin({"host": "farm", "origin": "https://farm"}), "a proxy speaks TLS before us"
    for origin in ("http://farm:8001", "http://evil", "null", "", "http://farm:8000.evil"):
        assert not same_origin({"host": "farm:8000", "origin": origin})


@pytest.mark.parametrize(
    "host", ["127.0.0.1:8000", "127.9.9.9", "localhost:80", "LocalHost", "[::1]:8000", "Farm:8000"]
)
def test_this_machine_is_asked_by_its_own_names(host: str) -> None:
    assert at_home(host, {"farm"})


@pytest.mark.parametrize(
    "host",
    ["", "evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil", "10.0.0.1", "[::1", "[x]"],
)
def test_a_strangers_name_is_none_of_this_machine(host: str) -> None:
    assert not at_home(host, {"farm"})


def test_the_host_of_an_address_is_its_name_alone() -> None:
    assert host_name("https://Farm.example:8443/path") == "farm.example"
    assert host_name("http://[::1]:8000") == "::1"
    assert host_name("") is None


def asked(method: str, **headers: str) -> Request:
    lines = [(name.encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "method": method, "path": "/", "headers": lines})


def test_without_a_key_no_other_sites_page_gets_in() -> None:
    access = Access(Keys(Database.at("postgresql://nowhere/db", connections=1)), require_keys=False)
    home = "127.0.0.1:8000"
    assert access.caller(asked("POST", host=home)) is ANYBODY
    assert access.caller(asked("POST", host=home, origin=f"http://{home}")) is ANYBODY
    assert access.caller(asked("GET", host=home, origin="http://evil.example")) is ANYBODY, "it cannot read the answer"
    for request in (
        asked("POST", host="evil.example:8000", origin="http://evil.example:8000"),
        asked("GET", host="evil.example:8000"),
        asked("POST", host=home, origin="http://evil.example"),
        asked("POST", host=home, origin="null", authorization="Bearer sk-any"),
    ):
        with pytest.raises(Forbidden, match="OVIS_REQUIRE_KEYS"):
            access.caller(request)


def test_whoever_is_no_administrator_makes_things_for_its_own_tenant_alone() -> None:
    caller = Caller("acme", frozenset({Scope.SUBMIT}))
    assert caller.whose(None) == caller.whose("acme") == "acme"
    with pytest.raises(Forbidden):
        caller.whose("other")
    with pytest.raises(Forbidden):
        caller.need(Scope.READ)
    admin = Caller("acme", frozenset({Scope.ADMIN}))
    assert admin.whose("other") == "other"
    admin.need(Scope.SUBMIT)
