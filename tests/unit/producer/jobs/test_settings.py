"""What a person is told of a setting that cannot be used, and where the API of the settings answers."""

import json
from pathlib import Path

import pytest

from producer.jobs.errors import SettingsError, Unavailable
from producer.jobs.settings import Settings, load_settings, told


@pytest.mark.parametrize(
    ("variable", "value", "form"),
    [
        ("OVIS_DATABASE_URL", "garbage", "postgresql://"),
        ("OVIS_DATABASE_URL", "mysql://u:hush@host/db", "postgresql://"),
        ("OVIS_DATABASE_URL", "postgresql://u:hush@host:port/db", "postgresql://"),
        ("OVIS_DATABASE_URL", "postgresql://u:hush@more@host/db", "percent-encoded"),
        ("OVIS_REDIS_URL", "localhost:6379", "redis://"),
        ("OVIS_REDIS_URL", "redis://:hush@host:99999/0", "redis://"),
        ("OVIS_REDIS_URL", "redis://:hush@host:6379/first", "redis://"),
        ("OVIS_REDIS_URL", "redis://:hush/more@host:6379/0", "percent-encoded"),
        ("OVIS_S3_ENDPOINT_URL", "localhost:9000", "http://host:port"),
        ("OVIS_S3_PUBLIC_ENDPOINT_URL", "https://", "http://host:port"),
        ("OVIS_API_URL", "http://u:hush@host", "http://host:port"),
        ("OVIS_MAX_FAILURES", "32768", "32767"),
        ("OVIS_LOG_LEVEL", "LOUD", "'DEBUG'"),
    ],
)
def test_a_malformed_setting_is_told_by_its_variable_and_form_and_never_with_a_password(
    variable: str, value: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    words = str(caught.value)
    assert words.startswith(f"{variable}: ")
    assert form in words
    assert "hush" not in words


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("database_url", "postgresql://host/db"),
        ("database_url", "postgres://u:p%40ss@host:5432/db?sslmode=require"),
        ("database_url", "postgresql+psycopg://u:p#[/?ss@[::1]:5432/db"),
        ("database_url", "postgresql:///db?host=/var/run/postgresql"),
        ("redis_url", "redis://host"),
        ("redis_url", "rediss://u:p@host:6379/15?ssl_cert_reqs=required"),
        ("redis_url", "redis://:p@[::1]:6379/0"),
        ("s3_endpoint_url", "http://[::1]:9000"),
        ("s3_endpoint_url", "https://account.r2.example.com/prefix"),
        ("api_url", "https://farm.example.com/"),
    ],
)
def test_an_address_that_its_library_reads_is_taken(name: str, value: str) -> None:
    assert Settings.model_validate({name: value}).require(name) == value


def test_a_malformed_address_of_an_embedded_server_is_told_without_its_password(tmp_path: Path) -> None:
    (tmp_path / "services.json").write_text(json.dumps({"redis_url": "hush"}))
    with pytest.raises(SettingsError, match="OVIS_REDIS_URL") as caught:
        load_settings(data_dir=tmp_path)
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
        ("fe80::1", "http://[fe80::1]:8000"),
        ("farm.local", "http://farm.local:8000"),
    ],
)
def test_the_base_url_is_one_that_a_client_on_this_machine_can_open(host: str, url: str) -> None:
    assert Settings(api_host=host).base_url == url


def test_a_free_port_alone_leads_nowhere() -> None:
    with pytest.raises(SettingsError, match="OVIS_API_URL"):
        _ = Settings(api_port=0).base_url
    assert Settings(api_port=0, api_url="http://farm").base_url == "http://farm"


@pytest.mark.parametrize(
    ("dependency", "variable"),
    [("Postgres", "OVIS_DATABASE_URL"), ("Redis", "OVIS_REDIS_URL"), ("S3", "OVIS_S3_ENDPOINT_URL")],
)
def test_a_server_that_is_away_is_told_with_what_to_do(dependency: str, variable: str) -> None:
    assert told(Unavailable(dependency, "refused")).startswith(f"{dependency}: refused: start it, or check {variable}")


def test_other_errors_are_told_in_their_own_words() -> None:
    assert told(SettingsError("set it")) == "set it"


def test_a_variable_that_is_no_setting_is_told_with_the_setting_that_it_may_be(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for variable in ("OVIS_MODLE", "OVIS_XYZZY", "OVIS_MODEL", "ovis_device"):
        monkeypatch.setenv(variable, "tiny")
    load_settings()
    assert caplog.messages == [
        "OVIS_MODLE is no setting, and nothing reads it: is it OVIS_MODEL?",
        "OVIS_XYZZY is no setting, and nothing reads it",
    ]


def test_a_process_whose_supervisor_has_told_it_says_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OVIS_MODLE", "tiny")
    monkeypatch.setenv("OVIS_SUPERVISED_BY", "/srv/farm/processes.json")
    load_settings()
    assert caplog.messages == []
