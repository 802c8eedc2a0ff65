"""What a search finds, page by page, and whose."""

from datetime import timedelta
from uuid import uuid4

import pytest
from sqlalchemy import Connection, event, text

from producer.jobs.contract import Message, State, Submission
from producer.jobs.errors import BadCursor
from producer.jobs.postgres import Database
from producer.jobs.search import BatchFilter, JobFilter, Search, Sort
from producer.jobs.store import Store

WORKER = {"host": "h", "pid": 1, "device": "none", "model": "m", "revision": "0", "version": "0", "capacity": 1}


@pytest.fixture
def search(store: Store) -> Search:
    return Search(store.database)


def submit(store: Store, *prompts: str, tenant: str = "default", name: str = "b") -> list[str]:
    """One batch; returns the prompts, the newest first."""
    store.submit_batch(name, (Submission(prompt=prompt) for prompt in prompts), max_failures=3, tenant=tenant)
    return list(reversed(prompts))


def prompts(search: Search, sort: Sort = Sort.NEWEST, limit: int = 3, **which: object) -> list[str]:
    """Of all pages together."""
    found, cursor = [], None
    while True:
        page = search.jobs(JobFilter(**which), sort=sort, cursor=cursor, limit=limit)  # type: ignore[arg-type]
        found += [job.request.prompt for job in page.found]
        if page.next is None:
            return found
        assert len(page.found) == limit or "prompt" in which
        cursor = page.next


def fail(store: Store, prompt: str, code: str) -> None:
    worker = uuid4()
    store.beat(worker, WORKER, "[]")
    (job,) = [job for job in Search(store.database).jobs(limit=1000).found if job.request.prompt == prompt]
    claim = store.claim(Message(job.id, job.claim + 1), worker)
    assert claim is not None
    store.fail(claim, code, "broken")


def test_pages_hold_every_job_once_in_the_order_asked_for(store: Store, search: Search) -> None:
    first = submit(store, *(f"first {n}" for n in range(5)))
    alone = store.submit(Submission(prompt="alone"), max_failures=3)
    second = submit(store, *(f"second {n}" for n in range(5)))
    every = [*second, alone.request.prompt, *first]
    assert prompts(search) == every
    assert prompts(search, limit=11) == every
    assert prompts(search, Sort.OLDEST) == every[::-1]


def test_a_page_is_not_moved_by_rows_that_come_and_change(store: Store, search: Search) -> None:
    every = submit(store, *(f"job {n}" for n in range(9)))
    page = search.jobs(limit=3)
    submit(store, "newer 1", "newer 2")
    fail(store, every[4], "internal")
    following = search.jobs(cursor=page.next, limit=100)
    assert [job.request.prompt for job in following.found] == every[3:]


def test_jobs_are_found_by_each_of_their_marks_and_by_all_together(store: Store, search: Search) -> None:
    ours = submit(store, *(f"ours {n}" for n in range(4)), tenant="a")
    batch = search.batches().found[0]
    submit(store, *(f"theirs {n}" for n in range(4)), tenant="b")
    for prompt, code in (("ours 1", "internal"), ("ours 2", "exhausted"), ("theirs 1", "exhausted")):
        fail(store, prompt, code)
    assert prompts(search, tenant="a") == ours
    assert prompts(search, batch_id=batch.id) == ours
    assert prompts(search, state=State.FAILED) == ["theirs 1", "ours 2", "ours 1"]
    assert prompts(search, error_code="exhausted") == ["theirs 1", "ours 2"]
    assert prompts(search, state=State.QUEUED, tenant="a") == ["ours 3", "ours 0"]
    assert prompts(search, tenant="a", error_code="exhausted", state=State.FAILED, batch_id=batch.id) == ["ours 2"]
    assert prompts(search, tenant="nobody") == []
    assert prompts(search, prompt="ours", error_code="exhausted") == ["ours 2"]


def test_jobs_are_found_by_the_time_of_their_submission(store: Store, search: Search) -> None:
    submit(store, "early")
    submit(store, "late")
    early, late = (job.created_at for job in search.jobs(sort=Sort.OLDEST).found)
    assert prompts(search, submitted_after=late) == ["late"]
    assert prompts(search, submitted_before=late) == ["early"]
    assert prompts(search, submitted_after=early, submitted_before=late + timedelta(seconds=1)) == ["late", "early"]
    assert prompts(search, submitted_after=late, prompt="early") == []


def test_jobs_that_ended_are_found_in_the_order_of_their_ends(store: Store, search: Search) -> None:
    submit(store, "a", "b", "c", "d")
    for prompt in ("c", "a", "b"):
        fail(store, prompt, "internal")
    assert prompts(search, Sort.LAST_FINISHED, limit=2) == ["b", "a", "c"]
    assert prompts(search, Sort.FIRST_FINISHED, state=State.FAILED) == ["c", "a", "b"]
    assert prompts(search, Sort.LAST_FINISHED, state=State.QUEUED) == []


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("banner", ["A red BANNER, half price", "a blue banner"]),
        ("ban", ["A red BANNER, half price", "a blue banner"]),
        ("anner", []),
        ("price red", ["A red BANNER, half price"]),
        ("Red  ban", ["A red BANNER, half price"]),
        ("red blue", []),
        ("ÉCOLE", ["L'École d'été"]),
        ("éco", ["L'École d'été"]),
        ("大吉", ["海报，写着“开业大吉”"]),
        ("100%_off'\\", ["100% off_'\\ today"]),
    ],
)
def test_a_text_is_found_by_its_words_and_their_beginnings(
    store: Store, search: Search, asked: str, found: list[str]
) -> None:
    submit(store, "a blue banner", "A red BANNER, half price", "100% off_'\\ today")
    for prompt in ("L'École d'été", "海报，写着“开业大吉”"):
        store.submit(Submission(prompt=prompt), max_failures=3)
    assert prompts(search, prompt=asked) == found


def test_a_text_is_found_far_behind_the_newest_prompts_too(store: Store, search: Search) -> None:
    old = submit(store, *(f"unicorn {n}" for n in range(4)))
    for n in range(105):
        store.submit(Submission(prompt=f"horse {n}"), max_failures=3)
    new = submit(store, *(f"horse {n}" + " unicorn" * (n % 100 == 5) for n in range(250)))
    found = [prompt for prompt in new if "unicorn" in prompt] + old
    assert prompts(search, prompt="unicorn", limit=2) == found
    assert prompts(search, Sort.OLDEST, prompt="unicorn", limit=2) == found[::-1]
    assert prompts(search, prompt="unicorn", limit=100, tenant="default") == found


@pytest.mark.parametrize("rare", [1, 20], ids=["by the index", "neighbour by neighbour"])
@pytest.mark.parametrize("sort", [Sort.NEWEST, Sort.OLDEST])
def test_of_words_that_many_have_and_a_state_that_few_have_each_is_found_once(
    store: Store, search: Search, monkeypatch: pytest.MonkeyPatch, sort: Sort, rare: int
) -> None:
    monkeypatch.setattr("producer.jobs.search.NEIGHBOURS", 3)
    monkeypatch.setattr("producer.jobs.search.HOLDING", 2)
    monkeypatch.setattr("producer.jobs.search.RARE", rare)
    first, *_, last = [store.submit(Submission(prompt=f"boat {n}"), max_failures=3) for n in range(10)]
    for job in (first, last):
        store.cancel(job.id)
    found = ["boat 9", "boat 0"] if sort is Sort.NEWEST else ["boat 0", "boat 9"]
    assert prompts(search, sort, prompt="boat", state=State.CANCELLED) == found
    which = JobFilter(prompt="boat", state=State.CANCELLED)
    page = search.jobs(which, sort=sort, limit=2)
    assert (len(page.found), page.next is None) == (1, False), "a page ends before it is full"


@pytest.mark.parametrize("asked", [{}, {"prompt": "boat"}], ids=["all", "words"])
@pytest.mark.parametrize("sort", [Sort.NEWEST, Sort.OLDEST])
def test_a_page_ends_early_where_its_jobs_hold_long_texts_and_none_is_left_out(
    store: Store, search: Search, monkeypatch: pytest.MonkeyPatch, sort: Sort, asked: dict[str, str]
) -> None:
    monkeypatch.setattr("producer.jobs.store.reading.PAGE_MAX_BYTES", 2_000)
    monkeypatch.setattr("producer.jobs.search.NEIGHBOURS", 3)
    monkeypatch.setattr("producer.jobs.search.HOLDING", 2)
    every = [f"boat {n} {'x' * (2_500 if n == 4 else 500 * (n % 3))}" for n in range(9)]
    for prompt in every:
        store.submit(Submission(prompt=prompt), max_failures=3)
    pages, cursor = [], ""
    while cursor is not None:
        found = search.jobs(JobFilter(**asked), sort=sort, cursor=cursor or None, limit=100)  # type: ignore[arg-type]
        pages.append([job.request.prompt for job in found.found])
        cursor = found.next
    assert [prompt for page in pages for prompt in page] == (every if sort is Sort.OLDEST else every[::-1])
    assert [every[4]] in pages, "one that is longer than a page is a page"
    assert max(len("".join(page)) for page in pages if every[4] not in page) < 2_000
    assert max(map(len, pages)) > 1


def test_a_tenant_finds_its_own_alone_whatever_it_asks(store: Store, search: Search) -> None:
    submit(store, "secret banner", tenant="a", name="secret")
    ours = submit(store, "our banner", tenant="b", name="ours")
    own = Search(store.database.of("b"))
    assert prompts(own) == ours
    assert prompts(own, prompt="banner") == ours
    for whose in ({}, {"tenant": "a"}, {"batch_id": search.batches(BatchFilter(tenant="a")).found[0].id}):
        assert prompts(own, prompt="secret", **whose) == []
        assert "secret banner" not in prompts(own, **whose)
    assert [batch.name for batch in own.batches().found] == ["ours"]
    assert own.batches(BatchFilter(tenant="a")).found == []
    assert prompts(search, prompt="banner") == ["our banner", "secret banner"]


def test_batches_are_found_page_by_page(store: Store, search: Search) -> None:
    for n in range(5):
        submit(store, "x", name=f"Summer {n}", tenant="ab"[n % 2])
    with store.database.begin() as connection:
        connection.execute(text("UPDATE batches SET finished_at = now() WHERE name = 'Summer 3'"))

    def names(**which: object) -> list[str]:
        return [batch.name for batch in search.batches(BatchFilter(**which)).found]  # type: ignore[arg-type]

    first = search.batches(limit=3)
    second = search.batches(cursor=first.next, limit=3)
    assert [batch.name for batch in (*first.found, *second.found)] == [f"Summer {n}" for n in (4, 3, 2, 1, 0)]
    assert second.next is None
    assert names(finished=True) == ["Summer 3"]
    assert names(finished=False, tenant="b") == ["Summer 1"]
    assert names(name="mer 2") == ["Summer 2"]
    assert first.found[0].counts[State.QUEUED] == 1


def test_a_cursor_of_another_list_or_none_at_all_is_refused(store: Store, search: Search) -> None:
    submit(store, "a", "b")
    cursors = [search.jobs(limit=1).next, search.jobs(JobFilter(prompt="a b"), limit=1).next]
    for cursor in (*cursors, "", "rubbish", "é", "LQ", "LWNyZWF0ZWRfYXQgeCAx", "=" * 9):
        with pytest.raises(BadCursor):
            search.jobs(sort=Sort.OLDEST, cursor=cursor or "")
        with pytest.raises(BadCursor):
            search.batches(cursor=cursor or "")


def test_long_prompts_go_in_and_are_found(store: Store, search: Search) -> None:
    long = [" ".join(f"w{n}x{place}" + "ж" * 30 for place in range(80)) for n in range(300)]
    store.submit_batch("long", (Submission(prompt=prompt) for prompt in long), max_failures=3)
    assert prompts(search, prompt="w299x79") == [long[299]]
    assert prompts(search, prompt="ж") == []


def test_long_prompts_whose_words_fill_rows_before_their_number_does_are_found_once_each(
    store: Store, search: Search
) -> None:
    long = ["boat " + " ".join(f"{'ж' * 30}{n}x{place}" for place in range(120)) for n in range(60)]
    found = list(reversed(submit(store, *long)))
    assert sorted(prompts(search, limit=7, prompt="boat")) == sorted(found)
    assert prompts(search, limit=100, prompt="boat") == list(reversed(found))


@pytest.mark.parametrize("scope", [None, "a"])
def test_each_filter_follows_an_index_also_where_a_tenant_sees_its_own_rows_alone(
    store: Store, scope: str | None
) -> None:
    submit(store, *(f"banner {n}" for n in range(300)), tenant="a")
    batch = Search(store.database).batches().found[0].id
    database = store.database if scope is None else store.database.of(scope)
    submitted = "jobs_submitted" if scope is None else "jobs_submitted_by"
    for which, sort, index in (
        ({}, Sort.NEWEST, submitted),
        ({"state": State.FAILED}, Sort.OLDEST, submitted),
        ({"tenant": "a"}, Sort.NEWEST, "jobs_submitted_by"),
        ({"batch_id": batch}, Sort.NEWEST, "jobs_submitted_in"),
        ({"error_code": "x"}, Sort.NEWEST, "jobs_error" if scope is None else "jobs_error_of"),
        ({"state": State.FAILED}, Sort.LAST_FINISHED, "jobs_finished" if scope is None else "jobs_finished_of"),
    ):
        plan = explained(database, JobFilter(**which), sort)  # type: ignore[arg-type]
        assert f"using {index} " in plan, plan
        assert "Seq Scan on jobs" not in plan


def explained(database: Database, which: JobFilter, sort: Sort) -> str:
    """What Postgres would do, were the table so large that it never read it as a whole."""
    plans: list[str] = []

    def explain(connection: Connection, _cursor: object, statement: str, values: object, *_: object) -> None:
        if "LIMIT" in statement and not statement.startswith("EXPLAIN"):
            connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
            connection.exec_driver_sql("SET LOCAL enable_bitmapscan = off")
            plans.extend(row[0] for row in connection.exec_driver_sql("EXPLAIN " + statement, values))  # type: ignore[call-overload]

    event.listen(database._engine, "before_cursor_execute", explain)
    try:
        Search(database).jobs(which, sort=sort)
    finally:
        event.remove(database._engine, "before_cursor_execute", explain)
    return "\n".join(plans)
