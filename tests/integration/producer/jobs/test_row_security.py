"""What Postgres itself keeps from a tenant, whatever a statement says. The tables are walked, not listed."""

import secrets
from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import Connection, text
from sqlalchemy.exc import ProgrammingError

from producer.jobs import schema
from producer.jobs.contract import Entry, Message, Priority, Rejection, State, Submission, SubmissionKey
from producer.jobs.errors import NotFound
from producer.jobs.postgres import ROLE, Database
from producer.jobs.search import Search
from producer.jobs.settings import Settings
from producer.jobs.store import Store
from tests.conftest import database_url

READ_BY_ALL = {"workers"}
"""Shared by all tenants, who may at most read it: what it tells of a job that is drawn are its id and its steps."""
CLOSED = {"alembic_version", "api_keys", "leader", "prompt_words"}
"""Of no tenant's business, or (words) asked by the farm on a tenant's behalf."""
RIGHTS = ("SELECT", "INSERT", "UPDATE", "DELETE", "TRUNCATE", "REFERENCES", "TRIGGER")


def tables(connection: Connection) -> dict[str, set[str]]:
    """Every table and view of the farm, and what the tenants' role may do with it."""
    kinds = "relnamespace = current_schema()::regnamespace AND relkind IN ('r', 'p', 'v', 'm')"
    statement = text(f"SELECT relname FROM pg_class WHERE {kinds}")
    right = text("SELECT has_table_privilege(:role, :name, :right)")
    return {
        name: {r for r in RIGHTS if connection.scalar(right, {"role": ROLE, "name": name, "right": r})}
        for name in connection.scalars(statement).all()
    }


def columns(connection: Connection, table: str) -> set[str]:
    statement = text("SELECT attname FROM pg_attribute WHERE attrelid = CAST(:table AS regclass) AND attnum > 0")
    return set(connection.scalars(statement, {"table": table}))


ANY = {
    "text": "'any'",
    "uuid": "gen_random_uuid()",
    "bytea": "uuid_send(gen_random_uuid())",
    "jsonb": "'{}'",
    "text[]": "'{}'",
    "bigint": "1",
    "integer": "1",
}
"""A value of each type, for columns about which a test does not care."""


def insert(connection: Connection, table: str, **known: object) -> None:
    """A row of the table: ``known``, and anything where something must be."""
    statement = text(
        """
        SELECT attname, format_type(atttypid, NULL) AS type FROM pg_attribute
        WHERE attrelid = CAST(:table AS regclass) AND attnum > 0 AND attnotnull AND NOT atthasdef AND attidentity = ''
        """
    )
    values = {row.attname: ANY.get(row.type) for row in connection.execute(statement, {"table": table})}
    values |= {name: f":{name}" for name in known}
    connection.execute(text(f"INSERT INTO {table} ({', '.join(values)}) VALUES ({', '.join(values.values())})"), known)


def submitted(store: Store, tenant: str, count: int = 2) -> UUID:
    """A batch of the tenant's, with a line that became no job."""
    entries: list[Entry | Rejection] = [
        Entry(Submission(prompt=f"a boat of {tenant}"), line, {"sku": line}) for line in range(1, count + 1)
    ]
    batch = store.submit_batch(
        f"boats of {tenant}",
        [*entries, Rejection(count + 1, {"sku": "?"}, "invalid", "no prompt")],
        max_failures=3,
        tenant=tenant,
        key=SubmissionKey(f"key of {tenant}", "f"),
    )
    return batch.id


def fill(store: Store, tenant: str) -> None:
    """Rows of this tenant in every table that has any of tenants."""
    first, second = store.batch_jobs(submitted(store, tenant))
    store.set_tenant(tenant, {"max_a_day": 100})
    store.submit(Submission(prompt="alone"), max_failures=3, tenant=tenant)
    assert store.claim(Message(first.id, 1), uuid4())
    webhook_id = uuid4()
    with store.database.begin() as connection:
        insert(connection, "messages", job_id=second.id, claim=1)
        for table in ("deletions", "answers", "files", "events", "api_keys"):
            insert(connection, table, tenant=tenant)
        insert(connection, "webhooks", tenant=tenant, id=webhook_id)
        insert(connection, "deliveries", tenant=tenant, webhook_id=webhook_id)


@pytest.fixture
def filled(store: Store) -> Store:
    for tenant in ("acme", "other"):
        fill(store, tenant)
    return store


def test_every_table_either_holds_to_its_policy_or_is_named_here(store: Store) -> None:
    with store.database.begin() as connection:
        for name, rights in tables(connection).items():
            facts = "SELECT relrowsecurity, (SELECT count(*) FROM pg_policy WHERE polrelid = c.oid) FROM pg_class c"
            secured, policies = connection.execute(text(f"{facts} WHERE oid = CAST(:n AS regclass)"), {"n": name}).one()
            if name in READ_BY_ALL:
                assert rights == {"SELECT"}, name
            elif name in CLOSED or name.startswith("ops_"):
                assert not rights, name
            else:
                assert secured, f"{name} has no row-level security"
                assert policies == 1, f"{name} has no policy"
            if "tenant" in columns(connection, name):
                assert secured, f"{name} has tenants' rows"
            assert not rights & {"TRUNCATE", "REFERENCES", "TRIGGER"}, name


def _own(connection: Connection, table: str, tenant: str) -> int:
    """How many of the table's rows are the tenant's, as the owner knows it."""
    known = columns(connection, table)
    whose = (
        "tenant"
        if "tenant" in known
        else "name"
        if table == "tenants"
        else "(SELECT tenant FROM jobs WHERE id = job_id)"
    )
    return int(
        connection.scalar(text(f"SELECT count(*) FROM {table} WHERE {whose} = :tenant"), {"tenant": tenant}) or 0
    )


def test_a_tenant_sees_its_own_rows_of_each_table_and_no_others(filled: Store) -> None:
    with filled.database.begin() as connection:
        readable = [name for name, rights in tables(connection).items() if rights and name not in READ_BY_ALL]
        expected = {name: _own(connection, name, "acme") for name in readable}
        others = {name: _own(connection, name, "other") for name in readable}
    assert not [name for name, count in expected.items() if not count]
    assert not [name for name, count in others.items() if not count]
    with filled.database.of("acme").begin() as connection:
        assert {name: connection.scalar(text(f"SELECT count(*) FROM {name}")) for name in readable} == expected


def test_a_tenant_changes_and_deletes_no_rows_but_its_own(filled: Store) -> None:
    with filled.database.begin() as connection:
        writable = [name for name, rights in tables(connection).items() if "DELETE" in rights]
        expected = {name: _own(connection, name, "acme") for name in writable}
        column = {name: "tenant" if "tenant" in columns(connection, name) else "claim" for name in writable}
    assert len(writable) >= 10
    for name in writable:
        for statement in (f"UPDATE {name} SET {column[name]} = {column[name]}", f"DELETE FROM {name}"):
            with filled.database.of("acme").begin() as connection:
                assert connection.execute(text(statement)).rowcount == expected[name], statement
                connection.rollback()


def test_a_tenant_gives_nothing_to_another_and_takes_nothing(filled: Store) -> None:
    with filled.database.begin() as connection:
        owned = [
            n for n, rights in tables(connection).items() if "UPDATE" in rights and "tenant" in columns(connection, n)
        ]
    for name in owned:
        with (
            pytest.raises(ProgrammingError, match="row-level security"),
            filled.database.of("acme").begin() as connection,
        ):
            connection.execute(text(f"UPDATE {name} SET tenant = 'other'"))


def test_whoever_names_no_tenant_sees_nothing(filled: Store) -> None:
    with filled.database.begin() as connection:
        connection.execute(text(f"SET LOCAL ROLE {ROLE}"))
        for table in ("jobs", "batches", "claims", "messages", "events", "files", "tenants"):
            assert connection.scalar(text(f"SELECT count(*) FROM {table}")) == 0
    with pytest.raises(ProgrammingError, match="permission denied"), filled.database.of("acme").begin() as connection:
        connection.execute(text("SELECT * FROM api_keys"))


def test_the_role_ends_with_its_transaction(filled: Store) -> None:
    lone = Database.at(filled.database._engine.url.render_as_string(hide_password=False), connections=1)
    try:
        with lone.of("acme").begin() as connection:
            assert connection.scalar(text("SELECT count(DISTINCT tenant) FROM jobs")) == 1
        with lone.begin() as connection:
            assert connection.scalar(text("SELECT count(DISTINCT tenant) FROM jobs")) == 2
        Store(lone.of("acme")).submit(Submission(prompt="a"), max_failures=3, tenant="acme")  # copies as the owner
        with lone.single() as connection:
            assert connection.scalar(text("SELECT count(DISTINCT tenant) FROM jobs")) == 2
            assert connection.scalar(text("SELECT current_user")) != ROLE
    finally:
        lone.close()


def steps_of(store: Store, batch_id: UUID, job_id: UUID) -> list[Callable[[], Any]]:
    return [
        lambda: store.job(job_id),
        lambda: store.cancel(job_id),
        lambda: store.retry_job(job_id),
        lambda: store.batch(batch_id),
        lambda: store.batch_jobs(batch_id),
        lambda: store.pause_batch(batch_id, paused=True),
        lambda: store.prioritise_batch(batch_id, Priority.BULK),
        lambda: store.retry_batch(batch_id),
        lambda: store.cancel_batch(batch_id),
        lambda: store.delete_batch(batch_id),
    ]


def test_all_of_a_batchs_way_can_be_gone_through_a_tenants_own_store(store: Store) -> None:
    own = store.of("acme")
    batch_id = submitted(own, "acme")
    assert submitted(own, "acme") == batch_id, "by its key"
    assert [rejection.line for rejection in own.rejections(batch_id)] == [3]
    first, _ = own.batch_jobs(batch_id)
    assert (
        own.submit(Submission(prompt="a"), max_failures=3, tenant="acme", key=SubmissionKey("k", "f")).tenant == "acme"
    )
    assert own.cancel(first.id).state is State.CANCELLED
    assert own.retry_job(first.id).state is State.QUEUED
    assert own.pause_batch(batch_id, paused=True).paused
    assert {job.priority for job in own.prioritise_batch(batch_id, Priority.BULK) and own.batch_jobs(batch_id)} == {
        Priority.BULK
    }
    assert store.claim(Message(first.id, 2), uuid4()) is None, "it is paused"
    own.pause_batch(batch_id, paused=False)
    claim = store.claim(Message(first.id, own.job(first.id).claim + 1), uuid4())
    assert claim is not None
    assert own.cancel_batch(batch_id).counts[State.CANCELLED] == 2
    assert [entry["outcome"] for entry in own.history(first.id)] == ["cancelled"]
    assert own.retry_batch(batch_id, [State.CANCELLED]).counts[State.QUEUED] == 2
    own.refuse_batch("broken", [{"line": 1, "message": "no JSON"}], tenant="acme")
    own.delete_batch(batch_id)
    assert len(store.deletions(after_s=0)) == 1


def test_another_tenants_batch_is_not_there_for_any_step(store: Store) -> None:
    batch_id = submitted(store, "other")
    job = store.batch_jobs(batch_id)[0]
    for step in steps_of(store.of("acme"), batch_id, job.id):
        with pytest.raises(NotFound):
            step()
    assert store.of("acme").history(job.id) == []
    assert store.of("acme").rejections(batch_id) == []
    assert store.of("acme").farm(lease_s=60).counts[State.QUEUED] == 0
    after = store.batch(batch_id)
    assert (after.counts[State.QUEUED], after.paused) == (2, False)
    assert store.job(job.id) == job


def test_nothing_is_submitted_for_another_tenant(store: Store) -> None:
    own = store.of("acme")
    for submit in (
        lambda: own.submit(Submission(prompt="a"), max_failures=3, tenant="other"),
        lambda: own.submit_batch("b", [Submission(prompt="a")], max_failures=3, tenant="other"),
    ):
        with pytest.raises(ProgrammingError, match="row-level security"):
            submit()
    assert Search(store.database).jobs().found == []


def test_a_database_user_who_is_no_administrator_is_enough(servers: Settings) -> None:
    name, administrator = f"plain_{secrets.token_hex(4)}", servers.require("database_url")
    plain = sql.Identifier(name)
    with psycopg.connect(administrator, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'plain'").format(plain))
        connection.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(plain, plain))
        connection.execute(sql.SQL("GRANT {} TO {}").format(sql.Identifier(ROLE), plain))
    try:
        place = database_url(servers, name).partition("@")[2]
        url = f"postgresql://{name}:plain@{place}"
        schema.upgrade(url)
        store = Store.at(url)
        try:
            submitted(store.of("acme"), "acme")
            assert store.of("other").batches() == []
            assert store.of("acme").farm(lease_s=60).counts[State.QUEUED] == 2
        finally:
            store.close()
    finally:
        with psycopg.connect(administrator, autocommit=True) as connection:
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(plain))
            connection.execute(sql.SQL("DROP ROLE {}").format(plain))
