"""What was drawn is brought home, and steered on the way, by the command line: a real farm, a hand in the worker's
place."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import openpyxl
import pytest
from PIL import Image

from producer.cli import main
from producer.jobs.contract import Batch, Entry, Job, Submission
from producer.jobs.settings import Settings
from producer.jobs.storage import Storage
from tests.acceptance.test_command_line import COMMAND, ROOT
from tests.farm import Farmhand, serving
from tests.waiting import until


@dataclass(frozen=True)
class Ended:
    """What a command said, and its exit code."""

    returncode: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class CommandLine:
    """``ovis-batch`` of somebody who knows where the farm is, and nothing else."""

    url: str

    def run(self, *words: object, stdin: str = "") -> Ended:
        """In this process: a process of its own takes most of its time to begin."""
        said, complained = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(said), redirect_stderr(complained):
            patch.setattr(sys, "argv", ["ovis-batch", *map(str, words)])
            patch.setattr(sys, "stdin", io.StringIO(stdin))
            patch.setenv("OVIS_API_URL", self.url)
            with pytest.raises(SystemExit) as ended:
                main()
        return Ended(int(ended.value.code or 0), said.getvalue(), complained.getvalue())

    def json(self, *words: object) -> dict[str, Any]:
        ended = self.run(*words, "--json")
        assert ended.stdout, ended.stderr
        return dict(json.loads(ended.stdout)) | {"exit_code": ended.returncode}

    def start(self, *words: object) -> "subprocess.Popen[bytes]":
        """In a process of its own, which may be killed."""
        environment = os.environ | {"OVIS_API_URL": self.url}
        return subprocess.Popen((*COMMAND, *map(str, words)), env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)


@pytest.fixture
def farm(settings: Settings) -> Iterator[CommandLine]:
    with serving(settings) as url:
        yield CommandLine(url)


@pytest.fixture
def hand(settings: Settings) -> Iterator[Farmhand]:
    farmhand = Farmhand(settings)
    yield farmhand
    farmhand.close()


def hand_in(hand: Farmhand, count: int) -> tuple[Batch, list[Job]]:
    wanted = [
        Entry(
            Submission.model_validate({"prompt": "a", "width": 64, "height": 64, "seed": n, "name": f"SKU-{n}"}),
            n + 2,
            {"sku": f"SKU-{n}", "headline": "=1+1"},
        )
        for n in range(count)
    ]
    batch = hand.store.submit_batch("banners", wanted, max_failures=1)
    return batch, hand.store.batch_jobs(batch.id)


def drawn(hand: Farmhand, count: int) -> tuple[Batch, list[Job]]:
    batch, jobs = hand_in(hand, count)
    for job in jobs:
        hand.succeed(job)
    return batch, hand.store.batch_jobs(batch.id)


def assert_whole(folder: Path, jobs: list[Job]) -> None:
    for job in jobs:
        assert sha256((folder / job.file_name).read_bytes()).hexdigest() == job.sha256


def test_a_folder_gets_the_images_the_table_and_a_contact_sheet(
    farm: CommandLine, hand: Farmhand, tmp_path: Path
) -> None:
    batch, jobs = drawn(hand, 3)
    told = farm.json("results", batch.id, "--to", tmp_path)
    assert told == {"folder": str(tmp_path), "images": 3, "fetched": 3, "jobs": 3, "exit_code": 0}
    assert_whole(tmp_path, jobs)
    assert {path.name for path in tmp_path.iterdir()} == {
        *(job.file_name for job in jobs),
        *("results.csv", "contact-sheet.png", ".ovis-batch"),
    }
    with (tmp_path / "results.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["sku"], row["headline"], row["file"]) for row in rows] == [
        (f"SKU-{n}", "'=1+1", f"SKU-{n}.png") for n in range(3)
    ]
    with Image.open(tmp_path / "contact-sheet.png") as sheet:
        assert sheet.width == 1600
    assert farm.run("results", batch.id, "--to", tmp_path, "--format", "xlsx").returncode == 0
    assert openpyxl.load_workbook(tmp_path / "results.xlsx").worksheets[0]["B2"].value == "=1+1"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("table", ["csv", "xlsx"])
def test_the_folder_of_one_batch_is_refused_to_another_and_nothing_in_it_changes(
    farm: CommandLine, hand: Farmhand, tmp_path: Path, table: str
) -> None:
    (first, _), (second, _) = drawn(hand, 2), drawn(hand, 3)
    assert farm.run("results", first.id, "--to", tmp_path, "--format", table).returncode == 0
    before = contents(tmp_path)
    refused = farm.run("results", second.id, "--to", tmp_path)
    assert (refused.returncode, f"results of batch {first.id}" in refused.stderr) == (2, True), refused.stderr
    assert contents(tmp_path) == before
    assert farm.run("results", first.id, "--to", tmp_path, "--format", "jsonl").returncode == 0


def test_the_folders_that_are_proposed_keep_two_batches_apart(farm: CommandLine, hand: Farmhand) -> None:
    batches = [drawn(hand, 1)[0] for _ in range(2)]
    said = [farm.run("wait", batch.id).stdout.strip().splitlines()[-1].split() for batch in batches]
    assert [words[:3] for words in said] == [["ovis-batch", "results", str(batch.id)] for batch in batches]
    assert said[0][4] != said[1][4]


@pytest.mark.parametrize("name", ["SKU-1.png", "results.csv", "contact-sheet.png"])
def test_a_file_of_somebody_else_is_not_replaced(farm: CommandLine, hand: Farmhand, tmp_path: Path, name: str) -> None:
    batch, jobs = drawn(hand, 2)
    (tmp_path / name).write_text("mine")
    refused = farm.run("results", batch.id, "--to", tmp_path)
    assert (refused.returncode, str(tmp_path / name) in refused.stderr) == (2, True), refused.stderr
    if name == jobs[1].file_name:
        assert farm.run("results", jobs[1].id, "--to", tmp_path).returncode == 2
    assert contents(tmp_path) == {name: b"mine"}


def test_a_folder_with_files_that_nothing_replaces_is_filled(farm: CommandLine, hand: Farmhand, tmp_path: Path) -> None:
    batch, jobs = drawn(hand, 2)
    (tmp_path / "notes.txt").write_text("mine")
    assert farm.run("results", jobs[0].id, "--to", tmp_path).returncode == 0
    assert farm.run("results", batch.id, "--to", tmp_path).returncode == 0
    assert_whole(tmp_path, jobs)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_download_that_is_killed_goes_on_where_it_stopped(farm: CommandLine, hand: Farmhand, tmp_path: Path) -> None:
    batch, jobs = drawn(hand, 60)
    broken = farm.start("results", batch.id, "--to", tmp_path)
    until(lambda: len(list(tmp_path.glob("SKU-*.png"))) >= 5, pause_s=0.001)
    broken.send_signal(signal.SIGKILL)
    broken.wait(30)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("SKU-*.png")}
    assert 5 <= len(kept) < 60
    assert not (tmp_path / "results.csv").exists()
    told = farm.json("results", batch.id, "--to", tmp_path)
    assert (told["images"], told["fetched"], told["exit_code"]) == (60, 60 - len(kept), 0)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert_whole(tmp_path, jobs)
    assert not list(tmp_path.glob("*.part"))


def test_a_spoilt_file_is_fetched_again_and_no_other(farm: CommandLine, hand: Farmhand, tmp_path: Path) -> None:
    batch, jobs = drawn(hand, 4)
    farm.run("results", batch.id, "--to", tmp_path)
    spoilt = tmp_path / jobs[1].file_name
    spoilt.write_bytes(spoilt.read_bytes()[:-1] + b"x")
    (tmp_path / jobs[2].file_name).unlink()
    ended = farm.run("results", batch.id, "--to", tmp_path)
    assert ended.returncode == 0
    assert "4 of 4 images" in ended.stdout
    assert "(2 were there already)" in ended.stdout
    assert_whole(tmp_path, jobs)


def test_an_image_that_is_not_what_was_recorded_is_told_and_not_kept(
    farm: CommandLine, hand: Farmhand, storage: Storage, tmp_path: Path
) -> None:
    batch, (job,) = drawn(hand, 1)
    assert job.object_key is not None
    storage.put(job.object_key, b"something else", "image/png")
    ended = farm.run("results", batch.id, "--to", tmp_path)
    assert (ended.returncode, "sha256" in ended.stderr) == (2, True), ended.stderr
    assert not list(tmp_path.glob("SKU-*"))


def test_one_zip_brings_it_all(farm: CommandLine, hand: Farmhand, tmp_path: Path) -> None:
    batch, jobs = drawn(hand, 3)
    told = farm.json("results", batch.id, "--to", tmp_path, "--zip")
    assert (told["file"], told["exit_code"]) == (str(tmp_path / f"{batch.id}.zip"), 0)
    with zipfile.ZipFile(told["file"]) as archive:
        assert archive.namelist() == [*(job.file_name for job in jobs), "results.csv"]
        assert archive.testzip() is None


def test_what_is_not_drawn_yet_is_told_by_the_exit_code(farm: CommandLine, hand: Farmhand, tmp_path: Path) -> None:
    batch, jobs = hand_in(hand, 2)
    hand.succeed(jobs[0])
    told = farm.json("results", batch.id, "--to", tmp_path)
    assert (told["images"], told["jobs"], told["exit_code"]) == (1, 2, 1)
    assert farm.json("results", jobs[1].id, "--to", tmp_path)["exit_code"] == 1
    assert farm.json("results", jobs[0].id, "--to", tmp_path / "one") == {
        "folder": str(tmp_path / "one"), "images": 1, "jobs": 1, "exit_code": 0,
    }  # fmt: skip
    assert farm.run("results", jobs[0].id, "--zip").returncode == 2


def test_a_batch_is_steered_from_the_command_line(farm: CommandLine, hand: Farmhand) -> None:
    batch, (failed, cancelled, good, waiting) = hand_in(hand, 4)
    hand.fail(failed)
    hand.succeed(good)
    assert farm.json("cancel", cancelled.id)["state"] == "cancelled"
    assert farm.json("pause", batch.id)["paused"] is True
    assert "paused" in farm.run("status", batch.id).stdout
    assert farm.json("prioritise", batch.id, "bulk")["paused"] is True
    assert hand.store.job(waiting.id).priority == "bulk"
    assert farm.json("resume", batch.id)["paused"] is False
    assert farm.json("retry", batch.id, "--failed")["counts"] == {
        "queued": 2, "running": 0, "succeeded": 1, "failed": 0, "cancelled": 1,
    }  # fmt: skip
    assert farm.json("retry", batch.id, "--cancelled")["counts"]["queued"] == 3
    refused = farm.run("retry", good.id)
    assert (refused.returncode, "succeeded" in refused.stderr) == (2, True), refused.stderr
    hand.fail(hand.store.job(failed.id))
    assert farm.json("retry", failed.id)["state"] == "queued"


def test_a_batch_is_deleted_once_a_person_says_so(farm: CommandLine, hand: Farmhand) -> None:
    batch, _ = drawn(hand, 1)
    asked = farm.run("delete", batch.id, stdin="n\n")
    assert (asked.returncode, "delete all of it" in asked.stderr) == (130, True)
    alone = farm.run("delete", batch.id)
    assert (alone.returncode, "--yes (-y)" in alone.stderr) == (2, True), alone.stderr
    assert farm.run("status", batch.id).returncode == 0
    assert farm.run("delete", batch.id, stdin="y\n").returncode == 0
    assert farm.run("delete", batch.id, "--yes").returncode == 4


def peak_kb(farm: CommandLine, batch: Batch, to: Path) -> int:
    process = farm.start("results", batch.id, "--to", to)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 1  # nothing is drawn
    return used.ru_maxrss


def test_a_large_batch_takes_no_more_memory_than_a_small_one(farm: CommandLine, hand: Farmhand, tmp_path: Path) -> None:
    small, _ = hand_in(hand, 10)
    many = (Submission.model_validate({"prompt": "x" * 3000, "name": f"n{n}"}) for n in range(2_500))
    large = hand.store.submit_batch("large", many, max_failures=1)
    grown_kb = peak_kb(farm, large, tmp_path / "large") - peak_kb(farm, small, tmp_path / "small")
    assert (tmp_path / "small" / "results.csv").read_bytes().count(b"\n") == 11
    assert grown_kb < 20_000
