"""What docker/ says of the product, held against the product: a setting that is renamed fails here, not in a farm."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from producer.jobs.settings import Settings

ROOT = Path(__file__).parents[3]
COMPOSE = ROOT / "docker" / "compose.yaml"
EXAMPLE = ROOT / "docker" / "example.env"
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE.read_text())["services"]
OURS = ("api", "dispatcher", "migrate", "worker", "worker-cpu")
SETTINGS = {f"OVIS_{name.upper()}" for name in Settings.model_fields}
MADE_BY_A_PERSON = {"POSTGRES_PASSWORD", "REDIS_PASSWORD", "S3_ACCESS_KEY_ID", "S3_SECRET_ACCESS_KEY"}


def environment(service: str) -> dict[str, str]:
    return dict(SERVICES[service].get("environment", {}))


def example() -> dict[str, str]:
    lines = (line.strip() for line in EXAMPLE.read_text().splitlines())
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def interpolated() -> Iterator[tuple[str, str]]:
    """Every ``${NAME...}`` of the compose file: the name, and what follows it."""
    return ((found[1], found[2]) for found in re.finditer(r"(?<!\$)\$\{(\w+)([^}]*)\}", COMPOSE.read_text()))


@pytest.mark.parametrize("service", OURS)
def test_every_variable_of_our_services_is_a_setting(service: str) -> None:
    assert set(environment(service)) <= SETTINGS


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_every_variable_of_an_image_is_a_setting(path: Path) -> None:
    assert set(re.findall(r"\bOVIS_\w+", path.read_text())) <= SETTINGS


@pytest.mark.parametrize("service", OURS)
def test_our_services_are_given_every_address_and_key(service: str) -> None:
    given = set(environment(service))
    assert {"OVIS_DATABASE_URL", "OVIS_REDIS_URL", "OVIS_S3_ENDPOINT_URL", "OVIS_S3_PUBLIC_ENDPOINT_URL"} <= given
    assert {"OVIS_S3_ACCESS_KEY_ID", "OVIS_S3_SECRET_ACCESS_KEY"} <= given


@pytest.mark.parametrize("service", OURS)
def test_the_settings_accept_what_our_services_are_given(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = example() | dict.fromkeys(MADE_BY_A_PERSON, "secret")
    for name, text in environment(service).items():
        monkeypatch.setenv(name, re.sub(r"\$\{(\w+)[^}]*\}", lambda found: values[found[1]], str(text)))
    settings = Settings()
    assert settings.require("database_url") == "postgresql://ovis:secret@postgres:5432/ovis"
    assert settings.s3_public_endpoint_url == "http://127.0.0.1:7070"


def test_no_secret_has_a_default() -> None:
    for name, rest in interpolated():
        assert rest.startswith(":?") == (name in MADE_BY_A_PERSON), name
    assert {name for name in MADE_BY_A_PERSON if example()[name]} == set()


def test_the_example_names_what_the_compose_file_asks_for() -> None:
    assert set(example()) - {"COMPOSE_PROJECT_NAME"} == {name for name, _ in interpolated()}


@pytest.mark.parametrize("service", SERVICES)
def test_every_service_is_pinned_and_confined(service: str) -> None:
    facts = SERVICES[service]
    assert re.search(r":v?\d+\.\d+(\.\d+)?(-\w+)?$", facts["image"])
    assert facts["read_only"]
    assert facts["init"]
    assert facts["cap_drop"] == ["ALL"]
    assert facts["security_opt"] == ["no-new-privileges:true"]


@pytest.mark.parametrize("service", SERVICES)
def test_a_volume_that_is_named_is_declared(service: str) -> None:
    declared = yaml.safe_load(COMPOSE.read_text())["volumes"]
    assert {volume.split(":")[0] for volume in SERVICES[service].get("volumes", [])} <= set(declared)


@pytest.mark.parametrize("service", ["worker", "worker-cpu"])
def test_a_container_is_not_killed_before_its_supervisor_would_kill_the_workers(service: str) -> None:
    assert float(SERVICES[service]["stop_grace_period"].removesuffix("s")) > Settings().kill_after_s


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_what_an_image_copies_exists_and_is_not_ignored(path: Path) -> None:
    allowed = {line[1:].rstrip("/") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"}
    for words in re.findall(r"^COPY (?!--from)(.+)$", path.read_text(), re.MULTILINE):
        for source in words.split()[:-1]:
            assert source == "." or ((ROOT / source).exists() and source in allowed), source
    assert {name for name in allowed if not (ROOT / name).exists()} == set()
