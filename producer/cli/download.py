"""Brings a batch's images into a folder: one file an image, ``results.csv``, and a contact sheet.

Asking again goes on where a broken download stopped: a file that is there with the right sha256 is not fetched again.
"""

import csv
import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import UUID

from producer.cli.contact_sheet import make_contact_sheet
from producer.client import Client, Job
from producer.jobs.errors import SettingsError

AT_ONCE = 8
SHEET_MAX = 200
"""Images on the contact sheet; more would be a wall, not a sheet."""
COLUMNS = (
    *("file", "name", "job", "state", "seed", "width", "height", "format", "sha256", "bytes"),
    *("waiting_s", "drawing_s", "encoding_s", "uploading_s", "error", "warnings", "prompt"),
)


def download_batch(client: Client, batch_id: UUID, to: Path, on_image: Callable[[], None] = lambda: None) -> list[Job]:
    """Fetch every image of the batch that succeeded, and say in ``results.csv`` what became of each job.

    Raises:
        SettingsError: the folder cannot be written.
        ClientError: the farm does not answer, or an image arrives with another sha256.
    """
    jobs = list(client.batch_jobs(batch_id))
    files = _file_names(jobs)
    try:
        to.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for _ in pool.map(lambda job: _fetch(client, job, to / files[job.id]), _succeeded(jobs)):
                on_image()
        _write_results(jobs, files, to / "results.csv")
        if pictures := [to / files[job.id] for job in _succeeded(jobs)]:
            make_contact_sheet(pictures[:SHEET_MAX], to / "contact-sheet.png")
    except OSError as error:
        raise SettingsError(f"{to} cannot be written ({error.strerror or error}): choose another folder") from error
    return jobs


def _succeeded(jobs: Iterable[Job]) -> list[Job]:
    return [job for job in jobs if job.state == "succeeded"]


def _file_names(jobs: Iterable[Job]) -> dict[UUID, str]:
    """A file name for each job; where two would be one file, the later ones get their row's number."""
    names: dict[UUID, str] = {}
    taken: set[str] = set()
    for job in jobs:
        path = Path(Path(job.file_name).name)
        name = path.name if path.name.casefold() not in taken else f"{path.stem}-{job.position + 1}{path.suffix}"
        taken.add(name.casefold())
        names[job.id] = name
    return names


def _fetch(client: Client, job: Job, path: Path) -> None:
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == job.sha256:
        return
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(client.download(job))
    part.replace(path)


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
