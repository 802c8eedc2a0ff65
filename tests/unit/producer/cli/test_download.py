"""What a download puts into a folder, and what is said where it cannot be written."""

import errno
from collections.abc import Iterator
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from PIL import Image

from producer.cli.download import download
from producer.cli.results import downloaded
from producer.client import Batch, Client, Job
from producer.jobs.errors import SettingsError

BATCH = Batch.model_construct(id=uuid4())


def _picture() -> bytes:
    file = BytesIO()
    Image.new("RGB", (64, 64), "teal").save(file, "PNG")
    return file.getvalue()


PICTURE = _picture()


class OneImage(Client):
    """A farm that drew one image again and again."""

    def __init__(self, *file_names: str) -> None:
        super().__init__("http://farm")
        self._file_names = file_names

    def batch_jobs(self, batch: object, **_: Any) -> Iterator[Job]:
        for position, name in enumerate(self._file_names):
            yield Job.model_construct(
                id=uuid4(), file_name=name, position=position, state="succeeded", sha256=sha256(PICTURE).hexdigest()
            )

    def download(self, job: object) -> bytes:
        return PICTURE

    def write_results(self, batch: object, to: Path | str, format: str = "csv") -> None:
        Path(to).write_text(format)


def test_no_name_leads_out_of_the_folder_or_takes_the_place_of_another_file(tmp_path: Path) -> None:
    names = ("../../x.png", "/etc/x.png", "X.png", "Results.csv", "contact-sheet.png", "a\x00b.png", "x" * 300 + ".png")
    to = tmp_path / "here"
    with OneImage(*names) as client:
        done = download(client, BATCH, to)
    assert (done.jobs, done.images, done.fetched) == (7, 7, 7)
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    assert {path.name for path in to.iterdir()} == {
        *("x.png", "x-2.png", "X-3.png", "Results-4.csv", "contact-sheet-6.png", "a_b.png", "x" * 200 + ".png"),
        *("results.csv", "contact-sheet.png"),
    }
    assert (to / "results.csv").read_text() == "csv"


def test_many_images_are_on_several_sheets_and_those_beyond_on_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("producer.cli.download.IMAGES_MAX", 3)
    with OneImage(*(f"{n}.png" for n in range(7))) as client:
        done = download(client, BATCH, tmp_path)
        assert [path.name for path in done.sheets] == [
            "contact-sheet.png",
            "contact-sheet-2.png",
            "contact-sheet-3.png",
        ]
        assert "with results.csv and 3 contact sheets" in downloaded(done, tmp_path)
    with OneImage(*(f"{n}.png" for n in range(40))) as client:
        done = download(client, BATCH, tmp_path)
    assert (len(done.sheets), done.images, done.fetched) == (5, 40, 33)
    assert "(7 were there already)" in downloaded(done, tmp_path)


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
    with OneImage("x.png") as client, pytest.raises(SettingsError, match=told):
        download(client, BATCH, tmp_path)
    assert list(tmp_path.iterdir()) == []
