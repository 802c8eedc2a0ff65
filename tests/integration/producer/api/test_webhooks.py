"""Webhooks over HTTP: made, told, seen, sent again, deleted."""

from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import httpx
import pytest
from standardwebhooks import Webhook as Verifier

from producer.jobs.contract import Scope
from producer.jobs.keys import Keys
from producer.jobs.settings import Settings
from producer.jobs.store import Store
from tests.farm import serving
from tests.integration.producer.api.test_jobs import assert_problem
from tests.integration.producer.jobs.test_deliverer import Receiver, receiving
from tests.waiting import until

WEBHOOKS, BATCHES = "/api/v1/webhooks", "/api/v1/batches"
HERE = "https://hooks.example.com/a"


@pytest.fixture
def api_at_home(settings: Settings) -> Iterator[httpx.Client]:
    """The API of a farm whose webhooks may lead into its own network."""
    with (
        serving(settings.model_copy(update={"webhook_private": True})) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        yield client


def cancelled_batch(api: httpx.Client) -> dict[str, Any]:
    batch = api.post(BATCHES, json={"name": "boats", "jobs": [{"prompt": "a boat"}]}).json()
    cancelled: dict[str, Any] = api.post(f"{BATCHES}/{batch['id']}/cancel").json()
    return cancelled


def test_a_receiver_is_told_when_a_batch_is_finished_and_again_by_hand(api_at_home: httpx.Client) -> None:
    with receiving(Receiver()) as receiver:
        answer = api_at_home.post(WEBHOOKS, json={"url": receiver.url})
        assert answer.status_code == 201
        made = answer.json()
        assert answer.headers["location"] == f"{WEBHOOKS}/{made['id']}"
        batch = cancelled_batch(api_at_home)
        until(lambda: receiver.got)
        headers, body = receiver.got[0]
        payload = Verifier(made["secret"]).verify(body, headers)
        assert (payload["type"], payload["data"]["batch_id"]) == ("batch.finished", batch["id"])
        assert payload["data"]["counts"]["cancelled"] == 1
        path = f"{WEBHOOKS}/{made['id']}/deliveries"
        until(lambda: api_at_home.get(path).json()["deliveries"][0]["delivered_at"])
        (delivery,) = api_at_home.get(path).json()["deliveries"]
        assert (delivery["id"], delivery["last_status"], delivery["attempts"]) == (headers["webhook-id"], 204, 1)
        assert api_at_home.post(f"{path}/{delivery['id']}/resend").status_code == 200
        until(lambda: len(receiver.got) == 2)
        assert receiver.ids[0] == receiver.ids[1]


def test_webhooks_are_listed_without_their_secrets_and_deleted(api: httpx.Client) -> None:
    made = api.post(WEBHOOKS, json={"url": HERE, "kinds": ["job.failed", "batch.finished"]}).json()
    secret = made.pop("secret")
    assert secret.startswith("whsec_")
    assert made["kinds"] == ["batch.finished", "job.failed"]
    assert api.get(WEBHOOKS).json() == {"webhooks": [made]}
    assert api.get(f"{WEBHOOKS}/{made['id']}").json() == made
    assert api.post(f"{WEBHOOKS}/{made['id']}/enable").json() == made
    assert api.get(f"{WEBHOOKS}/{made['id']}/deliveries").json() == {"deliveries": [], "next": None}
    assert api.delete(f"{WEBHOOKS}/{made['id']}").status_code == 204
    assert_problem(api.get(f"{WEBHOOKS}/{made['id']}"), 404)
    assert_problem(api.delete(f"{WEBHOOKS}/{made['id']}"), 404)


def test_deliveries_are_read_page_by_page(api: httpx.Client, store: Store) -> None:
    made = api.post(WEBHOOKS, json={"url": HERE, "kinds": ["job.cancelled"]}).json()
    batch = api.post(BATCHES, json={"name": "boats", "jobs": [{"prompt": "a boat"}] * 5}).json()
    store.cancel_batch(batch["id"])
    path = f"{WEBHOOKS}/{made['id']}/deliveries"
    seen, cursor = [], None
    while True:
        page = api.get(path, params={"limit": 2} | ({"cursor": cursor} if cursor else {})).json()
        seen += [delivery["id"] for delivery in page["deliveries"]]
        if (cursor := page["next"]) is None:
            break
    assert len(seen) == len(set(seen)) == 5


BAD = (
    {"url": "http://example.com/"},
    {"url": "https://user:secret@example.com/"},
    {"url": "x"},
    {"url": "https://\x00/"},
    *({"url": f"https://{host}/"} for host in ("127.0.0.1", "10.0.0.7:8443", "169.254.169.254", "127.1", "2130706433")),
    *({"url": f"https://{host}/"} for host in ("[::1]", "[fd00::1]", "[fe80::1]", "[::ffff:10.0.0.1]")),
    {"url": HERE, "kinds": []},
    {"url": HERE, "kinds": ["job.progress"]},
    {"url": HERE, "kinds": ["x"]},
    {"url": HERE, "secret": "whsec_mine"},
    {},
)


def test_what_is_no_webhook_is_refused(api: httpx.Client) -> None:
    for body in BAD:
        assert_problem(api.post(WEBHOOKS, json=body), 422)
    assert api.get(WEBHOOKS).json() == {"webhooks": []}
    for path in (f"{WEBHOOKS}/{uuid4()}", f"{WEBHOOKS}/{uuid4()}/deliveries"):
        assert_problem(api.get(path), 404)
    assert_problem(api.post(f"{WEBHOOKS}/{uuid4()}/deliveries/{uuid4()}/resend"), 404)


def test_names_and_public_addresses_are_taken_and_looked_at_when_something_is_sent(api: httpx.Client) -> None:
    for host in ("localhost", "inside.example", "1.1.1.1", "[2606:4700:4700::1111]"):
        assert api.post(WEBHOOKS, json={"url": f"https://{host}/"}).status_code == 201


def test_the_farms_own_network_is_taken_where_it_may_be(api_at_home: httpx.Client) -> None:
    for host in ("127.0.0.1", "[::1]", "10.0.0.7"):
        assert api_at_home.post(WEBHOOKS, json={"url": f"http://{host}/"}).status_code == 201


def test_a_tenant_sees_and_changes_only_its_own(api: httpx.Client, store: Store) -> None:
    def client_of(tenant: str) -> httpx.Client:
        _, key = Keys(store.database).create(tenant, tenant, [Scope.SUBMIT, Scope.READ])
        return httpx.Client(base_url=api.base_url, headers={"Authorization": f"Bearer {key}"}, timeout=60)

    with client_of("acme") as acme, client_of("other") as other:
        made = acme.post(WEBHOOKS, json={"url": HERE}).json()
        assert made["tenant"] == "acme"
        assert other.get(WEBHOOKS).json() == {"webhooks": []}
        path = f"{WEBHOOKS}/{made['id']}"
        for method, asked in (
            ("GET", path),
            ("DELETE", path),
            ("POST", f"{path}/enable"),
            ("GET", f"{path}/deliveries"),
        ):
            assert_problem(other.request(method, asked), 404)
        assert_problem(other.post(WEBHOOKS, json={"url": HERE}, params={"tenant": "acme"}), 403)
    assert [webhook["id"] for webhook in api.get(WEBHOOKS).json()["webhooks"]] == [made["id"]]
