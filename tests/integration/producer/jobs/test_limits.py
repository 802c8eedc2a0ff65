"""A tenant's limits: at submission, however many submit at once, and on what is drawn at the same time."""

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text

from producer.jobs.contract import Message, Submission, SubmissionKey
from producer.jobs.dispatcher import Dispatcher
from producer.jobs.errors import Overloaded, TooManyJobs
from producer.jobs.queue import Queue
from producer.jobs.search import Search
from producer.jobs.settings import Settings
from producer.jobs.store import Store
from tests.farm import Farmhand
from tests.integration.producer.jobs.test_dispatcher import SLOW, beat, submit, take_turns

BOAT = Submission(prompt="a boat", seed=1)


@pytest.fixture
def queue(settings: Settings) -> Iterator[Queue]:
    queue = Queue(settings.require("redis_url"))
    yield queue
    queue.close()


def counted(attempt: Callable[[], object], times: int) -> int:
    """How many of so many attempts at once were let in."""

    def one(_: int) -> bool:
        try:
            attempt()
        except Overloaded:
            return False
        return True

    with ThreadPoolExecutor(times) as threads:
        return sum(threads.map(one, range(times)))


@pytest.mark.parametrize("limit", ["max_queued", "max_a_day"])
def test_no_more_are_let_in_than_the_limit_however_many_come_at_once(store: Store, limit: str) -> None:
    store.set_tenant("acme", {limit: 3})
    own = store.of("acme")
    assert counted(lambda: own.submit(BOAT, max_failures=3, tenant="acme"), 4) == 3
    with pytest.raises(Overloaded, match="at most 3"):
        own.submit(BOAT, max_failures=3, tenant="acme")
    store.submit(BOAT, max_failures=3, tenant="other")
    assert Counter(job.tenant for job in Search(store.database).jobs().found) == {"acme": 3, "other": 1}


@pytest.mark.parametrize("deduplicate", [False, True])
def test_a_batch_beyond_the_limit_is_not_made_at_all(store: Store, deduplicate: bool) -> None:
    store.set_tenant("acme", {"max_queued": 5})
    store.submit(BOAT, max_failures=3, tenant="acme")
    with pytest.raises(Overloaded) as refused:
        store.submit_batch("five", [BOAT] * 5, max_failures=3, tenant="acme", deduplicate=deduplicate)
    assert refused.value.retry_after_s >= 1
    assert store.batches() == []
    assert store.submit_batch("four", [BOAT] * 4, max_failures=3, tenant="acme", deduplicate=deduplicate).jobs == 4


@pytest.mark.parametrize(("limit", "told"), [("max_queued", "may wait"), ("max_a_day", "in 24 hours")])
def test_a_batch_that_no_waiting_lets_in_is_not_told_to_come_back(store: Store, limit: str, told: str) -> None:
    store.set_tenant("acme", {limit: 5})
    store.submit(BOAT, max_failures=3, tenant="acme")
    with pytest.raises(TooManyJobs, match=f"more than 5 jobs, and no more of this tenant .*{told}"):
        store.submit_batch("six", [BOAT] * 6, max_failures=3, tenant="acme")
    assert store.batches() == []


def test_what_is_drawn_already_is_answered_though_no_more_may_wait(store: Store, settings: Settings) -> None:
    hand = Farmhand(settings)
    hand.beat()
    drawn = store.submit(BOAT, max_failures=3, tenant="acme")
    hand.succeed(drawn)
    hand.close()
    store.set_tenant("acme", {"max_queued": 1})
    store.submit(BOAT, max_failures=3, tenant="acme")
    assert store.submit(BOAT, max_failures=3, tenant="acme", deduplicate=True).id == drawn.id
    batch = store.submit_batch("three", [BOAT] * 3, max_failures=3, tenant="acme", deduplicate=True)
    assert batch.counts["succeeded"] == 3
    new = Submission(prompt="another boat", seed=1)
    with pytest.raises(Overloaded):
        store.submit(new, max_failures=3, tenant="acme", deduplicate=True)
    with pytest.raises(Overloaded):
        store.submit_batch("more", [BOAT, new], max_failures=3, tenant="acme", deduplicate=True)


def test_an_input_without_end_is_read_no_further_than_the_limit(store: Store) -> None:
    store.set_tenant("acme", {"max_a_day": 100})
    read = 0

    def endless() -> Iterator[Submission]:
        nonlocal read
        while True:
            read += 1
            yield BOAT

    with pytest.raises(TooManyJobs):
        store.submit_batch("endless", endless(), max_failures=3, tenant="acme")
    assert read == 101


def test_what_came_by_the_same_key_before_is_no_submission(store: Store) -> None:
    store.set_tenant("acme", {"max_queued": 1, "max_a_day": 1})
    key = SubmissionKey("k", "f")
    first = store.submit(BOAT, max_failures=3, tenant="acme", key=key)
    assert store.submit(BOAT, max_failures=3, tenant="acme", key=key) == first


def test_what_was_deleted_counts_for_its_day(store: Store) -> None:
    store.set_tenant("acme", {"max_a_day": 3, "max_queued": 3})
    batch = store.submit_batch("b", [BOAT] * 2, max_failures=3, tenant="acme")
    store.delete_batch(batch.id)
    store.submit(BOAT, max_failures=3, tenant="acme")
    with pytest.raises(Overloaded, match="24 hours") as refused:
        store.submit(BOAT, max_failures=3, tenant="acme")
    assert 23 * 3600 <= refused.value.retry_after_s <= 24 * 3600


def claimed(store: Store, queue: Queue) -> list[Message]:
    """What workers took of all that waits in Redis."""
    messages = [Message(UUID(task_id.partition(":")[0]), int(task_id.partition(":")[2])) for task_id in queue.waiting()]
    taken = [message for message in messages if store.claim(message, uuid4())]
    queue.clear()
    return taken


def busy(store: Store) -> Counter[str]:
    """Jobs that run or are published, by tenant."""
    with store.database.begin() as connection:
        statement = "SELECT tenant FROM jobs WHERE state = 'running' OR id IN (SELECT job_id FROM messages)"
        return Counter(connection.scalars(text(statement)))


def test_a_full_tenant_is_passed_over_and_the_others_get_its_turns(store: Store, queue: Queue) -> None:
    store.set_tenant("acme", {"max_running": 3})
    submit(store, 30, tenant="acme")
    submit(store, 30, tenant="other")
    beat(store, 10)
    dispatcher = Dispatcher(store, queue, SLOW)
    take_turns(dispatcher)
    assert busy(store) == {"acme": 3, "other": 7}
    for _ in range(2):
        claimed(store, queue)
        take_turns(dispatcher)
        assert busy(store)["acme"] == 3
    assert busy(store)["other"] >= 20, "its neighbour did not wait for it"


def test_a_tenant_goes_on_as_its_images_end(store: Store, queue: Queue) -> None:
    store.set_tenant("acme", {"max_running": 2})
    submit(store, 5, tenant="acme")
    beat(store, 4)
    dispatcher = Dispatcher(store, queue, SLOW)
    drawn = 0
    while drawn < 5:
        take_turns(dispatcher, 3)
        assert busy(store)["acme"] == min(2, 5 - drawn)
        for message in claimed(store, queue):
            store.cancel(message.job_id)
            drawn += 1
    assert busy(store) == {}


def test_a_limit_that_is_lowered_holds_for_what_comes_and_nought_stops(store: Store, queue: Queue) -> None:
    submit(store, 10, tenant="acme")
    beat(store, 4)
    dispatcher = Dispatcher(store, queue, SLOW)
    take_turns(dispatcher, 3)
    running = claimed(store, queue)
    assert len(running) == 4
    store.set_tenant("acme", {"max_running": 0})
    take_turns(dispatcher, 3)
    assert busy(store) == {"acme": 4}
    store.set_tenant("acme", {"max_running": None})
    take_turns(dispatcher, 3)
    assert busy(store)["acme"] > 4
