"""Schemathesis against the OpenAPI document of the running API: whatever is sent, no answer is the server's mistake."""

import json
from collections.abc import Iterator
from uuid import UUID

import httpx
import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from hypothesis.errors import FlakyFailure
from schemathesis import APIOperation, Case
from schemathesis.checks import not_a_server_error

from producer.jobs.contract import State
from producer.jobs.settings import Settings
from tests.farm import Farmhand, serving

EXAMPLES = 12
"""Of each operation, half of them of things that are there. Some 70 operations in some 30 s."""
NOBODY_DRAWS = ("POST", "/v1/images/generations", 504)
"""There is no worker here: that it waits in vain is the right answer."""
ROW = {"prompt": "a paper boat", "width": 64, "height": 64}
TIMEOUT_S = 60


@pytest.fixture
def api(settings: Settings) -> Iterator[httpx.Client]:
    own = settings.model_copy(update={"image_wait_s": 0.05, "webhook_private": True})
    with serving(own) as url, httpx.Client(base_url=url, timeout=TIMEOUT_S) as client:
        yield client


@pytest.fixture
def there(api: httpx.Client, settings: Settings) -> dict[str, str]:
    """Path parameters that lead to something. What is read has ended, so that streams do, and nobody touches it."""
    hand = Farmhand(settings)
    lines = "\n".join([json.dumps(ROW)] * 3).encode()
    ids = {}
    for reading in ("", "GET "):
        headers = {"Content-Type": "application/x-ndjson"}
        batch = api.post("/api/v1/batches", params={"name": "boats"}, content=lines, headers=headers).json()["id"]
        jobs = api.get(f"/api/v1/batches/{batch}/jobs").json()["jobs"]
        hand.succeed(hand.store.job(jobs[0]["id"]))
        ids |= {f"{reading}batch_id": batch, f"{reading}job_id": jobs[0 if reading else 1]["id"]}
    assert api.post(f"/api/v1/batches/{ids['GET batch_id']}/cancel").json()["counts"][State.CANCELLED] == 2
    hand.close()
    webhook = api.post("/api/v1/webhooks", json={"url": "http://127.0.0.1:9/"}).json()["id"]
    file = api.post("/v1/files", data={"purpose": "batch"}, files={"file": ("rows.jsonl", b"{}")}).json()["id"]
    key = api.post("/api/v1/keys", json={"name": "shop"}).json()["id"]
    ids |= {"webhook_id": webhook, "file_id": file, "key_id": key, "name": "acme"}
    return ids | {"/v1/batches name": f"batch_{UUID(ids['GET batch_id']).hex}"}


# The API is a thread of this process, and its libraries may use ``random`` just while Hypothesis makes up a request.
@pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")
def test_whatever_is_sent_no_answer_is_the_servers_mistake(api: httpx.Client, there: dict[str, str]) -> None:
    schema = schemathesis.openapi.from_url(f"{api.base_url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    operations.sort(key=lambda operation: operation.method.upper() == "DELETE")  # others want what is deleted
    assert len(operations) > 50
    mistakes = [mistake for operation in operations for mistake in mistakes_of(operation, there)]
    assert not mistakes, "\n\n".join(mistakes)


NO_URL = ("http://[", "http://[::1", "http://a\xe2\x84\x80", "//", "null", "", "\xff")
FORM = "multipart/form-data; boundary"
ODD_HEADERS: tuple[dict[str, str], ...] = (
    *({"Origin": origin} for origin in NO_URL),
    *({"Host": host} for host in ("[", "[::1", "127.0.0.1:x", "\xff")),
    *(
        {"Content-Type": of}
        for of in ("\xff", f"{FORM}*=x''%ff; boundary*0=\xff", f"{FORM}=\xff", f"{FORM}=", ";;=;*=")
    ),
    {"Authorization": "Bearer ovis_\xff"},
    {"Cookie": "ovis_key=\xff; =;;", "Origin": "http://["},
    {"Last-Event-ID": "\xff", "Accept": "\xff"},
)


def test_whatever_headers_are_sent_no_answer_is_the_servers_mistake(api: httpx.Client) -> None:
    described = api.get("/openapi.json").json()["paths"]
    asked = [("POST", path) for path, methods in described.items() if "post" in methods]
    assert len(asked) > 15
    mistakes = []
    for number, odd in enumerate(ODD_HEADERS):
        for method, path in [*asked, ("POST", "/login"), ("POST", "/logout"), ("GET", "/"), ("GET", "/api/v1/jobs")]:
            headers = {"Idempotency-Key": f"{number} {method} {path}".replace(" ", "-")} | odd
            raw = {name.encode(): value.encode("latin-1") for name, value in headers.items()}
            status = api.request(method, path, headers=raw).status_code
            mistakes += [(method, path, odd, status)] if status >= 500 else []
    assert not mistakes


def mistakes_of(operation: APIOperation, there: dict[str, str]) -> Iterator[str]:
    """How one operation can be made to answer 5xx, if it can."""

    @hypothesis.settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
    )
    @given(case=operation.as_strategy(), known=st.booleans())
    def ask(case: Case, known: bool) -> None:
        if known:
            lead(case, there)
        response = case.call(timeout=TIMEOUT_S)
        if (case.method, case.path, response.status_code) != NOBODY_DRAWS:
            case.validate_response(response, checks=[not_a_server_error])

    try:
        ask()
    except AssertionError as mistake:
        yield str(mistake)
    except FlakyFailure as once:  # it did not happen again
        yield from (f"once: {mistake!r}" for mistake in once.exceptions)


def lead(case: Case, there: dict[str, str]) -> None:
    """Let the case ask for what is there."""
    for name in case.path_parameters or {}:
        places = (f"{case.method} {name}", f"{case.path.rpartition('/')[0]} {name}", name)
        if found := next((there[place] for place in places if place in there), None):
            case.path_parameters[name] = found
