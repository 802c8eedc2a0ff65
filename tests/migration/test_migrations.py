import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import inspect, text

from producer.jobs import schema
from producer.jobs.errors import SchemaMismatch, SettingsError, Unavailable
from producer.jobs.settings import Settings
from producer.jobs.store import connect
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
