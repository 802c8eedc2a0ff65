"""A batch's images as one ZIP, written while it is sent.

Nothing but a few images is ever held: some are fetched ahead by threads of this stream's own. What stays is ZIP's own
directory, about a kilobyte an image until the end. The images are compressed already, so they are only stored.
"""

import logging
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from io import RawIOBase
from typing import Any
from zipfile import ZIP_STORED, ZipFile, ZipInfo

from producer.jobs.contract import Job, State
from producer.jobs.errors import NotFound, Unavailable
from producer.jobs.storage import Storage

log = logging.getLogger(__name__)

THREADS = 4
AHEAD = 6
"""Images that are there, or on their way, before they are sent."""
PAUSES_S = (0.5, 1.0, 2.0, 4.0)
"""A bucket that is away for a moment is asked again: a ZIP that breaks off begins anew."""
MISSING = "missing.txt"


def zip_pieces(
    jobs: Iterable[tuple[Job, str]], storage: Storage, table: str, table_pieces: Iterable[bytes]
) -> Generator[bytes, None, None]:
    """The images of those jobs that succeeded under their names, then the table under its own.

    ``table_pieces`` are read when the images are through. What the bucket has lost is named in ``missing.txt``.

    Raises: Unavailable, NotFound: the batch was deleted meanwhile. What was sent until then is no ZIP.
    """
    sent = _Sent()
    missing: list[str] = []
    with ZipFile(sent, "w", ZIP_STORED) as archive:
        for job, name, body in _fetched(jobs, storage):
            if body is None:
                log.error("job %s: its image %s is not in the bucket", job.id, job.object_key)
                missing.append(f"{name}\n")
                continue
            archive.writestr(_entry(name, job), body)
            yield sent.taken()
        if missing:
            archive.writestr(MISSING, "".join(missing))
        with archive.open(ZipInfo(table, time.gmtime()[:6]), "w", force_zip64=True) as member:
            for piece in table_pieces:
                member.write(piece)
                yield sent.taken()
    yield sent.taken()


def _entry(name: str, job: Job) -> ZipInfo:
    assert job.finished_at is not None
    return ZipInfo(name, job.finished_at.timetuple()[:6])


def _fetched(jobs: Iterable[tuple[Job, str]], storage: Storage) -> Iterator[tuple[Job, str, bytes | None]]:
    """The succeeded jobs with their images, in order; None for one that is not there."""
    coming: deque[tuple[Job, str, Future[bytes | None]]] = deque()
    pool = ThreadPoolExecutor(THREADS, "zip")
    try:
        for job, name in jobs:
            if job.state is not State.SUCCEEDED or job.object_key is None:
                continue
            coming.append((job, name, pool.submit(partial(_image, storage, job.object_key))))
            if len(coming) == AHEAD:
                yield _next(coming)
        while coming:
            yield _next(coming)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _next(coming: "deque[tuple[Job, str, Future[bytes | None]]]") -> tuple[Job, str, bytes | None]:
    job, name, image = coming.popleft()
    return job, name, image.result()


def _image(storage: Storage, key: str) -> bytes | None:
    """Raises: Unavailable, after some attempts."""
    for pause_s in (*PAUSES_S, None):
        try:
            return storage.get(key)
        except NotFound:
            return None
        except Unavailable:
            if pause_s is None:
                raise
            time.sleep(pause_s)
    raise AssertionError("the last attempt returns or raises")


class _Sent(RawIOBase):
    """What the ZIP writes, until it is taken to be sent. It cannot go back, so ZIP writes sizes behind each image."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, piece: Any) -> int:
        self._pieces.append(bytes(piece))
        return len(self._pieces[-1])

    def taken(self) -> bytes:
        taken = b"".join(self._pieces)
        self._pieces.clear()
        return taken
