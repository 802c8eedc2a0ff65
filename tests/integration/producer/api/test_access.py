"""Keys at the door: who gets in, what each may do, and that one tenant finds nothing of another's."""

import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import httpx
import pytest

from producer.api import create_app, serve
from producer.api.access import COOKIE
from producer.jobs.contract import Scope, Submission
from producer.jobs.errors import SettingsError
from producer.jobs.keys import Key, Keys, new_key
from producer.jobs.search import Search
from producer.jobs.settings import Settings
from producer.jobs.store import Store
from tests.farm import Farmhand, environment, free_port, serving
from tests.integration.producer.api.test_jobs import assert_problem
from tests.waiting import until

JOBS, BATCHES = "/api/v1/jobs", "/api/v1/batches"
OPEN = {("GET", "/healthz"), ("GET", "/readyz")}
ADMINISTRATORS = {("PUT", "/api/v1/tenants/{name}"), ("DELETE", "/api/v1/keys/{key_id}")}
BODIES: dict[str, Any] = {
    "/api/v1/batches/{batch_id}/priority": {"priority": "bulk"},
    "/api/v1/tenants/{name}": {"weight": 2},
}
PAGE = {"Accept": "text/html,application/xhtml+xml"}


@pytest.fixture
def url(settings: Settings) -> Iterator[str]:
    """An API that asks everybody for a key."""
    with serving(settings.model_copy(update={"require_keys": True})) as base_url:
        yield base_url


Entering = Callable[..., httpx.Client]


@pytest.fixture
def entering(url: str, store: Store) -> Iterator[Entering]:
    """A client with a new key of the tenant."""
    with ExitStack() as clients:

        def enter(tenant: str = "acme", *scopes: Scope) -> httpx.Client:
            _, key = Keys(store.database).create(tenant, "test", scopes or (Scope.SUBMIT, Scope.READ))
            headers = {"Authorization": f"Bearer {key}"}
            return clients.enter_context(httpx.Client(base_url=url, headers=headers, timeout=60))

        yield enter


@pytest.fixture
def stranger(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


def operations(settings: Settings) -> list[tuple[str, str]]:
    """Every method and path of the API, as it describes itself."""
    paths = create_app(settings).openapi()["paths"]
    return [(method.upper(), path) for path, methods in paths.items() for method in methods]


def filled(path: str, ids: dict[str, str] | None = None) -> str:
    """The path with these ids in its places, or with any."""
    return re.sub(r"{(\w+)}", lambda place: (ids or {}).get(place[1], str(uuid4())), path)


def refused(response: httpx.Response, status: int) -> None:
    """Refused in the form of the door that was asked."""
    assert response.status_code == status, f"{response.request.method} {response.url}: {response.text}"
    if response.request.url.path.startswith("/v1/"):
        assert set(response.json()["error"]) >= {"message", "type", "code", "param"}
    else:
        assert_problem(response, status)


def test_without_a_key_every_path_but_the_named_is_closed(settings: Settings, stranger: httpx.Client) -> None:
    asked = [*operations(settings), ("GET", "/metrics"), ("GET", "/"), ("GET", "/overview")]
    assert len(asked) > 40
    for method, path in asked:
        if (method, path) not in OPEN:
            response = stranger.request(method, filled(path))
            refused(response, 401)
            assert response.headers["www-authenticate"] == "Bearer"
    for _, path in OPEN:
        assert stranger.get(path).is_success


def test_what_is_no_key_of_this_farm_opens_nothing(stranger: httpx.Client, store: Store) -> None:
    record, key = Keys(store.database).create("acme", "test", [Scope.ADMIN])
    swapped = key[:20] + key[21] + key[20] + key[22:]
    others = (new_key(), key[:-1], key + "0", key.lower(), swapped, record.shown, "sk-any")
    for given in (*(f"Bearer {other}" for other in others), key, f"Basic {key}", f"Token {key}"):
        if given != f"Bearer {key}":
            refused(stranger.get(JOBS, headers={"Authorization": given}), 401)
    assert stranger.get(JOBS, headers={"Authorization": f"bearer {key}"}).is_success


def test_a_body_is_not_waited_for_before_it_is_known_who_sends_it(url: str) -> None:
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=30) as caller:
        caller.sendall(f"POST {JOBS} HTTP/1.1\r\nHost: farm\r\nContent-Length: 99\r\n".encode())
        caller.sendall(b"Content-Type: application/json\r\n\r\n")
        assert caller.recv(100).startswith(b"HTTP/1.1 401")


def test_a_revoked_key_opens_nothing_from_the_next_request_on(entering: Entering, store: Store) -> None:
    client = entering()
    assert client.get(JOBS).is_success
    (record,) = Keys(store.database).list()
    assert record.used_at is not None
    Keys(store.database).revoke(record.id)
    refused(client.get(JOBS), 401)


def test_a_key_is_for_what_its_scopes_say(entering: Entering) -> None:
    reader, submitter, admin = (
        entering("acme", Scope.READ),
        entering("acme", Scope.SUBMIT),
        entering("acme", Scope.ADMIN),
    )
    job = submitter.post(JOBS, json={"prompt": "a boat"})
    assert job.status_code == 201
    assert reader.get(f"{JOBS}/{job.json()['id']}").is_success
    refused(submitter.get(JOBS), 403)
    refused(submitter.get("/v1/models"), 403)
    refused(reader.post(JOBS, json={"prompt": "a boat"}), 403)
    refused(reader.post(f"{JOBS}/{job.json()['id']}/cancel"), 403)
    for client in (reader, submitter, entering()):
        refused(client.post("/api/v1/keys", json={"name": "mine", "scopes": ["admin"]}), 403)
        refused(client.get("/api/v1/keys"), 403)
        refused(client.put("/api/v1/tenants/acme", json={"weight": 100}), 403)
        refused(client.get("/metrics"), 403)
    assert admin.get("/metrics").is_success
    assert admin.post(JOBS, json={"prompt": "a boat"}, params={"tenant": "other"}).json()["tenant"] == "other"
    assert len(admin.get(JOBS).json()["jobs"]) == 2


def test_whoever_submits_does_so_for_its_own_tenant(entering: Entering) -> None:
    client = entering("acme")
    body = {"name": "boats", "jobs": [{"prompt": "a boat"}]}
    for path, json in ((JOBS, {"prompt": "a boat"}), (BATCHES, body)):
        assert client.post(path, json=json).json()["tenant"] == "acme"
        assert client.post(path, json=json, params={"tenant": "acme"}).status_code == 201
        refused(client.post(path, json=json, params={"tenant": "other"}), 403)
    assert entering("other").get(JOBS).json()["jobs"] == []


def test_keys_are_made_listed_and_revoked_by_an_administrator(entering: Entering, stranger: httpx.Client) -> None:
    admin = entering("boss", Scope.ADMIN)
    made = admin.post("/api/v1/keys", json={"name": "web shop", "tenant": "acme"})
    assert made.status_code == 201
    assert made.headers["cache-control"] == "no-store"
    key = made.json()["key"]
    own = {"Authorization": f"Bearer {key}"}
    assert (made.json()["tenant"], made.json()["scopes"]) == ("acme", ["read", "submit"])
    assert stranger.post(JOBS, json={"prompt": "a"}, headers=own).json()["tenant"] == "acme"
    listed = admin.get("/api/v1/keys")
    assert [entry["name"] for entry in listed.json()["keys"]] == ["test", "web shop"]
    assert key not in listed.text
    gone = admin.delete(made.headers["location"])
    assert gone.json()["revoked_at"] is not None
    refused(stranger.get(JOBS, headers=own), 401)
    refused(admin.delete(f"/api/v1/keys/{uuid4()}"), 404)
    for wrong in (
        {},
        {"name": ""},
        {"name": "a", "scopes": []},
        {"name": "a", "scopes": ["root"]},
        {"name": "a", "x": 1},
    ):
        refused(admin.post("/api/v1/keys", json=wrong), 422)


@dataclass(frozen=True)
class Belongings:
    """All that one tenant has, by the names that the API's paths have for it."""

    ids: list[dict[str, str]]
    names: list[str]  # what must stand in no other tenant's answer


def belongings(client: httpx.Client, admin: httpx.Client, hand: Farmhand, store: Store, key: Key) -> Belongings:
    """A batch with a drawn image, a rejected line, a webhook with a delivery, an uploaded file, and what /v1 makes of
    the batch."""
    lines = b'{"prompt": "secret boat", "width": 64, "height": 64}\n' * 3 + b'{"width": 1}\n'
    answer = client.post(
        BATCHES,
        content=lines,
        headers={"Content-Type": "application/x-ndjson"},
        params={"name": "secret boats", "partial": "true"},
    )
    assert answer.status_code == 201, answer.text
    batch_id = answer.json()["id"]
    drawn, queued, _ = store.batch_jobs(batch_id)
    hand.beat()
    hand.succeed(drawn)
    webhook = client.post("/api/v1/webhooks", json={"url": "https://secret.example/hook"})
    assert webhook.status_code == 201, webhook.text
    file = client.post("/v1/files", files={"file": ("secret.jsonl", b"{}\n")}, data={"purpose": "batch"})
    assert file.is_success, file.text
    as_openai = client.get(f"/v1/batches/batch_{batch_id.replace('-', '')}")
    assert as_openai.is_success, as_openai.text
    files = [file.json()["id"], *(as_openai.json()[f"{part}_file_id"] for part in ("input", "output", "error"))]
    ids = [
        {
            "job_id": job,
            "batch_id": batch_id,
            "webhook_id": webhook.json()["id"],
            "delivery_id": str(uuid4()),
            "file_id": file_id,
            "name": as_openai.json()["id"],
            "key_id": str(key.id),
        }
        for job, file_id in zip((str(drawn.id), str(queued.id)) * 2, filter(None, files), strict=False)
    ]
    return Belongings(
        ids, ["secret", str(drawn.id), str(queued.id), batch_id, webhook.json()["id"], *filter(None, files)]
    )


def test_nothing_of_another_tenants_is_found_by_any_path(
    settings: Settings, entering: Entering, hand: Farmhand, store: Store
) -> None:
    owner, admin = entering("other"), entering("boss", Scope.ADMIN)
    theirs = belongings(owner, admin, hand, store, Keys(store.database).list()[0])
    before = [owner.get(f"{BATCHES}/{theirs.ids[0]['batch_id']}{part}").json() for part in ("", "/jobs", "/rejections")]
    thief = entering("acme")
    asked = 0
    for method, path in operations(settings):
        if "{" not in path:
            continue
        for ids in theirs.ids:
            response = thief.request(method, filled(path, ids), json=BODIES.get(path))
            refused(response, 403 if (method, path) in ADMINISTRATORS else 404)
            assert "secret" not in response.text
            asked += 1
    assert asked > 50
    after = [owner.get(f"{BATCHES}/{theirs.ids[0]['batch_id']}{part}").json() for part in ("", "/jobs", "/rejections")]
    assert after == before, "something was changed"


def test_nothing_of_another_tenants_stands_in_a_list_or_on_the_page(
    settings: Settings, entering: Entering, hand: Farmhand, store: Store
) -> None:
    owner, admin = entering("other"), entering("boss", Scope.ADMIN)
    theirs = belongings(owner, admin, hand, store, Keys(store.database).list()[0])
    store.set_tenant("other", {"max_queued": 77})
    hand.beat([{"job": theirs.ids[0]["job_id"], "step": 3, "steps": 50}])
    thief = entering("acme")
    lists = [path for method, path in operations(settings) if method == "GET" and "{" not in path]
    assert len(lists) >= 8
    for path in [*lists, "/", "/overview", f"{JOBS}?prompt=secret", f"{JOBS}?tenant=other", f"{BATCHES}?tenant=other"]:
        response = thief.get(path)
        for name in (*theirs.names, '"other"'):
            assert name not in response.text, f"{path} tells {name}"
    assert "secret" in owner.get(f"{JOBS}?prompt=secret").text, "its owner finds it"
    assert thief.get("/api/v1/farm").json()["counts"]["succeeded"] == 0


def test_another_tenants_file_makes_no_batch_and_its_key_of_submission_is_free(
    entering: Entering, hand: Farmhand, store: Store
) -> None:
    owner, thief = entering("other"), entering("acme")
    file = owner.post("/v1/files", files={"file": ("a.jsonl", b"{}\n")}, data={"purpose": "batch"}).json()["id"]
    body = {"input_file_id": file, "endpoint": "/v1/images/generations", "completion_window": "24h"}
    assert thief.post("/v1/batches", json=body).status_code in {400, 404}
    headers = {"Idempotency-Key": "same"}
    first = owner.post(JOBS, json={"prompt": "a secret boat", "seed": 1}, headers=headers)
    second = thief.post(JOBS, json={"prompt": "a secret boat", "seed": 1}, headers=headers)
    assert (first.status_code, second.status_code) == (201, 201)
    assert first.json()["id"] != second.json()["id"]
    assert second.json()["tenant"] == "acme"


def test_more_requests_a_second_than_allowed_are_told_when_to_come_again(entering: Entering, store: Store) -> None:
    store.set_tenant("acme", {"max_requests_s": 0.02})
    client, other = entering("acme"), entering("other")
    assert client.get(JOBS).is_success
    response = client.get(JOBS)
    refused(response, 429)
    assert 1 <= int(response.headers["retry-after"]) <= 50
    assert client.get("/v1/models").status_code == 429
    assert other.get(JOBS).is_success


def test_limits_are_set_over_http_and_hold_at_submission(entering: Entering) -> None:
    admin, client = entering("boss", Scope.ADMIN), entering("acme")
    changed = admin.put("/api/v1/tenants/acme", json={"max_queued": 2, "max_a_day": 3})
    assert changed.json() == {
        "name": "acme", "weight": 1.0, "max_queued": 2, "max_a_day": 3, "max_running": None, "max_requests_s": None,
    }  # fmt: skip
    assert client.get("/api/v1/tenants").json()["tenants"] == [changed.json()]
    assert entering("other").get("/api/v1/tenants").json()["tenants"] == []
    body = {"name": "boats", "jobs": [{"prompt": "a boat"}] * 3}
    refused(client.post(BATCHES, json=body), 422)  # however long it waits
    assert client.get(JOBS).json()["jobs"] == []
    jobs = [client.post(JOBS, json={"prompt": "a boat"}) for _ in range(3)]
    assert [job.status_code for job in jobs] == [201, 201, 429]
    response = client.post(BATCHES, json=body | {"jobs": [{"prompt": "a boat"}] * 2})
    refused(response, 429)
    assert int(response.headers["retry-after"]) >= 1
    assert client.get(BATCHES).json()["batches"] == []
    assert client.post(f"{JOBS}/{jobs[0].json()['id']}/cancel").is_success
    assert client.post(JOBS, json={"prompt": "a boat"}).status_code == 201
    admin.put("/api/v1/tenants/acme", json={"max_queued": None})
    refused(client.post(JOBS, json={"prompt": "a boat"}), 429)
    admin.put("/api/v1/tenants/acme", json={"max_a_day": None})
    assert client.post(JOBS, json={"prompt": "a boat"}).status_code == 201


def test_on_the_loopback_nothing_is_needed_and_a_key_that_is_given_is_checked(api: httpx.Client, store: Store) -> None:
    assert api.get(JOBS).is_success
    assert api.put("/api/v1/tenants/acme", json={"weight": 2}).is_success
    assert api.post(JOBS, json={"prompt": "a"}, params={"tenant": "acme"}).json()["tenant"] == "acme"
    _, key = Keys(store.database).create("other", "test", [Scope.SUBMIT, Scope.READ])
    own = {"Authorization": f"Bearer {key}"}
    assert api.post(JOBS, json={"prompt": "a"}, headers=own).json()["tenant"] == "other"
    assert [job["tenant"] for job in api.get(JOBS, headers=own).json()["jobs"]] == ["other"]
    refused(api.get(JOBS, headers={"Authorization": f"Bearer {new_key()}"}), 401)
    assert api.get(JOBS, headers={"Authorization": "Bearer any"}).is_success, "clients that must send something"


def test_a_person_logs_in_sees_the_own_farm_and_logs_out(
    stranger: httpx.Client, store: Store, hand: Farmhand, url: str
) -> None:
    for tenant in ("acme", "other"):
        store.submit_batch(
            f"boats of {tenant}", [Submission(prompt="a boat", width=64, height=64)], max_failures=3, tenant=tenant
        )
    job = next(job for job in Search(store.database).jobs().found if job.tenant == "acme")
    hand.beat()
    body = hand.succeed(job)
    _, key = Keys(store.database).create("acme", "browser", [Scope.READ, Scope.SUBMIT])
    assert stranger.get("/", headers=PAGE).headers["location"] == "/login"
    form = stranger.get("/login")
    assert form.is_success
    assert "form-action 'self'" in form.headers["content-security-policy"]
    wrong = stranger.post("/login", data={"key": new_key()})
    assert wrong.status_code == 401
    assert 'role="alert"' in wrong.text
    assert COOKIE not in stranger.cookies
    right = stranger.post("/login", data={"key": f" {key} "}, headers={"Origin": url})
    assert (right.status_code, right.headers["location"]) == (303, "/")
    marks = right.headers["set-cookie"].lower()
    assert "httponly" in marks
    assert "samesite=strict" in marks
    page = stranger.get("/", headers=PAGE)
    assert "boats of acme" in page.text
    assert "boats of other" not in page.text
    assert 'action="/logout"' in page.text
    assert httpx.get(stranger.get(f"{JOBS}/{job.id}/image").headers["location"]).content == body
    ours = {"Origin": url}
    refused(stranger.post(JOBS, json={"prompt": "a"}, headers={"Origin": "http://127.0.0.1:1"}), 403)
    assert stranger.post(JOBS, json={"prompt": "a"}, headers=ours).json()["tenant"] == "acme"
    refused(stranger.post("/logout", headers={"Origin": "http://evil.example"}), 403)
    assert stranger.post("/logout", headers=ours).headers["location"] == "/login"
    assert COOKIE not in stranger.cookies
    assert stranger.get("/", headers=PAGE).status_code == 303


@pytest.mark.parametrize("origin", ["http://[", "http://[::1", "http://a\u2100", "http://]", "null"])
def test_an_origin_that_is_no_url_is_another_sites(api: httpx.Client, origin: str) -> None:
    headers = {"Origin": origin.encode()}
    refused(api.post(JOBS, json={"prompt": "a"}, headers=headers), 403)
    refused(api.post("/login", data={"key": new_key()}, headers=headers), 403)
    refused(api.post("/logout", headers=headers), 403)
    assert api.get(JOBS, headers=headers).json()["jobs"] == []


def test_a_browser_whose_key_was_revoked_is_led_to_the_form(stranger: httpx.Client, store: Store) -> None:
    record, key = Keys(store.database).create("acme", "browser", [Scope.READ])
    stranger.post("/login", data={"key": key})
    assert stranger.get("/", headers=PAGE).is_success
    Keys(store.database).revoke(record.id)
    assert stranger.get("/", headers=PAGE).headers["location"] == "/login"
    assert COOKIE not in stranger.cookies, "the old key is forgotten"


def test_nobody_listens_beyond_the_loopback_without_an_administrators_key(settings: Settings, store: Store) -> None:
    beyond = settings.model_copy(update={"api_host": "0.0.0.0", "api_port": 0})
    Keys(store.database).create("acme", "no administrator", [Scope.SUBMIT, Scope.READ])
    with pytest.raises(SettingsError, match="ovis-batch keys create --admin"):
        serve(beyond)


def test_beyond_the_loopback_keys_are_required_and_the_first_is_made_on_the_command_line(settings: Settings) -> None:
    beyond = settings.model_copy(update={"api_host": "0.0.0.0", "api_port": free_port()})
    command = [sys.executable, "-m", "producer.cli"]
    variables = environment(beyond)
    made = subprocess.run(
        [*command, "keys", "create", "--admin", "boss"], env=variables, capture_output=True, text=True, check=True
    )
    key = made.stdout.strip()
    with subprocess.Popen([*command, "api"], env=variables) as process:
        try:
            until(lambda: _answers(beyond.base_url))
            assert httpx.get(f"{beyond.base_url}{JOBS}").status_code == 401
            own = {"Authorization": f"Bearer {key}"}
            assert httpx.get(f"{beyond.base_url}{JOBS}", headers=own).json()["jobs"] == []
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
    listed = subprocess.run([*command, "keys", "list"], env=variables, capture_output=True, text=True, check=True)
    assert "boss" in listed.stdout
    assert key not in listed.stdout
    key_id = listed.stdout.split()[0]
    assert subprocess.run([*command, "keys", "revoke", key_id], env=variables, check=True).returncode == 0
    unknown = subprocess.run([*command, "keys", "revoke", str(uuid4())], env=variables, capture_output=True)
    assert unknown.returncode == 4


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz").is_success
    except httpx.TransportError:
        return False
