"""Brings a batch's images into a folder: one file an image, the farm's table of results, and contact sheets.

Asking again goes on where a broken download stopped: a file that is there with the right sha256 is not fetched again.
However large the batch, a few dozen jobs and images are held at once.
"""

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from producer.cli.contact_sheet import IMAGES_MAX, make_contact_sheet
from producer.cli.folder import in_the_way, writing
from producer.client import Batch, Client, Job, ResultsFormat
from producer.jobs.file_names import SHEETS, FileNames

AT_ONCE = 8
HELD = 8 * AT_ONCE
"""Jobs that are asked for before the first of them is fetched."""


@dataclass
class Downloaded:
    """What a download brought."""

    jobs: int = 0
    images: int = 0  # that are there now
    fetched: int = 0  # of these, by this download
    sheets: list[Path] = field(default_factory=list)


def download(client: Client, batch: Batch, to: Path, table: ResultsFormat = "csv") -> Downloaded:
    """Fetch every image that is there into the folder ``to``, and beside them what became of each row.

    Raises:
        SettingsError: the folder cannot be written, or its disk is full.
        ClientError: the farm does not answer, or an image arrives with another sha256.
    """
    done = Downloaded()
    shown: list[Path] = []
    with writing(to), ThreadPoolExecutor(AT_ONCE) as pool:
        places = _places(client, batch, to)
        while some := list(islice(places, HELD)):
            good = [(job, path) for job, path in some if job.state == "succeeded"]
            done.fetched += sum(pool.map(lambda place: _fetch(client, *place), good))
            done.jobs += len(some)
            done.images += len(good)
            shown += [path for _, path in good[: IMAGES_MAX * len(SHEETS) - len(shown)]]
        client.write_results(batch, to / f"results.{table}", table)
        done.sheets = _make_sheets(shown, to)
    return done


def others_files(client: Client, batch: Batch, to: Path, table: ResultsFormat) -> Iterator[Path]:
    """Files that ``download`` would replace, in a folder that is not the batch's yet. An image that is the batch's own
    is none of them."""
    yield from (to / name for name in (*SHEETS, f"results.{table}") if (to / name).exists())
    for job, path in _places(client, batch, to):
        if job.state == "succeeded" and _is_another(path, job):
            yield path


def download_one(client: Client, job: Job, to: Path) -> Path:
    """Fetch one job's image into the folder ``to``.

    Raises:
        Refused: it has none.
        SettingsError: another file is called so; and as ``download``.
    """
    path = to / FileNames().name(job.file_name, job.position)
    with writing(to):
        if _is_another(path, job):
            raise in_the_way(path)
        _fetch(client, job, path)
    return path


def download_zip(client: Client, batch: Batch, to: Path) -> Path:
    """Fetch the images that are there and the table as one ZIP, in one go. Raises: as ``download``."""
    path = to / f"{batch.id}.zip"
    with writing(to):
        client.write_images(batch, path)
    return path


def _places(client: Client, batch: Batch, to: Path) -> Iterator[tuple[Job, Path]]:
    """All jobs, each with the file of its image."""
    names = FileNames()
    for job in client.batch_jobs(batch):
        yield job, to / names.name(job.file_name, job.position)


def _is_another(path: Path, job: Job) -> bool:
    """Whether a file is there that is not the job's image."""
    return path.exists() and not (path.is_file() and _sha256(path) == job.sha256)


def _fetch(client: Client, job: Job, path: Path) -> bool:
    """Whether the image had to be fetched, or was there already."""
    if path.is_file() and _sha256(path) == job.sha256:
        return False
    part = path.with_name(f"{path.name}.part")
    body = client.download(job)
    try:
        part.write_bytes(body)
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)  # half a file helps nobody, least of all on a full disk
        raise
    return True


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _make_sheets(pictures: Iterable[Path], to: Path) -> list[Path]:
    remaining = iter(pictures)
    sheets = []
    for name in SHEETS:
        if some := list(islice(remaining, IMAGES_MAX)):
            make_contact_sheet(some, to / name)
            sheets.append(to / name)
    return sheets
