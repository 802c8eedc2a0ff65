"""Keys in Postgres: kept as digests, revoked at once."""

from uuid import uuid4

import pytest
from sqlalchemy import text

from producer.jobs.contract import Scope
from producer.jobs.errors import NotFound
from producer.jobs.keys import Bearer, Keys, new_key
from producer.jobs.store import Store


@pytest.fixture
def keys(store: Store) -> Keys:
    return Keys(store.database)


def row_of_keys(store: Store) -> str:
    """Everything that the table holds, and the version of its one row."""
    with store.database.begin() as connection:
        return str(connection.execute(text("SELECT xmin, k::text FROM api_keys k")).one())


def test_a_key_is_found_by_itself_and_by_no_other(keys: Keys) -> None:
    record, key = keys.create("acme", "web shop", [Scope.READ, Scope.SUBMIT])
    assert keys.find(key) == Bearer("acme", frozenset({Scope.READ, Scope.SUBMIT}), None)
    assert keys.find(new_key()) is None
    (listed,) = keys.list()
    assert (listed.id, listed.name, listed.tenant) == (record.id, "web shop", "acme")
    assert key.startswith(listed.shown)
    assert len(listed.shown) == 11


def test_the_table_does_not_hold_the_key(keys: Keys, store: Store) -> None:
    record, key = keys.create("acme", "web shop", [Scope.READ])
    held = row_of_keys(store)
    assert record.shown in held
    assert key[len(record.shown) :] not in held
    assert key not in str(record)


def test_a_revoked_key_opens_nothing(keys: Keys) -> None:
    record, key = keys.create("acme", "web shop", [Scope.READ])
    other = keys.create("acme", "other", [Scope.READ])[1]
    revoked = keys.revoke(record.id)
    assert revoked.revoked_at is not None
    assert keys.find(key) is None
    assert keys.find(other) is not None
    assert keys.revoke(record.id) == revoked, "twice is once"
    with pytest.raises(NotFound):
        keys.revoke(uuid4())


def test_the_last_use_is_noted_to_the_minute_and_not_at_every_request(keys: Keys, store: Store) -> None:
    key = keys.create("acme", "web shop", [Scope.READ])[1]
    assert keys.list()[0].used_at is None
    keys.find(key)
    used_at = keys.list()[0].used_at
    assert used_at is not None
    assert (used_at.second, used_at.microsecond) == (0, 0)
    for _ in range(3):  # the minute may end meanwhile, once
        before = row_of_keys(store)
        keys.find(key)
        if row_of_keys(store) == before:
            return
    pytest.fail("each use wrote the row")


def test_the_farm_is_administered_by_whoever_holds_a_key_that_is_not_revoked(keys: Keys) -> None:
    keys.create("acme", "reader", [Scope.READ, Scope.SUBMIT])
    assert not keys.administered()
    record, _ = keys.create("acme", "boss", [Scope.ADMIN])
    assert keys.administered()
    keys.revoke(record.id)
    assert not keys.administered()


def test_a_key_brings_its_tenants_limit(keys: Keys, store: Store) -> None:
    key = keys.create("acme", "web shop", [Scope.READ])[1]
    store.set_tenant("acme", {"max_requests_s": 2.5})
    found = keys.find(key)
    assert found is not None
    assert found.max_requests_s == 2.5
