"""The product through its command line: a farm by ``ovis-batch up``, with the tiny model and real servers."""

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import pytest
from PIL import Image

from tests.farm import free_port
from tests.waiting import until

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-m", "producer.cli")


@dataclass(frozen=True)
class CommandLine:
    """``ovis-batch`` with the settings of one farm."""

    environment: dict[str, str]

    def run(self, *words: str, stdin: str | None = None) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            (*COMMAND, *words), env=self.environment, cwd=ROOT, input=stdin, capture_output=True, text=True, timeout=180
        )

    def json(self, *words: str) -> dict[str, Any]:
        ended = self.run(*words, "--json")
        return dict(json.loads(ended.stdout)) | {"exit_code": ended.returncode}

    def start(self, *words: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            (*COMMAND, *words),
            env=self.environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def command_line(data_dir: Path) -> CommandLine:
    """With leases of 4 s instead of 20, so that the death of a worker is noticed sooner."""
    quick = {"OVIS_DATA_DIR": str(data_dir), "OVIS_API_PORT": str(free_port()), "OVIS_TIME_SCALE": "0.2"}
    return CommandLine(os.environ | quick)


@contextmanager
def up(command: CommandLine) -> Iterator["subprocess.Popen[str]"]:
    farm = command.start("up")
    try:
        yield farm
    finally:
        farm.send_signal(signal.SIGTERM)
        output, _ = farm.communicate(timeout=120)
        assert farm.returncode == 0, output
        assert not [child for child in psutil.process_iter() if _belongs(child, command)]


def _belongs(process: psutil.Process, command: CommandLine) -> bool:
    try:
        return command.environment["OVIS_DATA_DIR"] in process.environ().get("OVIS_DATA_DIR", "")
    except psutil.Error:
        return False


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    command = command_line(tmp_path_factory.mktemp("farm"))
    with up(command):
        until(
            lambda: command.run("status").returncode == 0 and command.json("status")["workers"],
            timeout_s=180,
            pause_s=1,
        )
        yield command


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        image.load()
        return image.size


def jobs_of(farm: CommandLine) -> int:
    """Jobs, in whatever state they are."""
    return sum(farm.json("status")["counts"].values())


def test_one_prompt_is_drawn_and_two_prompts_with_one_seed_differ(farm: CommandLine, tmp_path: Path) -> None:
    size = ("--width", "64", "--height", "64", "--steps", "2", "--seed", "1", "--wait")
    jobs = [farm.json("submit", prompt, *size) for prompt in ("A red banner", "A blue star")]
    assert [(job["state"], job["exit_code"], job["request"]["seed"]) for job in jobs] == [("succeeded", 0, 1)] * 2
    assert jobs[0]["sha256"] != jobs[1]["sha256"]
    assert farm.json("status", jobs[0]["id"])["object_key"] == jobs[0]["object_key"]
    assert farm.json("results", jobs[0]["id"], "--to", str(tmp_path))["images"] == 1
    assert size_of(tmp_path / f"{jobs[0]['id']}.png") == (64, 64)


def test_a_manifest_is_drawn_and_downloaded_one_file_a_row(farm: CommandLine, tmp_path: Path) -> None:
    manifest = tmp_path / "banners.csv"
    manifest.write_text("sku,prompt,width,height\nA,red,100,70\nB,新茶,64,130\nC,blue,64,64\n", encoding="utf-8-sig")
    submitted = farm.json("submit", "--file", str(manifest), "--name", "{sku}_{width}x{height}.png", "--steps", "2")
    assert farm.run("wait", submitted["id"]).returncode == 0
    to = tmp_path / "out"
    assert farm.json("results", submitted["id"], "--to", str(to)) == {
        "folder": str(to), "images": 3, "fetched": 3, "jobs": 3, "exit_code": 0,
    }  # fmt: skip
    assert {path.name for path in to.iterdir()} == {
        "A_100x70.png", "B_64x130.png", "C_64x64.png", "results.csv", "contact-sheet.png", ".ovis-batch",
    }  # fmt: skip
    with (to / "results.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    for row, size in zip(rows, ((100, 70), (64, 130), (64, 64)), strict=True):
        assert size_of(to / row["file"]) == size == (int(row["width"]), int(row["height"]))
        assert hashlib.sha256((to / row["file"]).read_bytes()).hexdigest() == row["sha256"]


def test_a_dry_run_shows_what_a_manifest_would_become_and_a_template_draws_it(
    farm: CommandLine, tmp_path: Path
) -> None:
    manifest = tmp_path / "catalogue.csv"
    manifest.write_text("sku,style,product\nA,red,shoes\nB,blue,茶\n", encoding="utf-16")
    words = ("submit", "-f", str(manifest), "--template", "A {style} banner for {product}", "--steps", "1")
    words += ("--vary", "size=64x64,96x64", "--vary", "seed=1..2", "--name", "{sku}_{size}_{seed}.png")
    before = jobs_of(farm)
    shown = farm.run(*words, "--dry-run")
    assert "line 2: 64x64, 1 steps, guidance 5: A red banner for shoes -> A_64x64_1" in shown.stdout, shown.stderr
    assert "8 images" in shown.stdout
    assert "GPU-seconds; done by" in shown.stdout
    assert jobs_of(farm) == before
    assert farm.json(*words, "--dry-run")["jobs"] == 8
    batch = json.loads(farm.run(*words, "--wait", "--json").stdout)
    assert (batch["jobs"], batch["counts"]["succeeded"]) == (8, 8)
    assert "as measured by 1 live worker" in farm.run(*words, "--dry-run").stdout


def test_with_partial_the_good_rows_are_submitted_and_the_others_told_beside_the_json(farm: CommandLine) -> None:
    rows = "good,64\n" + "bad,0\n" * 25
    ended = farm.run("submit", "-f", "-", "--partial", "--json", stdin=f"prompt,width\n{rows}")
    assert (json.loads(ended.stdout)["jobs"], json.loads(ended.stdout)["rejected"]) == (1, 25)
    assert "line 3, column 'width'" in ended.stderr
    assert ended.stderr.endswith("… and 5 more\nleft out: 25 rows\n")


def test_a_broken_download_goes_on_where_it_stopped(farm: CommandLine, tmp_path: Path) -> None:
    line = json.dumps({"prompt": "a", "width": 64, "height": 64, "steps": 1})
    ended = farm.run("submit", "--file", "-", "--kind", "jsonl", "--wait", "--json", stdin=f"{line}\n{line}\n")
    batch = json.loads(ended.stdout)["id"]
    farm.run("results", batch, "--to", str(tmp_path))
    kept, broken = sorted(tmp_path.glob("0*.png"))
    before = kept.stat().st_mtime_ns
    broken.write_bytes(b"half")
    assert farm.run("results", batch, "--to", str(tmp_path)).returncode == 0
    assert kept.stat().st_mtime_ns == before
    assert size_of(broken) == (64, 64)


@pytest.mark.parametrize(
    ("manifest", "told"),
    [
        ("prompt,width\ngood,64\nbad,0\n", "line 3, column 'width'"),
        ("prompt,widht\na,64\n", "column 'widht': is no column of a request: write 'width'"),
        ("width;prompt\n64;a\n64\n", "line 3, column 'prompt': is missing"),
        ("prompt,name\na,n\nb,N\n", "line 3, column 'name': 'N' is the name of line 2 already"),
        ("", "is empty"),
        ('prompt\n"open', "is no CSV"),
    ],
)
def test_a_bad_manifest_submits_nothing_and_says_where_it_is_bad(farm: CommandLine, manifest: str, told: str) -> None:
    before = jobs_of(farm)
    ended = farm.run("submit", "--file", "-", stdin=manifest)
    assert (ended.returncode, told in ended.stderr) == (2, True), ended.stderr
    assert "nothing was submitted" in ended.stderr
    looked = farm.run("submit", "--file", "-", "--dry-run", stdin=manifest)
    assert (looked.returncode, told in looked.stdout + looked.stderr) == (2, True), looked.stdout
    assert jobs_of(farm) == before


def test_a_prompt_with_more_tokens_than_the_model_reads_fails_and_says_so(farm: CommandLine) -> None:
    job = farm.json("submit", "word " * 100, "--width", "64", "--height", "64", "--wait")
    assert (job["state"], job["error_code"], job["failures"], job["exit_code"]) == ("failed", "invalid_request", 1, 1)
    assert "246 at most" in job["error_message"]


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("submit", "a", "--width", "0"), 2, "width"),
        (("submit", "a", "--width", "320", "--height", "50"), 2, "draw 640x100 and scale it down to 320x50"),
        (("submit",), 2, "either a prompt or --file"),
        (("submit", "a", "--weight", "2"), 2, "--weight"),
        (("submit", "a", "--tenant", "a b"), 2, "tenant"),
        (("submit", "--file", "/nowhere.csv"), 2, "/nowhere.csv"),
        (("submit", "--file", "README.md"), 2, "give its kind with --kind"),
        (("submit", "--file", "-", "--template", "{x.__class__}"), 2, "--template: "),
        (("status", str(uuid4())), 4, "no job or batch"),
        (("status", "no-uuid"), 2, "UUID"),
        (("nonsense",), 2, "nonsense"),
    ],
)
def test_a_wrong_command_has_its_exit_code_and_says_what_is_wrong(
    farm: CommandLine, words: tuple[str, ...], code: int, told: str
) -> None:
    ended = farm.run(*words)
    assert (ended.returncode, told.casefold() in ended.stderr.casefold()) == (code, True), ended.stderr
    assert "Traceback" not in ended.stderr


def test_ctrl_c_on_a_waiting_command_leaves_the_jobs_in_peace(farm: CommandLine) -> None:
    waiting = farm.start("submit", "slow", "--width", "512", "--height", "512", "--steps", "30", "--wait")
    until(lambda: farm.json("status")["workers"][0]["drawing"])  # so it waits since a while
    waiting.send_signal(signal.SIGINT)
    output, _ = waiting.communicate(timeout=30)
    assert waiting.returncode == 130
    assert "ovis-batch wait" in output
    job_id = output.rpartition("wait ")[2].strip()
    assert farm.json("status", job_id)["state"] in {"running", "succeeded"}


def test_a_worker_killed_in_the_middle_of_a_catalogue_costs_no_image(farm: CommandLine, tmp_path: Path) -> None:
    rows = "".join(f"banner {n},96,64,6\n" for n in range(16))
    ended = farm.run("submit", "--file", "-", "--json", stdin=f"prompt,width,height,steps\n{rows}")
    batch = json.loads(ended.stdout)["id"]
    until(lambda: farm.json("status", batch)["counts"]["succeeded"] >= 3)
    (killed,) = [worker for worker in farm.json("status")["workers"] if worker["live"]]
    os.kill(killed["pid"], signal.SIGKILL)
    assert farm.run("wait", batch).returncode == 0
    assert farm.json("results", batch, "--to", str(tmp_path))["images"] == 16


def test_every_part_of_a_farm_that_is_killed_is_started_again_and_no_image_is_lost(
    farm: CommandLine, tmp_path: Path
) -> None:
    rows = "".join(f"banner {n},96,64,6\n" for n in range(16))
    ended = farm.run("submit", "--file", "-", "--json", stdin=f"prompt,width,height,steps\n{rows}")
    batch = json.loads(ended.stdout)["id"]
    registry = Path(farm.environment["OVIS_DATA_DIR"]) / "processes.json"
    processes = {record["name"]: record["pid"] for record in json.loads(registry.read_text())}
    assert processes.keys() == {"redis", "postgres", "s3", "api", "workers"}
    for pid in processes.values():
        os.kill(pid, signal.SIGKILL)
    until(lambda: farm.run("wait", batch).returncode == 0, timeout_s=180, pause_s=1)
    assert farm.json("results", batch, "--to", str(tmp_path))["images"] == 16


def test_a_batch_that_was_a_mistake_can_be_cancelled(farm: CommandLine) -> None:
    rows = "oops\n" * 300
    submitted = json.loads(farm.run("submit", "--file", "-", "--json", stdin=f"prompt\n{rows}").stdout)
    cancelled = farm.json("cancel", submitted["id"])
    assert cancelled["counts"]["cancelled"] == 300
    assert farm.run("wait", submitted["id"]).returncode == 1
    again = farm.run("cancel", submitted["id"])
    assert (again.returncode, "nothing was left to cancel" in again.stdout) == (0, True)


def test_what_has_ended_is_cancelled_without_an_error_be_it_a_job_or_a_batch(farm: CommandLine) -> None:
    size = ("--width", "64", "--height", "64", "--steps", "1")
    job = farm.json("submit", "a", *size, "--wait")
    batch = json.loads(farm.run("submit", "--file", "-", *size, "--wait", "--json", stdin="prompt\na\n").stdout)
    for ended in (job, batch):
        cancelled = farm.run("cancel", ended["id"])
        assert (cancelled.returncode, cancelled.stderr) == (0, "")
        assert "succeeded" in cancelled.stdout
        assert "nothing was left to cancel" in cancelled.stdout
        assert "nothing was left" not in farm.run("cancel", ended["id"], "--json").stdout


def test_the_same_command_with_the_same_key_submits_once_for_its_tenant(farm: CommandLine) -> None:
    words = ("submit", "--file", "-", "--key", "autumn", "--tenant", "acme", "--weight", "2", "--json")
    first, again = (json.loads(farm.run(*words, stdin="prompt,width,height\na,64,64\n").stdout) for _ in range(2))
    assert (first["id"], first["tenant"], first["weight"]) == (again["id"], "acme", 2)
    assert "of tenant acme" in farm.run("status", first["id"]).stdout
    other = farm.run(*words, stdin="prompt,width,height\nb,64,64\n")
    assert (other.returncode, "Idempotency-Key" in other.stderr) == (2, True)
    job = farm.json("submit", "a", "--width", "64", "--height", "64", "--steps", "1", "--tenant", "acme")
    assert "of tenant acme" in farm.run("status", job["id"]).stdout


def test_a_second_farm_in_the_same_folder_is_refused(farm: CommandLine) -> None:
    ended = farm.run("up")
    assert ended.returncode == 2
    assert "already" in ended.stderr


def test_a_port_that_is_taken_is_told(farm: CommandLine, tmp_path: Path) -> None:
    ended = CommandLine(farm.environment | {"OVIS_DATA_DIR": str(tmp_path)}).run("up")
    assert ended.returncode == 2
    assert "OVIS_API_PORT" in ended.stderr


def test_without_a_farm_the_exit_code_is_3_and_it_says_how_to_start_one(tmp_path: Path) -> None:
    ended = command_line(tmp_path).run("status")
    assert (ended.returncode, "ovis-batch up" in ended.stderr) == (3, True)
