"""What real receivers are sent, and what becomes of it when they fail, are slow, or are gone."""

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from sqlalchemy import text
from standardwebhooks import Webhook as Verifier

from producer.jobs.contract import Delivery, EventKind, Submission, Webhook
from producer.jobs.deliverer import Deliverer
from producer.jobs.errors import NotFound, TooManyWebhooks, WebhookDisabled
from producer.jobs.settings import Durations
from producer.jobs.store import Store
from producer.jobs.webhooks import WEBHOOKS_MAX, Attempt, Due, Webhooks
from tests.farm import free_port
from tests.waiting import until

QUICK = Durations(scale=0.01)
CANCELLED = [EventKind.JOB_CANCELLED]


@dataclass
class Receiver:
    """A web server that keeps what it is sent, and answers what ``answers`` says, 204 when that is at its end."""

    answers: list[int] = field(default_factory=list)
    pause_s: float = 0.0
    got: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook?a=b"

    @property
    def ids(self) -> list[str]:
        return [headers["webhook-id"] for headers, _ in self.got]


@contextmanager
def receiving(receiver: Receiver) -> Iterator[Receiver]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            receiver.got.append(({name.lower(): value for name, value in self.headers.items()}, body))
            stopped.wait(receiver.pause_s)
            status = receiver.answers.pop(0) if receiver.answers else 204
            self.send_response(status)
            self.send_header("Location", receiver.url)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    stopped = threading.Event()
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        receiver.port = server.server_port
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield receiver
        finally:
            stopped.set()
            server.shutdown()
            thread.join()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving(Receiver()) as receiver:
        yield receiver


@contextmanager
def delivering(store: Store, *, durations: Durations = QUICK, private: bool = True, **options: Any) -> Iterator[None]:
    deliverer = Deliverer(store.database, durations, leads=lambda: True, private=private, **options)
    stop = threading.Event()
    thread = threading.Thread(target=deliverer.run, args=(stop,))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(60)
        assert not thread.is_alive()


def told(store: Store, url: str, tenant: str = "default") -> tuple[Webhook, str]:
    return Webhooks(store.database).create(tenant, url, CANCELLED)


def cancel_one(store: Store, tenant: str = "default", count: int = 1) -> None:
    store.cancel_batch(store.submit_batch("b", [Submission(prompt="a")] * count, max_failures=3, tenant=tenant).id)


def deliveries(store: Store, webhook: Webhook) -> list[Delivery]:
    return Webhooks(store.database).deliveries(webhook.id)


def the_delivery(store: Store, webhook: Webhook) -> Delivery:
    (delivery,) = deliveries(store, webhook)
    return delivery


def delivered(store: Store, webhook: Webhook) -> Callable[[], bool]:
    return lambda: all(delivery.delivered_at for delivery in deliveries(store, webhook))


def test_a_receiver_that_fails_and_comes_back_is_told_under_the_same_id_and_can_verify_it(
    store: Store, receiver: Receiver
) -> None:
    webhook, secret = told(store, receiver.url)
    receiver.answers = [500, 302]
    job = store.submit(Submission(prompt="a", name="boat"), max_failures=3)
    store.cancel(job.id)
    with delivering(store):
        until(delivered(store, webhook))
    assert len(receiver.got) == 3
    assert len(set(receiver.ids)) == 1
    for headers, body in receiver.got:
        payload = Verifier(secret).verify(body, headers)
    assert payload["type"] == "job.cancelled"
    assert payload["data"] == {"state": "cancelled", "name": "boat", "job_id": str(job.id), "batch_id": None}
    assert headers["host"] == f"127.0.0.1:{receiver.port}"
    delivery = the_delivery(store, webhook)
    assert payload["timestamp"] == delivery.created_at.isoformat()
    assert (str(delivery.id), delivery.attempts, delivery.last_status) == (receiver.ids[0], 3, 204)
    assert (delivery.next_at, delivery.last_error) == (None, None)


def test_a_receiver_that_is_not_there_is_tried_again_for_days_and_then_no_more(store: Store) -> None:
    webhook, _ = told(store, f"http://127.0.0.1:{free_port()}/")
    cancel_one(store)
    with delivering(store, durations=Durations()):
        until(lambda: the_delivery(store, webhook).last_error)
    delivery = the_delivery(store, webhook)
    assert delivery.next_at is not None
    assert 4 < (delivery.next_at - delivery.created_at).total_seconds() < 60
    with store.database.single() as connection:
        connection.execute(text("UPDATE deliveries SET next_at = now()"))
    with delivering(store, durations=Durations(scale=1e-5)):
        until(lambda: the_delivery(store, webhook).next_at is None)
    delivery = the_delivery(store, webhook)
    assert (delivery.attempts, delivery.delivered_at, delivery.last_status) == (10, None, None)
    assert delivery.last_error == "the connection failed (ConnectError)"
    waits = Durations().delivery_waits_s
    assert sorted(waits) == list(waits)
    assert 3 * 86_400 < sum(waits) < 4 * 86_400


def test_a_receiver_that_is_gone_is_told_nothing_more_until_a_person_says_so(store: Store, receiver: Receiver) -> None:
    webhooks = Webhooks(store.database)
    webhook, _ = told(store, receiver.url)
    receiver.answers = [410]
    cancel_one(store)
    with delivering(store):
        until(lambda: webhooks.webhook(webhook.id).disabled_at)
        first = the_delivery(store, webhook)
        assert (first.next_at, first.last_status) == (None, 410)
        cancel_one(store)
        assert len(deliveries(store, webhook)) == 1, "what happens meanwhile is not kept for it"
        with pytest.raises(WebhookDisabled):
            webhooks.resend(webhook.id, first.id)
        assert webhooks.enable(webhook.id).disabled_at is None
        cancel_one(store)
        webhooks.resend(webhook.id, first.id)
        until(delivered(store, webhook))
    assert len(receiver.got) == 3
    assert Counter(receiver.ids)[str(first.id)] == 2


def test_one_that_never_answers_holds_up_no_other(store: Store, receiver: Receiver) -> None:
    with receiving(Receiver(pause_s=60)) as silent:
        slow, _ = told(store, silent.url, "acme")
        quick, _ = told(store, receiver.url, "acme")
        cancel_one(store, "acme", count=50)
        began = time.monotonic()
        with delivering(store, timeout_s=20):
            until(delivered(store, quick))
            assert len(silent.got) <= 5, "it is sent a few at once"
            assert time.monotonic() - began < 20, "nobody waited for the silent one's time to be over"
    assert len(receiver.got) == len(set(receiver.ids)) == 50
    assert not any(delivery.delivered_at for delivery in deliveries(store, slow))


def test_an_attempt_has_an_end_though_the_receiver_drips(store: Store) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        webhook, _ = told(store, f"http://127.0.0.1:{listener.getsockname()[1]}/")
        cancel_one(store)
        stop = threading.Event()

        def drip() -> None:
            connection, _ = listener.accept()
            with connection:
                while not stop.wait(0.05):
                    try:
                        connection.sendall(b"H")
                    except OSError:
                        return

        thread = threading.Thread(target=drip)
        thread.start()
        with delivering(store, timeout_s=1):
            until(lambda: the_delivery(store, webhook).last_error)
        stop.set()
        thread.join(30)
    assert the_delivery(store, webhook).last_error in {
        "it did not answer within 1 s",
        "the connection failed (RemoteProtocolError)",
    }


def test_nothing_is_sent_into_a_private_network(store: Store, receiver: Receiver) -> None:
    async def resolve(host: str, port: int) -> Sequence[str]:
        return ["127.0.0.1"]

    webhook, _ = told(store, f"https://hooks.example.com:{receiver.port}/")
    cancel_one(store)
    with delivering(store, private=False, resolve=resolve):
        until(lambda: the_delivery(store, webhook).last_error)
    assert the_delivery(store, webhook).last_error == "its host has an address that is not public"
    assert receiver.got == []


def test_a_name_is_resolved_once_and_the_receiver_hears_it(store: Store, receiver: Receiver) -> None:
    answers = [["127.0.0.1"], ["203.0.113.9"]]

    async def resolve(host: str, port: int) -> Sequence[str]:
        assert (host, port) == ("hooks.example.com", receiver.port)
        return answers.pop(0)

    webhook, _ = told(store, f"http://hooks.example.com:{receiver.port}/")
    cancel_one(store)
    with delivering(store, resolve=resolve):
        until(delivered(store, webhook))
    assert receiver.got[0][0]["host"] == f"hooks.example.com:{receiver.port}"
    assert len(answers) == 1


def test_a_receiver_is_told_at_another_of_its_addresses_where_one_is_deaf(store: Store, receiver: Receiver) -> None:
    async def resolve(host: str, port: int) -> Sequence[str]:
        return ["127.0.0.2", "127.0.0.1"]  # at the first nobody listens

    webhook, _ = told(store, f"http://hooks.example.com:{receiver.port}/")
    cancel_one(store)
    with delivering(store, resolve=resolve):
        until(delivered(store, webhook))
    assert (the_delivery(store, webhook).attempts, len(receiver.got)) == (1, 1)


def test_what_was_taken_by_one_who_died_is_due_again(store: Store, receiver: Receiver) -> None:
    webhooks = Webhooks(store.database)
    webhook, _ = told(store, receiver.url)
    cancel_one(store)
    (taken,) = webhooks.take(most=10, most_each=5, busy={}, lease_s=0.5)
    assert webhooks.take(most=10, most_each=5, busy={}, lease_s=0.5) == []
    with delivering(store):
        until(delivered(store, webhook))
    assert receiver.ids == [str(taken.id)]
    assert the_delivery(store, webhook).attempts == 2


def test_only_what_was_asked_for_is_sent_and_only_the_tenants_own(store: Store) -> None:
    mine, _ = told(store, "https://example.com/", "acme")
    theirs, _ = told(store, "https://example.com/", "other")
    finished, _ = Webhooks(store.database).create("acme", "https://example.com/", [EventKind.BATCH_FINISHED])
    cancel_one(store, "acme")
    assert [len(deliveries(store, webhook)) for webhook in (mine, theirs, finished)] == [1, 0, 0]
    other = Webhooks(store.database.of("other"))
    assert [webhook.id for webhook in other.all()] == [theirs.id]
    for ask in (other.webhook, other.delete, other.enable, other.deliveries):
        with pytest.raises(NotFound):
            ask(mine.id)
    with pytest.raises(NotFound):
        other.resend(mine.id, the_delivery(store, mine).id)
    with pytest.raises(NotFound):
        other.resend(theirs.id, the_delivery(store, mine).id)


def test_a_tenant_has_a_few_webhooks(store: Store) -> None:
    for _ in range(WEBHOOKS_MAX):
        told(store, "https://example.com/", "acme")
    with pytest.raises(TooManyWebhooks):
        told(store, "https://example.com/", "acme")
    told(store, "https://example.com/", "other")


def test_a_tenant_has_no_more_webhooks_however_many_are_made_at_once(store: Store) -> None:
    for _ in range(WEBHOOKS_MAX - 1):
        told(store, "https://example.com/", "acme")
    own = store.of("acme")

    def make(_: int) -> bool:
        with suppress(TooManyWebhooks):
            return bool(told(own, "https://example.com/", "acme"))
        return False

    def waiting() -> int:
        return int(watching.exec_driver_sql("SELECT count(*) FROM pg_locks WHERE NOT granted").scalar_one())

    with ThreadPoolExecutor(3) as pool, store.database.single() as watching:
        with store.database.begin() as connection:
            connection.execute(text("LOCK TABLE webhooks IN SHARE MODE"))
            made = pool.map(make, range(3))
            until(lambda: waiting() == 3)
        assert sum(made) == 1
    assert len(Webhooks(own.database).all()) == WEBHOOKS_MAX


def test_a_late_note_neither_revives_what_was_disabled_nor_undoes_a_resend(store: Store) -> None:
    webhooks = Webhooks(store.database)
    webhook, _ = told(store, "https://example.com/")
    cancel_one(store)

    def taken() -> Due:
        (due,) = webhooks.take(most=1, most_each=1, busy={}, lease_s=60)
        return due

    first = taken()
    webhooks.resend(webhook.id, first.id)
    webhooks.note([Attempt(first.id, 204, None, None, first.attempts)])
    again = the_delivery(store, webhook)
    assert (again.attempts, again.delivered_at, again.next_at is not None) == (0, None, True)
    second = taken()
    webhooks.disable(webhook.id)
    webhooks.note([Attempt(second.id, 500, "it answered 500", 5.0, second.attempts)])
    ended = the_delivery(store, webhook)
    assert (ended.next_at, ended.last_error) == (None, "it answered 500")


def test_one_portion_is_pruned_a_round_so_that_deliveries_go_on(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    left = [3, 2, 1]
    monkeypatch.setattr(Webhooks, "prune", lambda self: left.pop() if left else 0)
    deliverer = Deliverer(store.database, QUICK, leads=lambda: True, private=True)
    for more in (2, 1, 0):
        deliverer._prune()
        assert len(left) == more
    deliverer._prune()
    left.append(1)
    deliverer._prune()
    assert left == [1], "all was pruned: not before the next time"


def test_deliveries_that_are_at_an_end_are_kept_for_some_days(store: Store) -> None:
    webhooks = Webhooks(store.database)
    webhook, _ = told(store, "https://example.com/")
    cancel_one(store, count=2)
    with store.database.single() as connection:
        connection.execute(text("UPDATE deliveries SET created_at = now() - interval '8 days'"))
        connection.execute(text("UPDATE deliveries SET next_at = NULL WHERE id = (SELECT id FROM deliveries LIMIT 1)"))
    assert webhooks.prune() == 1
    assert len(deliveries(store, webhook)) == 1, "what is still to be sent stays"


def test_a_secret_is_shown_by_nothing_that_is_logged(store: Store) -> None:
    _, secret = told(store, "https://example.com/")
    cancel_one(store)
    (due,) = Webhooks(store.database).take(most=1, most_each=1, busy={}, lease_s=1)
    assert due.secret == secret
    assert secret not in repr(due)
    assert json.dumps(due.data)
