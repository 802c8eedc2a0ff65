"""The paths around manifests: spreadsheets that become batches, and what they would become and cost."""

import io
import json
from contextlib import closing
from datetime import datetime, timedelta
from http.client import HTTPConnection
from typing import Any
from uuid import uuid4

import httpx
import pytest
from openpyxl import Workbook

from producer.api import manifests
from producer.jobs.contract import Submission
from producer.jobs.store import Store
from tests.farm import Farmhand
from tests.integration.producer.api.test_jobs import assert_problem

BATCHES = "/api/v1/batches"
PREVIEW = "/api/v1/manifests/preview"
CSV = {"Content-Type": "text/csv; charset=utf-8"}
XLSX = {"Content-Type": manifests.XLSX}
GOOD = "sku,style,product\nA,red,shoes\nB,新,茶\n"
OPTIONS: dict[str, Any] = {
    "template": "A {style} banner for {product}",
    "vary": ["size=leaderboard,300x250", "seed=1..2"],
    "file_name": "{sku}_{size}_{seed}.png",
    "default": ["steps=8"],
}


def spreadsheet(text: str) -> bytes:
    book = Workbook()
    sheet = book.active
    assert sheet is not None
    for line in text.splitlines():
        sheet.append(line.split(","))
    file = io.BytesIO()
    book.save(file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("body", "headers"), [(GOOD.encode("utf-8-sig"), CSV), (spreadsheet(GOOD), XLSX)], ids=["csv", "xlsx"]
)
def test_a_spreadsheet_is_a_batch_of_every_row_and_variation(
    api: httpx.Client, store: Store, body: bytes, headers: dict[str, str]
) -> None:
    response = api.post(BATCHES, params={"name": "autumn", **OPTIONS}, content=body, headers=headers)
    assert response.status_code == 201, response.text
    assert (response.json()["name"], response.json()["jobs"], response.json()["rejected"]) == ("autumn", 8, 0)
    jobs = store.batch_jobs(response.json()["id"])
    assert [job.name for job in jobs[:4]] == ["A_leaderboard_1", "A_leaderboard_2", "A_300x250_1", "A_300x250_2"]
    last = jobs[-1]
    assert (last.line, last.source) == (3, {"sku": "B", "style": "新", "product": "茶"})
    assert (last.request.prompt, last.request.steps, last.request.seed) == ("A 新 banner for 茶", 8, 2)
    assert last.request.drawn_size == (304, 256)


def test_bad_rows_are_told_by_line_and_column_and_counted_and_nothing_is_submitted(api: httpx.Client) -> None:
    text = "prompt,width\n" + "good,64\n" * 500 + "bad,0\n" * 30
    problem = assert_problem(api.post(BATCHES, params={"name": "b"}, content=text, headers=CSV), 422)
    assert [(fault["line"], fault["field"]) for fault in problem["errors"]] == [(n, "width") for n in range(502, 522)]
    assert "30 fields are wrong, of which the first 20 are told" in problem["detail"]
    assert api.get(BATCHES).json()["batches"] == []


def test_with_partial_the_good_rows_are_submitted_and_the_bad_ones_kept(api: httpx.Client, store: Store) -> None:
    text = "prompt,name\na,x\nb,../x\nc,X\nd\x00,y\ne,z\n"
    response = api.post(BATCHES, params={"name": "b", "partial": "true"}, content=text, headers=CSV)
    assert response.status_code == 201, response.text
    assert (response.json()["jobs"], response.json()["rejected"]) == (2, 3)
    rejections = store.rejections(response.json()["id"])
    assert [(rejection.line, rejection.field) for rejection in rejections] == [(3, "name"), (4, "name"), (5, "prompt")]
    assert rejections[2].source == {"prompt": "d\ufffd", "name": "y"}


@pytest.mark.parametrize(
    ("params", "body", "line", "field", "told"),
    [
        ({"template": "{x.__class__}"}, GOOD, None, "template", "is no plain column"),
        ({"vary": "seed=1..2000"}, GOOD, None, "vary", "1,000"),
        ({"default": "steps=0"}, GOOD, None, "default", "steps"),
        ({"template": "{nothing}"}, GOOD, 1, "nothing", "is no column of the file"),
        ({}, "prompt\ns\xe9ch\xe9\n".encode("latin-1"), 2, "", "save it as 'CSV UTF-8'"),
        ({}, "prompt\n" + "a" * 10_000_000, 2, "prompt", "characters"),
        ({}, "prompt,sku,text\na,A,b\nc,C," + "a" * 66_000 + "\n", 3, "text", "shorten it, or leave the column out"),
        ({}, "prompt,name\na,n\nb,N\n", 3, "name", "is the name of line 2 already"),
        ({}, "prompt,name\na," + "n" * 300 + "\n", 2, "name", "longer than 200"),
    ],
    ids=lambda value: repr(value)[:30],
)  # fmt: skip
def test_what_is_wrong_is_told_and_nothing_is_half_submitted(
    api: httpx.Client, params: dict[str, str], body: str | bytes, line: int | None, field: str, told: str
) -> None:
    for path in (BATCHES, PREVIEW):
        answer = api.post(path, params={"name": "b", **params}, content=body, headers=CSV)
        if path == PREVIEW and answer.status_code == 200:
            (fault,) = answer.json()["problems"]
        else:
            (fault,) = assert_problem(answer, 422)["errors"]
        assert (fault.get("line"), fault["field"]) == (line, field)
        assert told in fault["message"]
    assert api.get(BATCHES).json()["batches"] == []


def test_a_preview_shows_what_would_be_submitted_and_submits_nothing(api: httpx.Client) -> None:
    text = "sku,style,product\n" + "".join(f"S{n},red,shoes\n" for n in range(50)) + "S3,blue,shoes\nT,,shoes\n"
    preview = api.post(PREVIEW, params=OPTIONS, content=text, headers=CSV).json()
    assert (preview["jobs"], preview["rejected"], preview["problem_count"]) == (200, 2, 2)
    assert len(preview["rows"]) == 20
    assert preview["rows"][4] == {
        "line": 3, "prompt": "A red banner for shoes", "negative_prompt": "", "width": 728, "height": 90, "steps": 8,
        "guidance": 5.0, "seed": 1, "format": "png", "quality": 90, "name": "S1_leaderboard_1", "priority": "standard",
    }  # fmt: skip
    assert [(fault["line"], fault["field"]) for fault in preview["problems"]] == [(52, "name"), (53, "style")]
    one = Submission(prompt="a", width=728, height=90, steps=8).work
    other = Submission(prompt="a", width=300, height=250, steps=8).work
    assert preview["work"] == pytest.approx(100 * (one + other))
    assert preview["estimate"]["by"] == "arithmetic"
    assert api.get(BATCHES).json()["batches"] == []


def test_a_preview_tells_the_separator_and_what_only_comes_along(api: httpx.Client) -> None:
    text = "sku;prompt;price\nA;a boat, red;9,90\n"
    preview = api.post(PREVIEW, content=text, headers=CSV).json()
    assert (preview["jobs"], preview["separator"], preview["carried"]) == (1, ";", ["sku", "price"])
    batch = api.post(BATCHES, params={"name": "b"}, content=text, headers=CSV).json()
    (job,) = api.get(f"{BATCHES}/{batch['id']}/jobs").json()["jobs"]
    assert job["source"] == {"sku": "A", "prompt": "a boat, red", "price": "9,90"}
    assert api.get(f"{BATCHES}/{batch['id']}/results").text.splitlines()[1].count("9,90") == 1
    line = api.post(PREVIEW, content=b'{"prompt": "a"}', headers={"Content-Type": "application/x-ndjson"}).json()
    assert (line["separator"], line["carried"], line["short_rows"]) == (None, [], 0)
    short = api.post(PREVIEW, content="prompt,sku,seed\na,A,1\nb\nc\n", headers=CSV).json()
    assert (short["jobs"], short["short_rows"]) == (3, 2)


def test_rows_that_hold_too_much_are_told_in_a_spreadsheet_and_in_lines_too(api: httpx.Client) -> None:
    full = "a" * 32_767  # what Excel takes in one cell
    lines = "\n".join(json.dumps({"prompt": "a", "text": text}) for text in ("b", "c" * 66_000, "d"))
    for body, headers, line, column in (
        (spreadsheet(f"prompt,a,b\nc,d,e\nf,{full},{full}\n"), XLSX, 3, "a"),
        (lines.encode(), {"Content-Type": "application/x-ndjson"}, 2, "text"),
    ):
        (fault,) = assert_problem(api.post(BATCHES, params={"name": "b"}, content=body, headers=headers), 422)["errors"]
        assert (fault["line"], fault["field"]) == (line, column)
        assert "65,536 at most" in fault["message"]
    partial = {"name": "b", "partial": "true"}
    batch = api.post(BATCHES, params=partial, content=lines, headers={"Content-Type": "application/x-ndjson"}).json()
    assert (batch["jobs"], batch["rejected"]) == (2, 1)
    (rejection,) = api.get(f"{BATCHES}/{batch['id']}/rejections").json()["rejections"]
    assert len(rejection["source"]["text"]) == 1_001


def test_options_of_manifests_do_not_go_with_json(api: httpx.Client) -> None:
    jobs = {"name": "b", "jobs": [{"prompt": "a"}]}
    assert_problem(api.post(BATCHES, params={"template": "{a}"}, json=jobs), 422)


def test_a_spreadsheet_beyond_its_limit_is_refused_while_it_is_read(
    api: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifests, "XLSX_MAX_BYTES", 1000)
    for path in (f"{BATCHES}?name=b", PREVIEW):
        with closing(HTTPConnection(api.base_url.host, api.base_url.port, timeout=60)) as connection:
            connection.putrequest("POST", path)
            connection.putheader("Content-Type", manifests.XLSX)
            connection.putheader("Transfer-Encoding", "chunked")
            connection.endheaders()
            connection.send(b"7d0\r\n" + b"x" * 2000 + b"\r\n")  # and there it stops, without an end
            assert connection.getresponse().status == 413


def test_the_same_key_with_another_option_is_another_submission(api: httpx.Client) -> None:
    headers = CSV | {"Idempotency-Key": "autumn"}
    first = api.post(BATCHES, params={"name": "b"}, content="prompt\na\n", headers=headers)
    again = api.post(BATCHES, params={"name": "b"}, content="prompt\na\n", headers=headers)
    assert (first.status_code, again.json()["id"]) == (201, first.json()["id"])
    other = api.post(BATCHES, params={"name": "b", "default": "steps=1"}, content="prompt\na\n", headers=headers)
    assert other.status_code == 422


def test_what_was_drawn_already_is_not_drawn_again_when_asked_so(api: httpx.Client, hand: Farmhand) -> None:
    hand.beat()
    text = "prompt,width,height,seed\na,64,64,1\n"
    first = api.post(BATCHES, params={"name": "b"}, content=text, headers=CSV).json()
    (drawn,) = hand.store.batch_jobs(first["id"])
    hand.succeed(drawn)
    params = {"name": "b", "deduplicate": "true"}
    again = api.post(BATCHES, params=params, content=text + "b,64,64,2\n", headers=CSV).json()
    assert (again["counts"]["succeeded"], again["counts"]["queued"]) == (1, 1)
    assert hand.store.batch_jobs(again["id"])[0].copy_of == drawn.id
    same = {"prompt": "a", "width": 64, "height": 64, "seed": 1}
    assert api.post("/api/v1/jobs", params={"deduplicate": "true"}, json=same).json()["id"] == str(drawn.id)


def test_an_estimate_is_arithmetic_until_a_live_worker_has_measured_its_speed(
    api: httpx.Client, hand: Farmhand
) -> None:
    image = Submission(prompt="a").work  # 1024x1024, 50 steps, guided
    told = api.get("/api/v1/estimate", params={"work": image}).json()
    assert (told["by"], told["workers"], "H100" in told["assumed"]) == ("arithmetic", 0, True)
    assert told["gpu_s"] == pytest.approx(13.7, rel=0.05)  # the paper's 13.74 s
    hand.beat()
    row = {"host": "h", "pid": 1, "device": "cuda:0", "model": "m", "revision": "r", "version": "1", "capacity": 4}
    for speed in (10.0, 30.0):
        hand.store.beat(hand.id if speed == 10.0 else uuid4(), row, "[]", speed)
    hand.store.submit_batch("before", [Submission(prompt="a")] * 40, max_failures=3)
    paused = hand.store.submit_batch("paused", [Submission(prompt="a")] * 400, max_failures=3)
    hand.store.pause_batch(paused.id, paused=True)
    told = api.get("/api/v1/estimate", params={"work": image}).json()
    assert (told["by"], told["workers"], told["assumed"]) == ("measured", 2, None)
    assert told["gpu_s"] == pytest.approx(image / 20)
    now = datetime.fromisoformat(api.get("/api/v1/farm").json()["at"])
    left = datetime.fromisoformat(told["finishes_at"]) - now
    assert left == pytest.approx(timedelta(seconds=2 * image / 40), abs=timedelta(seconds=3)), "turn and turn about"
    told = api.get("/api/v1/estimate", params={"work": 100 * image}).json()
    left = datetime.fromisoformat(told["finishes_at"]) - now
    assert left == pytest.approx(timedelta(seconds=140 * image / 40), abs=timedelta(seconds=30))


def test_a_preview_reckons_with_whose_batch_it_will_be_its_weight_and_its_least_urgent_row(
    api: httpx.Client, hand: Farmhand
) -> None:
    hand.beat()
    hand.store.submit_batch("before", [Submission(prompt="a")] * 1000, max_failures=3)
    api.put("/api/v1/tenants/acme", json={"weight": 4}).raise_for_status()

    def images_until_drawn(*priorities: str, **params: str) -> float:
        rows = "prompt,priority\n" + "".join(f"a,{priority}\n" for priority in priorities)
        preview = api.post(PREVIEW, params=params, content=rows, headers=CSV).json()
        now = datetime.fromisoformat(api.get("/api/v1/farm").json()["at"])
        left = datetime.fromisoformat(preview["estimate"]["finishes_at"]) - now
        return left.total_seconds() / (preview["estimate"]["gpu_s"] / len(priorities))

    four = ["standard"] * 4
    for expected, rows, params in [
        (8, four, {}),
        (6, four, {"weight": "2"}),
        (5, four, {"tenant": "acme"}),
        (4 + 4 * 4, ["bulk", *["interactive"] * 3], {}),
    ]:
        assert images_until_drawn(*rows, **params) == pytest.approx(expected, abs=0.4), (rows, params)


@pytest.mark.parametrize("work", ["-1", "nan", "1e300", "much"])
def test_an_estimate_of_nonsense_is_refused(api: httpx.Client, work: str) -> None:
    assert_problem(api.get("/api/v1/estimate", params={"work": work}), 422)


def test_every_size_by_name_can_be_drawn(api: httpx.Client) -> None:
    sizes = api.get("/api/v1/sizes").json()["sizes"]
    assert {"name": "leaderboard", "set": "iab", "width": 728, "height": 90} in sizes
    for size in sizes:
        Submission(prompt="a", width=size["width"], height=size["height"])


def test_the_page_where_a_spreadsheet_is_handed_in_runs_its_own_script_alone(api: httpx.Client) -> None:
    page = api.get("/submit")
    assert page.status_code == 200
    assert 'src="/static/submit.js"' in page.text
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert "//" not in page.text.replace("<!doctype", "")
    assert api.get("/static/submit.js").status_code == 200
    assert '<a href="/submit">' in api.get("/").text


def test_a_batch_of_more_jobs_than_may_be_is_refused_and_its_preview_too(
    api: httpx.Client, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("producer.jobs.store.inserting.JOBS_MAX", 5)
    monkeypatch.setattr("producer.api.manifests.JOBS_MAX", 5)
    before = len(store.batches())
    for path in (BATCHES, PREVIEW):
        for seeds, status in ((5, 200), (6, 422)):
            query = {"name": "many", "vary": f"seed=1..{seeds}"}
            answer = api.post(path, params=query, content=b"prompt\na\n", headers=CSV)
            if status == 422:
                assert assert_problem(answer, 422)["type"].endswith(":too-many-jobs")
                assert "several batches" in answer.json()["detail"]
            else:
                assert answer.is_success, answer.text
    assert len(store.batches()) == before + 1


def test_an_input_of_more_bad_lines_than_are_kept_is_refused(
    api: httpx.Client, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    query = {"name": "bad", "partial": "true"}
    body = b"prompt,width\na,64\nb,1\nc,1\nd,1\n"
    before = len(store.batches())
    for limit, most in (("REJECTIONS_MAX", 2), ("REJECTED_MAX_CHARACTERS", 50)):
        with monkeypatch.context() as patched:
            patched.setattr(f"producer.jobs.store.inserting.{limit}", most)
            answer = api.post(BATCHES, params=query, content=body, headers=CSV)
        assert assert_problem(answer, 422)["type"].endswith(":too-many-rejections")
        assert "mend the file" in answer.json()["detail"]
    assert len(store.batches()) == before
