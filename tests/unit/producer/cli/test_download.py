"""What a downloaded batch's files are called, and what is said where they cannot be written."""

import errno
from hashlib import sha256
from pathlib import Path
from uuid import uuid4

import pytest

from producer.cli.download import _file_names, download
from producer.client import Client, Job
from producer.jobs.errors import SettingsError


def jobs(*file_names: str) -> list[Job]:
    return [
        Job.model_construct(
            id=uuid4(), file_name=name, position=position, state="succeeded", sha256=sha256().hexdigest()
        )
        for position, name in enumerate(file_names)
    ]


def names(*file_names: str) -> list[str]:
    return list(_file_names(jobs(*file_names)).values())


class OneImage(Client):
    """A farm whose images are empty."""

    def download(self, job: object) -> bytes:
        return b""


def test_every_image_has_a_file_of_its_own_whatever_the_jobs_are_called() -> None:
    assert names("x.png", "x-3.png", "x.png", "X.png") == ["x.png", "x-3.png", "x-4.png", "X-5.png"]


def test_no_image_takes_the_place_of_the_table_or_of_the_contact_sheet() -> None:
    assert names("contact-sheet.png", "Results.csv") == ["contact-sheet-1.png", "Results-2.csv"]


@pytest.mark.parametrize(
    ("number", "told"), [(errno.ENOSPC, "free some space"), (errno.EACCES, "choose another folder")]
)
def test_a_disk_that_takes_no_file_is_told_with_what_to_do_and_half_a_file_is_removed(
    number: int, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, body: bytes) -> int:
        path.touch()
        raise OSError(number, "refused")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with OneImage("http://farm") as client, pytest.raises(SettingsError, match=told):
        download(client, jobs("x.png"), tmp_path)
    assert list(tmp_path.iterdir()) == []
