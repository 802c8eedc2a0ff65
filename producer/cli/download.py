"""Brings a batch's images into a folder: one file an image, ``results.csv``, and a contact sheet.

Asking again goes on where a broken download stopped: a file that is there with the right sha256 is not fetched again.
"""

import csv
import errno
import hashlib
import itertools
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import UUID

from producer.cli.contact_sheet import make_contact_sheet
from producer.client import Client, Job
from producer.jobs.errors import SettingsError

AT_ONCE = 8
RESULTS = "results.csv"
SHEET = "contact-sheet.png"
DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
SHEET_MAX = 200
"""Images on the contact sheet; more would be a wall, not a sheet."""
COLUMNS = (
    *("file", "name", "job", "state", "seed", "width", "height", "format", "sha256", "bytes"),
    *("waiting_s", "drawing_s", "encoding_s", "uploading_s", "error", "warnings", "prompt"),
)


def download(client: Client, jobs: Sequence[Job], to: Path) -> None:
    """Fetch the image of every job that succeeded, and say in ``results.csv`` what became of each.

    Raises:
        SettingsError: the folder cannot be written, or its disk is full.
        ClientError: the farm does not answer, or an image arrives with another sha256.
    """
    files = _file_names(jobs)
    try:
        to.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(lambda job: _fetch(client, job, to / files[job.id]), _succeeded(jobs)))
        _write_results(jobs, files, to / RESULTS)
        if pictures := [to / files[job.id] for job in _succeeded(jobs)]:
            make_contact_sheet(pictures[:SHEET_MAX], to / SHEET)
    except OSError as error:
        raise _unwritable(to, error) from error


def _unwritable(to: Path, error: OSError) -> SettingsError:
    if error.errno in DISK_FULL:
        return SettingsError(
            f"{to} is on a full disk ({error.strerror}): free some space and ask again, which fetches what is missing"
        )
    return SettingsError(f"{to} cannot be written ({error.strerror or error}): choose another folder with --to")


def _succeeded(jobs: Iterable[Job]) -> list[Job]:
    return [job for job in jobs if job.state == "succeeded"]


def _file_names(jobs: Iterable[Job]) -> dict[UUID, str]:
    """A file name for each job; where it is taken, its row's number follows, or the next number that is free."""
    names: dict[UUID, str] = {}
    taken = {RESULTS, SHEET}
    for job in jobs:
        path = Path(Path(job.file_name).name)
        numbered = (f"{path.stem}-{number}{path.suffix}" for number in itertools.count(job.position + 1))
        name = next(name for name in itertools.chain([path.name], numbered) if name.casefold() not in taken)
        taken.add(name.casefold())
        names[job.id] = name
    return names


def _fetch(client: Client, job: Job, path: Path) -> None:
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == job.sha256:
        return
    part = path.with_name(f"{path.name}.part")
    body = client.download(job)
    try:
        part.write_bytes(body)
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)  # half a file helps nobody, least of all on a full disk
        raise


def _write_results(jobs: Iterable[Job], files: dict[UUID, str], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(_result(job, files[job.id]) for job in jobs)


def _result(job: Job, file_name: str) -> dict[str, object]:
    request = job.request
    return {
        "file": file_name if job.state == "succeeded" else "",
        "name": job.name or "",
        "job": job.id,
        "state": job.state,
        "seed": request["seed"],
        "width": job.width_px or request["width"],
        "height": job.height_px or request["height"],
        "format": job.format or request["format"],
        "sha256": job.sha256 or "",
        "bytes": job.size_bytes or "",
        "waiting_s": _seconds(job.waiting_s),
        "drawing_s": _seconds(job.drawing_s),
        "encoding_s": _seconds(job.encoding_s),
        "uploading_s": _seconds(job.uploading_s),
        "error": job.error_message or "",
        "warnings": "; ".join(job.warnings),
        "prompt": request["prompt"],
    }


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
