"""The page's templates with made-up farms: no server, no database."""

import re
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest

from pipeline.request import ImageRequest
from producer.dashboard.overview import BatchRow, Drawing, Overview, WorkerCard
from producer.dashboard.page import HERE, _headers, _templates, login_page
from producer.jobs.contract import DEFAULT_TENANT, Batch, Farm, Job, Priority, State, Worker

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
ALONE = {"tenant": None}
"""Somebody on the machine itself, who had not to say who they are."""
EVIL = "<script>alert('x')</script>"


def job(**changes: Any) -> Job:
    fields: dict[str, Any] = dict.fromkeys(Job.model_fields)
    fields |= {
        "id": uuid4(),
        "tenant": DEFAULT_TENANT,
        "position": 0,
        "priority": Priority.STANDARD,
        "state": State.FAILED,
        "request": ImageRequest(prompt=EVIL),
        "claim": 1,
        "failures": 1,
        "created_at": NOW,
        "finished_at": NOW,
        "warnings": [],
    }
    return Job.model_validate(fields | changes)


def batch(tenant: str = DEFAULT_TENANT, *, paused: bool = False, rejected: int = 0, **counts: int) -> Batch:
    return Batch.of(
        id=uuid4(),
        tenant=tenant,
        name=EVIL,
        weight=1,
        created_at=NOW,
        paused=paused,
        cancelled_at=None,
        finished_at=None,
        file_id=None,
        metadata={},
        refused=[],
        jobs=sum(counts.values()),
        lines=sum(counts.values()) + rejected,
        rejected=rejected,
        counts=counts,
    )


def worker(**changes: Any) -> Worker:
    fields: dict[str, Any] = {
        "id": uuid4(),
        "host": EVIL,
        "pid": 1,
        "device": "cuda:0",
        "model": EVIL,
        "revision": "",
        "version": "",
        "capacity": 4,
        "started_at": NOW,
        "heartbeat_at": NOW,
        "stopped_at": None,
        "heartbeat_age_s": 3.0,
        "live": True,
        "drawing": [],
    }
    return Worker.model_validate(fields | changes)


def overview(**parts: Any) -> Overview:
    counts = dict.fromkeys(State, 0) | parts.pop("counts", {})
    farm = Farm(
        at=NOW + timedelta(seconds=90),
        counts=counts,
        paused=parts.pop("paused", 0),
        oldest_queued_s=parts.pop("oldest_queued_s", None),
        images_last_minute=parts.pop("images_last_minute", 0),
        published=0,
        workers=[],
    )
    empty: dict[str, Any] = {"batches": [], "workers": [], "failures": [], "images": []}
    return Overview(farm=farm, **(empty | parts))


def drawn(shown: Overview) -> str:
    return _templates("/api/v1").get_template("page.html").render(overview=shown, viewer=ALONE)


def test_an_empty_farm_says_what_to_do() -> None:
    page = drawn(overview())
    assert "<code>ovis-batch up</code>" in page
    assert "ovis-batch submit" in page
    assert "Nothing has failed" in page


def test_what_strangers_wrote_is_escaped_everywhere() -> None:
    failed = job(error_code=EVIL, error_message=EVIL)
    succeeded = job(state=State.SUCCEEDED, object_key="k", sha256="0", name="a", width_px=64, height_px=64)
    card = WorkerCard(worker(), [Drawing.of({"job": EVIL, "step": 1, "steps": 2, "width": EVIL, "height": EVIL})])
    row = BatchRow(batch(succeeded=1), [succeeded])
    page = drawn(overview(batches=[row], workers=[card], failures=[failed], images=[succeeded]))
    assert "alert" in page
    assert "<script>alert" not in page


def test_a_silent_worker_is_told_from_a_live_one() -> None:
    entry = {"job": str(UUID(int=1)), "step": 12, "steps": 50}
    page = drawn(overview(workers=[WorkerCard(worker(live=False, heartbeat_age_s=125), [Drawing.of(entry)])]))
    assert "heartbeat 2 min 5 s ago: silent" in page
    assert "<progress" not in page
    assert "<code>ovis-batch up</code>" in page


def test_a_worker_shows_each_image_with_its_steps() -> None:
    entry = {"job": str(UUID(int=1)), "step": 12, "steps": 50, "width": 728, "height": 90}
    page = drawn(overview(workers=[WorkerCard(worker(), [Drawing.of(entry)])]))
    assert '<progress value="12" max="50">' in page
    assert "728×90" in page


@pytest.mark.parametrize("entry", [{}, {"job": None}, {"job": "1", "step": None, "steps": 0}, {"width": 3}])
def test_a_heartbeat_that_tells_little_still_makes_a_page(entry: dict[str, Any]) -> None:
    assert drawn(overview(workers=[WorkerCard(worker(), [Drawing.of(entry)])]))


def test_the_backlog_tells_its_age_and_the_time_left() -> None:
    shown = overview(counts={State.QUEUED: 119, State.RUNNING: 1}, oldest_queued_s=65.0, images_last_minute=60)
    page = drawn(shown)
    assert "oldest waits 1 min 5 s" in page
    assert "about 2 min left" in page


def test_a_bar_is_as_long_as_its_parts_and_full_only_at_the_end() -> None:
    row = BatchRow(batch(succeeded=995, failed=4, running=1), [])
    assert [(segment.state, segment.start, segment.width) for segment in row.bar] == [
        (State.SUCCEEDED, 0, 99.5),
        (State.FAILED, 99.5, 0.4),
        (State.RUNNING, 99.9, 0.1),
    ]
    assert row.finished_percent == 99


def test_it_is_said_whose_each_batch_is_once_there_are_several_tenants() -> None:
    own = BatchRow(batch(queued=1), [])
    assert 'title="tenant"' not in drawn(overview(batches=[own]))
    page = drawn(overview(batches=[own, BatchRow(batch("acme", queued=1), [])]))
    assert '<span title="tenant" dir="auto">acme</span>' in page
    assert '<span title="tenant" dir="auto">default</span>' in page


def test_a_worker_that_draws_in_8_bits_says_so() -> None:
    cards = [WorkerCard(worker(model="ovis", revision=revision), []) for revision in ("sha256-1", "sha256-1+fp8")]
    plain, fp8 = (drawn(overview(workers=[card])) for card in cards)
    assert ">ovis</span>" in plain
    assert ">ovis+fp8</span>" in fp8


def test_nothing_is_loaded_from_elsewhere_but_pictures() -> None:
    page = drawn(overview())
    assert "http://" not in page
    assert "https://" not in page
    policy = _headers("http://127.0.0.1:9000/prefix?x")["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert policy.endswith("img-src 'self' http://127.0.0.1:9000")


def test_the_form_for_the_key_loads_nothing_from_elsewhere() -> None:
    assert login_page().headers["Content-Security-Policy"].endswith("img-src 'self'")


def test_without_postgres_the_page_says_so_and_goes_on_asking() -> None:
    page = _templates("/api/v1").get_template("page.html").render(away="Postgres: connection refused", viewer=ALONE)
    assert "connection refused" in page
    assert "dashboard.js" in page


def test_what_is_paused_is_told_and_not_waited_for() -> None:
    shown = overview(counts={State.QUEUED: 130}, paused=100, images_last_minute=30)
    assert shown.left_s == 60
    assert "100 paused" in _templates("/api/v1").get_template("overview.html").render(overview=shown, viewer=ALONE)
    assert overview(counts={State.QUEUED: 100}, paused=100, images_last_minute=30).left_s is None


def test_a_batch_that_is_paused_says_so_and_leads_to_its_results() -> None:
    paused, plain = batch(paused=True, rejected=2, queued=1), batch(succeeded=1)
    shown = overview(batches=[BatchRow(paused, []), BatchRow(plain, [])])
    page = _templates("/api/v1").get_template("overview.html").render(overview=shown, viewer=ALONE)
    assert page.count(">paused<") == page.count(">2 rejected<") == 1
    for row in (paused, plain):
        assert f'href="/api/v1/batches/{row.id}/results?format=xlsx"' in page
        assert f'href="/api/v1/batches/{row.id}/results"' in page
    assert f"{plain.id}/images.zip" in page
    assert f"{paused.id}/images.zip" not in page


def test_the_page_where_a_spreadsheet_is_handed_in_has_every_part_that_its_script_names() -> None:
    page = _templates("/api/v1").get_template("submit.html").render(viewer=ALONE, sizes=[])
    script = (HERE / "static" / "submit.js").read_text(encoding="utf-8")
    named = set(re.findall(r'(?:field|getElementById)\("(\w+)"\)', script))
    assert {"file", "submit", "missing"} <= named
    assert named <= set(re.findall(r'id="(\w+)"', page))
    assert 'aria-describedby="missing" disabled>Hand in</button>' in page
