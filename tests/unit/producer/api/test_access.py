"""Requests a second, and whose page asks."""

from contextlib import suppress

import pytest

from producer.api.access import Caller, Pace, same_origin
from producer.api.errors import Forbidden
from producer.jobs.contract import Scope
from producer.jobs.errors import Overloaded


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
