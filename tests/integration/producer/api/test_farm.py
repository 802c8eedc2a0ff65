"""What an operator asks of the API: the farm, health, metrics, the page, the description."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import httpx
import psycopg
import pytest
from pydantic import SecretStr

from producer.api import create_app, serve
from producer.jobs import schema
from producer.jobs.contract import State, Submission
from producer.jobs.errors import PortTaken, SchemaMismatch
from producer.jobs.settings import Settings
from tests.farm import Farmhand, free_port, serving

SERVE = """
import sys
from producer.api import serve
from producer.jobs.settings import Settings
serve(Settings.model_validate_json(sys.stdin.read()), announce=lambda url: print(url, flush=True))
"""


def test_the_farm_counts_its_jobs_and_shows_its_workers(api: httpx.Client, hand: Farmhand) -> None:
    hand.store.submit(Submission(prompt="a"), max_failures=3)
    hand.beat([{"job": "1", "step": 3, "steps": 50, "width": 64, "height": 64}])
    farm = api.get("/api/v1/farm").json()
    assert farm["counts"][State.QUEUED] == 1
    assert [worker["drawing"][0]["step"] for worker in farm["workers"]] == [3]


def test_alive_and_ready_are_told_apart(api: httpx.Client) -> None:
    assert api.get("/healthz").json() == {"status": "ok"}
    ready = api.get("/readyz")
    assert (ready.status_code, ready.json()) == (200, {"Postgres": "ok", "Redis": "ok", "S3": "ok"})


def test_a_missing_redis_and_bucket_are_named_while_jobs_are_still_taken(settings: Settings) -> None:
    away = settings.model_copy(update={"redis_url": SecretStr(f"redis://127.0.0.1:{free_port()}/0")})
    with serving(away) as url:
        ready = httpx.get(f"{url}/readyz")
        assert ready.status_code == 503
        assert ready.json()["Postgres"] == "ok"
        assert "Redis" in ready.json()["Redis"]
        assert "\n" not in ready.json()["Redis"]
        assert httpx.get(f"{url}/healthz").status_code == 200
        assert httpx.post(f"{url}/api/v1/jobs", json={"prompt": "a"}).status_code == 201
        assert 'ovis_dependency_up{dependency="Redis"} 0.0' in httpx.get(f"{url}/metrics").text


def test_strangers_are_told_no_address_of_what_is_away(settings: Settings) -> None:
    redis_url = SecretStr(f"redis://127.0.0.1:{free_port()}/0")
    with serving(settings.model_copy(update={"redis_url": redis_url, "require_keys": True})) as url:
        ready = httpx.get(f"{url}/readyz")
        assert (ready.status_code, ready.json()) == (503, {"Postgres": "ok", "Redis": "away", "S3": "ok"})


def test_another_sites_page_does_not_use_a_farm_without_keys(api: httpx.Client) -> None:
    body = {"name": "mine", "scopes": ["admin"]}
    for headers in (
        {"Host": "evil.example", "Origin": "http://evil.example"},
        {"Origin": "http://evil.example"},
    ):
        refused = api.post("/api/v1/keys", json=body, headers=headers)
        assert refused.status_code == 403
        assert "OVIS_REQUIRE_KEYS" in refused.json()["detail"]
    port = api.base_url.port
    for host in (f"localhost:{port}", f"[::1]:{port}"):
        assert api.get("/api/v1/farm", headers={"Host": host, "Origin": f"http://{host}"}).is_success


def test_without_postgres_every_door_says_so(settings: Settings) -> None:
    with serving(settings) as url, _postgres_away(settings):
        refused = httpx.get(f"{url}/api/v1/jobs", timeout=30)
        assert refused.status_code == 503
        assert refused.headers["content-type"] == "application/problem+json"
        assert refused.headers["retry-after"].isdecimal()
        page = httpx.get(f"{url}/", timeout=30)
        assert page.status_code == 503
        assert "goes on asking" in page.text
        assert httpx.get(f"{url}/overview", timeout=30).status_code == 503
        said = httpx.get(f"{url}/readyz", timeout=30).json()["Postgres"]
        assert ("Postgres" in said, "\n" in said) == (True, False)


@contextmanager
def _postgres_away(settings: Settings) -> Iterator[None]:
    """Refuse new connections to the test's own database, and end the ones there are."""
    name = urlsplit(settings.require("database_url")).path.lstrip("/")
    admin = settings.require("database_url").rpartition("/")[0] + "/postgres"
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
        try:
            yield
        finally:
            connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")


def test_metrics_tell_depth_outcomes_and_requests_by_template(api: httpx.Client, hand: Farmhand) -> None:
    jobs = [hand.store.submit(Submission(prompt="a", width=64, height=64), max_failures=3) for _ in range(3)]
    hand.succeed(jobs[0])
    hand.fail(jobs[1])
    api.get(f"/api/v1/jobs/{jobs[0].id}")
    api.get("/no/such/path/at/all")
    text = api.get("/metrics").text
    assert 'ovis_jobs{state="succeeded"} 1.0' in text
    assert 'ovis_backlog_jobs{priority="standard",standing="waiting"} 1.0' in text
    assert 'ovis_api_requests_total{method="GET",route="/api/v1/jobs/{job_id}",status="200"} 1.0' in text
    assert 'route="unknown",status="404"' in text
    assert str(jobs[0].id) not in text


def test_the_api_dispatches_what_it_takes_in(api: httpx.Client) -> None:
    api.post("/api/v1/jobs", json={"prompt": "a"})
    until = time.monotonic() + 10
    while "ovis_redis_messages 1.0" not in api.get("/metrics").text:
        assert time.monotonic() < until, "the job's message never came"
        time.sleep(0.05)


def test_the_description_names_every_schema_that_it_refers_to(api: httpx.Client) -> None:
    document = api.get("/openapi.json").json()
    references = set(re.findall(r"#/components/schemas/([\w-]+)", api.get("/openapi.json").text))
    assert references <= document["components"]["schemas"].keys()
    assert "prompt" in document["components"]["schemas"]["Submission"]["required"]
    assert set(document["paths"]["/api/v1/batches"]["post"]["requestBody"]["content"]) == {
        "application/json",
        "application/x-ndjson",
        "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet",
        "text/csv",
    }
    assert api.get("/docs").status_code == 200


def test_the_page_shows_the_farm_and_loads_nothing_from_elsewhere(api: httpx.Client, hand: Farmhand) -> None:
    job = hand.store.submit(Submission(prompt="<b>a boat</b>", width=64, height=64), max_failures=3)
    hand.succeed(job)
    hand.fail(hand.store.submit(Submission(prompt="too long"), max_failures=3), "300 tokens")
    hand.store.submit_batch("<i>autumn</i>", [Submission(prompt="a")], max_failures=3)
    hand.beat()
    page = api.get("/")
    assert page.status_code == 200
    for shown in (f"/api/v1/jobs/{job.id}/image", "&lt;i&gt;autumn", "300 tokens", "workbench"):
        assert shown in page.text
        assert shown in api.get("/overview").text
    assert "<b>a boat" not in page.text
    for asset in re.findall(r'(?:src|href)="(/static/[^"]+)"', page.text):
        assert api.get(asset).status_code == 200
    assert "default-src 'none'" in page.headers["content-security-policy"]


def test_a_schema_that_is_behind_stops_the_start_and_says_what_to_run(settings: Settings) -> None:
    schema.downgrade(settings.require("database_url"))
    with pytest.raises(SchemaMismatch, match="ovis-batch migrate"):
        serve(settings.model_copy(update={"api_port": free_port()}))


def test_a_taken_port_stops_the_start(settings: Settings) -> None:
    with serving(settings) as url, pytest.raises(PortTaken):
        serve(settings.model_copy(update={"api_port": urlsplit(url).port}))


def test_building_the_app_connects_to_nothing(settings: Settings) -> None:
    nowhere = SecretStr(f"postgresql://a:b@127.0.0.1:{free_port()}/x")
    app = create_app(settings.model_copy(update={"database_url": nowhere}))
    app.state.services.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_with_zero(settings: Settings, number: signal.Signals) -> None:
    own = settings.model_copy(update={"api_port": 0})
    plain = own.model_dump_json(exclude={"database_url", "redis_url", "s3_access_key_id", "s3_secret_access_key"})
    process = subprocess.Popen([sys.executable, "-c", SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(_with_secrets(plain, own))
        process.stdin.close()
        url = process.stdout.readline().strip()
        assert httpx.get(f"{url}/healthz").status_code == 200
        process.send_signal(number)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _with_secrets(plain: str, settings: Settings) -> str:
    secrets = ", ".join(
        f'"{name}": "{settings.require(name)}"'
        for name in ("database_url", "redis_url", "s3_access_key_id", "s3_secret_access_key")
    )
    return plain.rstrip("}") + ", " + secrets + "}"
