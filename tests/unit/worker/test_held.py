"""The folder for what cannot be stored now, on a real disk."""

import errno
import os
import threading
import time
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from worker.held import KEPT_S, Held, Latents

BODY = b"x" * 1000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data" / "held"


@pytest.fixture
def held(folder: Path) -> Held:
    held = Held(folder, most_bytes=10_000)
    held.open()
    return held


@pytest.fixture
def job_id() -> UUID:
    return uuid4()


def test_an_image_lies_there_for_every_process_of_the_host_until_it_is_dropped(
    held: Held, folder: Path, job_id: UUID
) -> None:
    assert held.image(job_id) is None
    assert held.keep_image(job_id, BODY)
    another = Held(folder, most_bytes=10_000)
    another.open()
    assert another.image(job_id) == BODY
    assert another.image(uuid4()) is None
    another.drop(job_id)
    assert held.image(job_id) is None
    assert not list(folder.iterdir())


def test_the_newest_checkpoint_takes_the_place_of_the_one_before_and_an_image_that_of_both(
    held: Held, folder: Path, job_id: UUID
) -> None:
    for step in (9, 20, 100):
        assert held.keep_latents(job_id, 0, Latents(step, b"%d" % step))
    assert held.latents(job_id, 0) == Latents(100, b"100")
    assert len(list(folder.iterdir())) == 1
    assert held.keep_image(job_id, BODY)
    assert held.latents(job_id, 0) is None
    assert len(list(folder.iterdir())) == 1


def test_only_this_user_may_look(held: Held, folder: Path, job_id: UUID) -> None:
    held.keep_image(job_id, BODY)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [path.stat().st_mode & 0o777 for path in folder.iterdir()] == [0o600]


def test_it_holds_no_more_than_it_may_the_oldest_goes_first_and_it_is_said_once(
    held: Held, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    jobs = [uuid4() for _ in range(15)]
    for age_s, job_id in zip(range(100, 0, -1), jobs, strict=False):
        assert held.keep_image(job_id, BODY)
        os.utime(folder / f"{job_id}.image", (time.time() - age_s,) * 2)
    assert [held.image(job_id) is not None for job_id in jobs] == [False] * 6 + [True] * 9
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 10_000
    assert not held.keep_image(uuid4(), BODY * 10)
    assert held.image(jobs[-1]) == BODY
    assert len([line for line in caplog.messages if "OVIS_HELD_MB" in line]) == 2


def test_what_nobody_came_for_within_a_day_goes_at_the_start(held: Held, folder: Path, job_id: UUID) -> None:
    held.keep_image(uuid4(), BODY)
    (folder / "cut short.part").write_bytes(b"a process died here")
    for path in folder.iterdir():
        os.utime(path, (time.time() - KEPT_S - 1,) * 2)
    held.keep_image(job_id, BODY)
    held.open()
    assert [path.name for path in folder.iterdir()] == [f"{job_id}.image"]


def test_a_checkpoint_of_before_the_jobs_last_failure_is_none(held: Held, folder: Path, job_id: UUID) -> None:
    held.keep_latents(job_id, 0, Latents(30, b"of before"))
    assert held.latents(job_id, 1) is None
    held.keep_latents(job_id, 1, Latents(4, b"of after"))
    assert held.latents(job_id, 1) == Latents(4, b"of after")
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("broken", ["cut", "zero tail", "one bit", "empty", "older version"])
def test_a_file_that_is_not_what_was_written_is_never_given_out_and_goes(
    broken: str, held: Held, folder: Path, job_id: UUID, caplog: pytest.LogCaptureFixture
) -> None:
    held.keep_image(job_id, BODY)
    (path,) = folder.iterdir()
    content = path.read_bytes()
    changed = {
        "cut": content[:-1],
        "zero tail": content[:500] + bytes(len(content) - 500),
        "one bit": content[:-1] + b"y",
        "empty": b"",
        "older version": BODY,
    }
    path.write_bytes(changed[broken])
    assert held.image(job_id) is None
    assert not list(folder.iterdir())
    assert len(caplog.messages) == 1


def test_a_full_disk_keeps_nothing_loses_nothing_else_and_is_said_once(
    held: Held, folder: Path, job_id: UUID, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    held.keep_image(job_id, BODY)
    full = Path("/dev/full")  # a real ENOSPC, by the kernel
    assert full.is_char_device()
    monkeypatch.setattr("worker.held._private", lambda path, flags: os.open(full, os.O_WRONLY))
    assert not held.keep_image(uuid4(), BODY)
    assert not held.keep_latents(job_id, 0, Latents(3, BODY))
    assert not held.keep_image(job_id, b"newer")
    assert held.image(job_id) == BODY
    assert [os.strerror(errno.ENOSPC) in line for line in caplog.messages] == [True]


def test_a_folder_that_cannot_be_made_or_is_gone_is_said_and_nothing_raises(
    tmp_path: Path, job_id: UUID, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    held = Held(tmp_path / "file" / "held", most_bytes=10_000)
    held.open()
    assert not held.keep_image(job_id, BODY)
    assert held.image(job_id) is None
    assert held.latents(job_id, 0) is None
    held.drop(job_id)
    assert caplog.messages


def test_whoever_reads_while_it_is_written_over_gets_a_whole_file(held: Held, job_id: UUID) -> None:
    bodies = {bytes([n]) * 4000 for n in range(2)}
    held.keep_image(job_id, next(iter(bodies)))
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for body in bodies:
                held.keep_image(job_id, body)

    writer = threading.Thread(target=write)
    writer.start()
    seen = {held.image(job_id) for _ in range(2000)}
    stop.set()
    writer.join()
    assert seen <= bodies
