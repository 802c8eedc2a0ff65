from uuid import uuid4

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import inspect, text

from producer.jobs import schema
from producer.jobs.contract import State, Submission
from producer.jobs.errors import SchemaMismatch, SettingsError, Unavailable
from producer.jobs.postgres import connect
from producer.jobs.search import JobFilter, Search
from producer.jobs.settings import Settings
from producer.jobs.store import Store
from producer.jobs.table import metadata


@pytest.fixture
def url(settings: Settings) -> str:
    return settings.require("database_url")


def test_the_schema_goes_up_down_and_up_again(url: str) -> None:
    schema.downgrade(url)
    engine = connect(url)
    assert set(inspect(engine).get_table_names()) <= {"alembic_version"}
    assert inspect(engine).get_view_names() == []
    schema.upgrade(url)
    schema.upgrade(url)
    schema.check(url)
    assert set(metadata.tables) < set(inspect(engine).get_table_names())
    engine.dispose()


def test_the_tables_match_head(url: str) -> None:
    engine = connect(url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, metadata) == []
    engine.dispose()


def test_a_schema_behind_the_code_says_which_command_to_run(url: str) -> None:
    schema.downgrade(url)
    with pytest.raises(SchemaMismatch, match="run `ovis-batch migrate`"):
        schema.check(url)


def test_a_schema_ahead_of_the_code_says_to_update_it(url: str) -> None:
    engine = connect(url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(SchemaMismatch, match="update ovis-batch"):
        schema.check(url)


def test_a_postgres_that_refuses_is_told_as_such(url: str) -> None:
    with pytest.raises(Unavailable, match="Postgres"):
        schema.check("postgresql://nobody:wrong@127.0.0.1:1/none")


def test_missing_servers_say_how_to_get_them(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(SettingsError, match="ovis-batch up"):
        Settings(data_dir=tmp_path_factory.mktemp("empty")).require("database_url")


def test_the_views_for_dashboards_answer(url: str) -> None:
    engine = connect(url)
    with engine.connect() as connection:
        for view in ("ops_backlog", "ops_workers"):
            assert connection.execute(text(f"SELECT * FROM {view}")).all() == []
    engine.dispose()


def test_jobs_that_wait_while_the_farm_gets_lanes_keep_their_place(url: str) -> None:
    schema.downgrade(url, "0001")
    engine = connect(url)
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO batches (id, name) VALUES (gen_random_uuid(), 'b')"))
        for batch in ("NULL", "(SELECT id FROM batches)"):
            for priority in (2, 1):
                connection.execute(
                    text(
                        "INSERT INTO jobs (id, batch_id, priority, request, max_failures)"
                        f" VALUES (gen_random_uuid(), {batch}, {priority}, CAST(:request AS jsonb), 3)"
                    ),
                    {"request": Submission(prompt="a", width=250, height=250, steps=10).request().model_dump_json()},
                )
    engine.dispose()
    schema.upgrade(url)
    store = Store.at(url)
    jobs = Search(store.database).jobs().found
    holder = uuid4()
    assert store.lead(holder, leader_s=60)
    lanes = store.lanes()
    assert sorted((lane.batch_id is None, lane.priority.rank) for lane in lanes) == [
        (False, 1), (False, 2), (True, 1), (True, 2),
    ]  # fmt: skip
    messages = store.next_messages(holder, {lane.id: 9 for lane in lanes})
    assert {following.message.job_id for following in messages} == {job.id for job in jobs}
    assert {following.work for following in messages} == {jobs[0].request.work}
    assert store.submit(Submission(prompt="a"), max_failures=3).tenant == "default"
    assert len(store.lanes()) == 4, "a job alone goes into the lane that its like were given"
    store.close()


def test_batches_that_ended_before_are_finished_and_their_prompts_found_however_long(url: str) -> None:
    store, holder = Store.at(url), uuid4()
    long = [" ".join(f"{n}x{place}{'ж' * 33}" for place in range(150)) for n in range(100)]
    ended = store.submit_batch("ended", (Submission(prompt=prompt) for prompt in long), max_failures=3)
    waits = store.submit_batch("waits", [Submission(prompt="a")], max_failures=3)
    store.cancel_batch(ended.id)
    store.close()
    schema.downgrade(url, "0002")
    schema.upgrade(url)
    store = Store.at(url)
    job = store.batch_jobs(ended.id)[-1]
    assert store.batch(ended.id).finished_at == job.finished_at
    assert store.batch(ended.id).counts[State.CANCELLED] == 100
    assert store.batch(waits.id).finished_at is None
    assert store.lead(holder, leader_s=60)
    assert store.finish_batches(holder) == 0
    found = Search(store.database).jobs(JobFilter(prompt="99x149")).found
    assert [each.id for each in found] == [job.id]
    store.close()
