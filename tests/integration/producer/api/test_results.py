"""What came out of a batch, as a table and as a ZIP: the input's rows in their order, on real servers."""

import csv
import io
import json
import resource
import threading
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from hashlib import sha256
from typing import Any

import httpx
import openpyxl
import pytest
from sqlalchemy import text

from producer.jobs.contract import Batch, Entry, Job, Rejection, Submission
from producer.jobs.postgres import CONNECT_ARGS
from producer.jobs.results import Results
from producer.jobs.settings import Settings
from producer.jobs.storage import Storage
from producer.jobs.store import Store
from producer.manifest.record import ROW_MAX_BYTES
from tests.farm import Farmhand
from tests.integration.producer.api.test_jobs import assert_problem
from tests.waiting import until


def submission(**fields: Any) -> Submission:
    return Submission.model_validate({"prompt": "a boat", "width": 64, "height": 64} | fields)


def hand_in(hand: Farmhand, entries: Iterable[Any], name: str = "boats") -> tuple[Batch, list[Job]]:
    batch = hand.store.submit_batch(name, entries, max_failures=1)
    return batch, hand.store.batch_jobs(batch.id)


def mixed(hand: Farmhand) -> tuple[Batch, list[Job]]:
    """Two jobs of line 2, line 3 refused, one job of line 4: failed; and one of line 6: it waits."""
    sku = {"zz": "A-1", "headline": "-5", "b": "=CMD()", "prompt": "a boat"}
    batch, jobs = hand_in(
        hand,
        [
            Entry(submission(seed=1, name="boat"), 2, sku),
            Entry(submission(seed=2, name="BOAT", width=80), 2, sku),
            Rejection(3, {"zz": "B", "headline": "+1+1", "prompt": ""}, "invalid", "is empty", "prompt"),
            Entry(submission(seed=3), 4, {"zz": "@x", "prompt": "a boat", "late": "\tx"}),
            Entry(submission(seed=4), 6, {"zz": "C", "prompt": "a boat"}),
        ],
        name="Boote & 船/2026",
    )
    hand.succeed(jobs[0])
    hand.succeed(jobs[1])
    hand.fail(jobs[2], "=too long")
    return batch, hand.store.batch_jobs(batch.id)


def read_csv(response: httpx.Response) -> list[dict[str, str]]:
    assert response.status_code == 200, response.text
    assert response.content.startswith(b"\xef\xbb\xbf")  # a spreadsheet takes it for UTF-8
    return list(csv.DictReader(io.StringIO(response.content.decode("utf-8-sig"), newline="")))


def results_path(batch: Batch, **query: str) -> httpx.URL:
    return httpx.URL(f"/api/v1/batches/{batch.id}/results", params=query)


def test_the_table_mirrors_the_input_row_by_row(api: httpx.Client, hand: Farmhand) -> None:
    batch, jobs = mixed(hand)
    rows = read_csv(api.get(results_path(batch)))
    assert list(rows[0])[:5] == ["zz", "headline", "b", "prompt", "late"]
    assert [(row["line"], row["state"], row["zz"]) for row in rows] == [
        ("2", "succeeded", "A-1"),
        ("2", "succeeded", "A-1"),
        ("3", "rejected", "B"),
        ("4", "failed", "'@x"),
        ("6", "queued", "C"),
    ]
    assert [row["file"] for row in rows] == ["boat.png", "BOAT-2.png", "", "", ""]
    assert [row["job"] for row in rows if row["job"]] == [str(job.id) for job in jobs]
    assert (rows[2]["error"], rows[3]["error"]) == ("prompt: is empty", "'=too long")
    first = rows[0]
    assert (first["seed"], first["size"], rows[1]["size"]) == ("1", "64x64", "80x64")
    assert (first["sha256"], first["bytes"]) == (jobs[0].sha256, str(jobs[0].size_bytes))
    assert (first["drawing_s"], first["warnings"]) == ("1.5", "")
    assert sha256(api.get(first["url"], follow_redirects=True).content).hexdigest() == first["sha256"]


@pytest.mark.parametrize("format", ["csv", "jsonl"])
def test_rows_of_a_running_batch_say_what_they_wait_for(api: httpx.Client, hand: Farmhand, format: str) -> None:
    batch, jobs = hand_in(hand, [submission(seed=n) for n in range(3)])
    hand.succeed(jobs[0])
    hand.beat()
    hand.claim(jobs[1])
    told = api.get(results_path(batch, format=format))
    rows = read_csv(told) if format == "csv" else [json.loads(line) for line in told.text.splitlines()]
    assert [row["state"] for row in rows] == ["succeeded", "running", "queued"]
    assert [bool(row["url"] and row["file"] and row["finished_at"]) for row in rows] == [True, False, False]
    described = api.get("/openapi.json").json()["paths"]["/api/v1/batches/{batch_id}/results"]["get"]["description"]
    assert "`queued`" in described
    assert "`running`" in described


def test_formulas_come_back_inert_and_numbers_as_numbers(api: httpx.Client, hand: Farmhand) -> None:
    harmful = ["=CMD()", "+1+1", "-2+3", "@SUM(A1)", "\tx=1", "\rx=1", "＝1"]
    harmless = ["-5", "+3.5", "-1e-5", "-1,5", "a=b", "'=x", 'say "hi"', "two\nlines", "a;b=c", "", "007"]
    entries = [Entry(submission(), n, {"=cell": cell}) for n, cell in enumerate(harmful + harmless, start=1)]
    batch, _ = hand_in(hand, entries)
    rows = read_csv(api.get(results_path(batch)))
    assert [row["'=cell"] for row in rows] == [f"'{cell}" for cell in harmful] + harmless
    book = openpyxl.load_workbook(io.BytesIO(api.get(results_path(batch, format="xlsx")).content))
    assert book.worksheets[0]["A1"].value == "=cell"
    cells = [cell for (cell,) in book.worksheets[0].iter_rows(min_row=2, max_col=1)]
    assert [cell.value or "" for cell in cells] == [
        cell.replace("\r", "\n") for cell in harmful + harmless
    ]  # XML has no other
    assert {cell.data_type for cell in cells if cell.value} == {"s"}


def test_what_was_no_text_stays_what_it_was(api: httpx.Client, hand: Farmhand) -> None:
    source = {
        "n": -5,
        "x": 0.5,
        "big": 2**60,
        "yes": True,
        "nothing": None,
        "list": [1, "ü"],
        "bell": "\x07",
        "#": "#N/A",
    }
    batch, _ = hand_in(hand, [Entry(submission(seed=2**60), 1, source)])
    (row,) = api.get(results_path(batch, format="jsonl")).text.splitlines()
    fields = json.loads(row)
    assert {key: fields[key] for key in source} == source
    assert list(fields)[: len(source)] == list(source)
    (row_,) = read_csv(api.get(results_path(batch)))
    assert [row_[key] for key in source] == ["-5", "0.5", str(2**60), "true", "", '[1, "ü"]', "\x07", "#N/A"]
    sheet = openpyxl.load_workbook(io.BytesIO(api.get(results_path(batch, format="xlsx")).content)).worksheets[0]
    (header, values) = ([cell.value for cell in cells] for cells in sheet.iter_rows())
    assert values[: len(source)] == [-5, 0.5, str(2**60), True, None, '[1, "ü"]', "\ufffd", "#N/A"]
    assert dict(zip(header, values, strict=True))["seed"] == str(2**60)


def test_a_column_of_the_input_keeps_its_name_beside_one_of_the_results(api: httpx.Client, hand: Farmhand) -> None:
    source = {"seed": "", "result_seed": "x", "state": "Bavaria"}
    batch, _ = hand_in(hand, [Entry(submission(seed=7), 1, source)])
    for rows in (
        read_csv(api.get(results_path(batch))),
        [json.loads(api.get(results_path(batch, format="jsonl")).text)],
    ):
        (row,) = rows
        assert {key: row[key] for key in source} == source
        assert (str(row["result_result_seed"]), row["result_state"], row["prompt"]) == ("7", "queued", "a boat")


def test_jobs_without_an_input_of_their_own_begin_with_their_prompt(api: httpx.Client, hand: Farmhand) -> None:
    batch, _ = hand_in(hand, [submission(prompt="茶"), submission(prompt="=1")])
    rows = read_csv(api.get(results_path(batch)))
    assert [(next(iter(row)), row["prompt"], row["line"]) for row in rows] == [
        ("prompt", "茶", "1"),
        ("prompt", "'=1", "2"),
    ]
    batch, _ = hand_in(hand, [])
    assert read_csv(api.get(results_path(batch))) == []
    assert api.get(results_path(batch, format="jsonl")).content == b""
    sheet = openpyxl.load_workbook(io.BytesIO(api.get(results_path(batch, format="xlsx")).content)).worksheets[0]
    assert sheet.max_row == 1


def test_a_sheet_that_is_full_is_followed_by_another(
    api: httpx.Client, hand: Farmhand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("producer.api.tables.SHEET_MAX_ROWS", 4)
    batch, _ = hand_in(hand, [submission(seed=n) for n in range(7)])
    book = openpyxl.load_workbook(io.BytesIO(api.get(results_path(batch, format="xlsx")).content))
    assert [sheet.max_row for sheet in book.worksheets] == [4, 4, 2]
    assert {sheet["A1"].value for sheet in book.worksheets} == {"prompt"}


@pytest.mark.parametrize(
    ("format", "media_type"),
    [
        ("csv", "text/csv; charset=utf-8"),
        ("jsonl", "application/x-ndjson"),
        ("xlsx", "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet"),
    ],
)
def test_a_browser_saves_it_under_the_batchs_name(
    api: httpx.Client, hand: Farmhand, format: str, media_type: str
) -> None:
    batch, _ = mixed(hand)
    response = api.get(results_path(batch, format=format))
    assert response.headers["content-type"] == media_type
    told = response.headers["content-disposition"]
    assert told.startswith(f'attachment; filename="Boote _ __2026 results.{format}"')
    assert told.endswith(f"filename*=UTF-8''Boote%20%26%20%E8%88%B9%2F2026%20results.{format}")


def test_an_unknown_batch_or_format_is_a_problem(api: httpx.Client, hand: Farmhand) -> None:
    nowhere = "/api/v1/batches/00000000-0000-0000-0000-000000000000"
    assert_problem(api.get(f"{nowhere}/results"), 404)
    assert_problem(api.get(f"{nowhere}/images.zip"), 404)
    batch, _ = hand_in(hand, [submission()])
    assert_problem(api.get(results_path(batch, format="pdf")), 422)


def grown_kb(before_kb: int) -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb


def test_a_large_batch_is_streamed_in_constant_memory(api: httpx.Client, hand: Farmhand) -> None:
    """The server is in this process, so its memory is this process's."""
    cells = {f"column {n}": "x" * 200 for n in range(5)}
    batch = hand.store.submit_batch("large", (Entry(submission(), n, cells) for n in range(1, 6_001)), max_failures=1)
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lines = size_bytes = 0
    with api.stream("GET", results_path(batch)) as response:
        for piece in response.iter_bytes():
            lines += piece.count(b"\n")
            size_bytes += len(piece)
    assert lines == 6_001
    assert size_bytes > 6_000_000
    assert grown_kb(before_kb) < 25_000


def full_rows(hand: Farmhand, count: int) -> Batch:
    """A batch of rows that hold as much as a row may, in the memory's most costly way: one wide character among many
    narrow ones."""
    cells = {"text": "x" * (ROW_MAX_BYTES - 20) + "\U0001f6a2"}
    return hand.store.submit_batch("full", (Entry(submission(), n, cells) for n in range(1, count + 1)), max_failures=1)


@pytest.mark.parametrize(
    ("path", "least_bytes"),
    [
        ("jobs?limit=1000", 1_800_000),
        ("results", 400 * 65_000),
        ("results?format=jsonl", 400 * 65_000),
        ("results?format=xlsx", 10_000),
    ],
)
def test_the_fullest_rows_are_answered_in_little_memory(
    api: httpx.Client, hand: Farmhand, path: str, least_bytes: int
) -> None:
    """The server is in this process, so its memory is this process's."""
    batch = full_rows(hand, 400)
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with api.stream("GET", f"/api/v1/batches/{batch.id}/{path}") as response:
        size_bytes = sum(map(len, response.iter_bytes()))
    assert response.status_code == 200
    assert size_bytes > least_bytes
    assert grown_kb(before_kb) < 30_000


def test_a_list_ends_early_where_its_rows_hold_much_and_says_where_it_goes_on(
    api: httpx.Client, hand: Farmhand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("producer.jobs.store.reading.PAGE_MAX_BYTES", 3_000)
    texts = ["x" * (5_000 if n == 3 else 1_000) for n in range(1, 10)]
    rejected = [Rejection(n, {"text": text}, "invalid", "is bad") for n, text in enumerate(texts, start=1)]
    entries = [Entry(submission(), n, {"text": text}) for n, text in enumerate(texts, start=20)]
    batch, _ = hand_in(hand, [*rejected, *entries])
    for kind, place in (("rejections", "line"), ("jobs", "position")):
        found, after = [], None
        while after is not None or not found:
            params = {"limit": 1000} | ({"after": after} if after is not None else {})
            page = api.get(f"/api/v1/batches/{batch.id}/{kind}", params=params).json()
            assert 1 <= len(page[kind]) <= 2
            found += page[kind]
            after = page["next"]
        assert [row["source"]["text"] for row in found] == texts
        assert [row[place] for row in found] == sorted(row[place] for row in found)
    rows = read_csv(api.get(results_path(batch)))
    assert [row["text"] for row in rows] == [*texts, *texts]


def test_columns_are_found_however_long_it_takes(
    hand: Farmhand, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, _ = hand_in(hand, [Entry(submission(), 1, {"sku": "A"})])
    monkeypatch.setitem(CONNECT_ARGS, "options", "-c statement_timeout=200ms")
    with closing(Store.at(settings.require("database_url"))) as store, ThreadPoolExecutor() as threads:
        with hand.store.database.begin() as connection:
            connection.execute(text("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE"))
            asked = threads.submit(Results(store).columns, batch.id)
            with pytest.raises(TimeoutError):
                asked.result(timeout=1)
        assert asked.result(timeout=60) == ["sku"]


def zipped(response: httpx.Response) -> zipfile.ZipFile:
    assert response.status_code == 200, response.text
    return zipfile.ZipFile(io.BytesIO(response.content))


def test_a_zip_holds_every_image_under_its_name_and_the_table_last(api: httpx.Client, hand: Farmhand) -> None:
    batch, jobs = mixed(hand)
    response = api.get(f"/api/v1/batches/{batch.id}/images.zip")
    assert response.headers["content-type"] == "application/zip"
    archive = zipped(response)
    assert archive.testzip() is None
    assert archive.namelist() == ["boat.png", "BOAT-2.png", "results.csv"]
    for name, job in zip(archive.namelist(), jobs[:2], strict=False):
        assert sha256(archive.read(name)).hexdigest() == job.sha256
    assert archive.read("results.csv") == api.get(results_path(batch)).content


def test_more_images_than_are_fetched_ahead_come_in_order(api: httpx.Client, hand: Farmhand) -> None:
    batch, jobs = hand_in(hand, [submission(seed=n) for n in range(30)])
    bodies = [hand.succeed(job) for job in jobs]
    archive = zipped(api.get(f"/api/v1/batches/{batch.id}/images.zip"))
    assert [archive.read(info) for info in archive.infolist()[:-1]] == bodies


def test_a_batch_without_an_image_is_a_zip_with_the_table_alone(api: httpx.Client, hand: Farmhand) -> None:
    batch, _ = hand_in(hand, [submission()])
    assert zipped(api.get(f"/api/v1/batches/{batch.id}/images.zip")).namelist() == ["results.csv"]


def test_an_image_that_the_bucket_has_lost_is_named(api: httpx.Client, hand: Farmhand, storage: Storage) -> None:
    batch, jobs = hand_in(hand, [submission(name="lost"), submission(name="there")])
    for job in jobs:
        hand.succeed(job)
    storage.delete([hand.store.job(jobs[0].id).object_key or ""])
    archive = zipped(api.get(f"/api/v1/batches/{batch.id}/images.zip"))
    assert archive.namelist() == ["there.png", "missing.txt", "results.csv"]
    assert archive.read("missing.txt") == b"lost.png\n"


@pytest.fixture
def large_images(hand: Farmhand, storage: Storage) -> Batch:
    """A batch of 24 images of 4 MB each, more than any connection's buffers take."""
    batch, jobs = hand_in(hand, [submission(seed=n) for n in range(24)])
    for job in jobs:
        hand.succeed(job)
        storage.put(hand.store.job(job.id).object_key or "", b"x" * 4_000_000, "image/png")
    return batch


def zip_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("zip")]


def test_a_reader_that_goes_away_stops_the_zip(
    api: httpx.Client, large_images: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    get = Storage.get

    def noted(storage: Storage, key: str) -> bytes:
        asked.append(key)
        return get(storage, key)

    monkeypatch.setattr(Storage, "get", noted)
    with api.stream("GET", f"/api/v1/batches/{large_images.id}/images.zip") as response:
        next(response.iter_bytes())
        assert zip_threads()
    until(lambda: not zip_threads())
    assert len(asked) < 24


def test_images_on_their_way_are_not_gathered_in_memory(api: httpx.Client, large_images: Batch) -> None:
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with api.stream("GET", f"/api/v1/batches/{large_images.id}/images.zip") as response:
        size_bytes = sum(len(piece) for piece in response.iter_bytes())
    assert size_bytes > 96_000_000
    assert grown_kb(before_kb) < 70_000


def test_a_bucket_that_is_away_is_a_problem_or_a_broken_zip_and_never_a_short_one(
    api: httpx.Client, large_images: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    from producer.jobs.errors import Unavailable

    monkeypatch.setattr("producer.api.archive.PAUSES_S", (0.01,))
    get, answers = Storage.get, iter(range(1000))

    def sometimes(storage: Storage, key: str) -> bytes:
        if next(answers) >= good:
            raise Unavailable("S3", "away")
        return get(storage, key)

    monkeypatch.setattr(Storage, "get", sometimes)
    good = 0
    assert_problem(api.get(f"/api/v1/batches/{large_images.id}/images.zip"), 503)
    good = 10_000
    answers = iter([*range(5), *[10_000] * 1000])
    with pytest.raises(httpx.RemoteProtocolError):
        api.get(f"/api/v1/batches/{large_images.id}/images.zip")


def test_a_batch_that_is_deleted_while_it_is_read_breaks_off(api: httpx.Client, hand: Farmhand) -> None:
    cells = {"text": "x" * 8000}
    batch = hand.store.submit_batch("b", (Entry(submission(), n, cells) for n in range(1, 3_001)), max_failures=1)

    def read() -> Iterator[bytes]:
        with api.stream("GET", results_path(batch)) as response:
            yield from response.iter_bytes()

    pieces = read()
    next(pieces)
    hand.store.delete_batch(batch.id)
    with pytest.raises(httpx.RemoteProtocolError):
        list(pieces)


def test_more_columns_than_a_table_has_are_told(
    api: httpx.Client, hand: Farmhand, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, _ = hand_in(hand, [Entry(submission(), n, {f"c{n}": "x"}) for n in range(1, 5)])
    monkeypatch.setattr("producer.jobs.results.COLUMNS_MAX", 4)
    assert len(read_csv(api.get(results_path(batch)))) == 4
    monkeypatch.setattr("producer.jobs.results.COLUMNS_MAX", 3)
    for format in ("csv", "xlsx"):
        told = assert_problem(api.get(results_path(batch, format=format)), 422)
        assert told["type"].endswith(":too-many-columns")
        assert "jsonl" in told["detail"]


def test_lines_and_a_zip_hold_any_number_of_columns(
    api: httpx.Client, hand: Farmhand, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [Entry(submission(), n, {f"c{n}": "x"}) for n in range(1, 5)]
    batch, jobs = hand_in(hand, [*entries, Entry(submission(seed=7), 5, {"seed": "mine", "result_seed": "too"})])
    hand.succeed(jobs[0])
    monkeypatch.setattr("producer.jobs.results.COLUMNS_MAX", 3)
    lines = api.get(results_path(batch, format="jsonl"))
    rows = [json.loads(line) for line in lines.text.splitlines()]
    assert [row.get(f"c{n}") for n, row in enumerate(rows, start=1)] == ["x"] * 4 + [None]
    assert (rows[4]["seed"], rows[4]["result_seed"], rows[4]["result_result_seed"]) == ("mine", "too", 7)
    assert all("result_result_seed" in row for row in rows)
    archive = zipped(api.get(f"/api/v1/batches/{batch.id}/images.zip"))
    assert archive.namelist() == ["000001.png", "results.jsonl"]
    assert archive.read("results.jsonl") == lines.content
