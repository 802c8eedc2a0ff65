"""A folder of this host for what was drawn and cannot be stored now: images, and checkpoints of unfinished ones.

A drawn image waits in memory for its bucket; a copy lies here, so that a worker process may end meanwhile. Whichever
worker of this host claims the job next stores the copy instead of drawing again. Nothing relies on this folder: one
that is full, slow or gone costs what a kill would cost, and never an image that is still in memory.

Files are named by the job, which never changes what it asks for; a checkpoint also by the failures that the job had
then, since one that was drawn before a failure may be its cause. A file is written aside, synchronised to the disk and
renamed, so a name stands for a whole file while the host lives. What a power cut or a broken disk makes of it, its head
tells: the digest of all that follows. A file that does not match is removed when it is read, and never given out.

When there is no room, the oldest file goes first. Any number of processes may share the folder.
"""

import contextlib
import hashlib
import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from uuid import UUID, uuid4

log = logging.getLogger(__name__)

KEPT_S = 24 * 3600
"""What is older is removed when a worker starts: its job was drawn elsewhere long ago."""
IMAGE = ".image"
LATENTS = ".latents"
PART = ".part"
DIGEST_BYTES = hashlib.sha256().digest_size
_OF_LATENTS = re.compile(r"[0-9a-f-]{36}\.(?P<failures>[0-9]+)\.(?P<step>[0-9]+)\.latents")


class Latents(NamedTuple):
    """An unfinished image: the engine's checkpoint after ``step`` steps."""

    step: int
    body: bytes


class Held:
    """The folder, which may hold ``most_bytes``. No method raises for what the disk does.

    ``failures`` are those of the job when its checkpoint was taken: ``Claim.failures``.
    """

    def __init__(self, folder: Path, *, most_bytes: int) -> None:
        self._folder = folder
        self._most_bytes = most_bytes
        self._writing = threading.Lock()
        self._said: set[str] = set()

    def open(self) -> None:
        """Make the folder, for this user alone, and remove what nobody came for."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._remove_forgotten()
        except OSError as error:
            self._failed("no folder for drawn images", error)

    def keep_image(self, job_id: UUID, body: bytes) -> bool:
        """Keep a drawn image's file; whether there was room."""
        kept = self._keep(f"{job_id}{IMAGE}", body)
        if kept:
            self.drop_latents(job_id)
        return kept

    def keep_latents(self, job_id: UUID, failures: int, latents: Latents) -> bool:
        """Keep an engine's checkpoint, in the place of an earlier one; whether there was room."""
        name = f"{job_id}.{failures}.{latents.step}{LATENTS}"
        kept = self._keep(name, latents.body)
        if kept:
            self.drop_latents(job_id, but=name)
        return kept

    def image(self, job_id: UUID) -> bytes | None:
        """The image's file that is kept for this job."""
        return self._read(self._folder / f"{job_id}{IMAGE}")

    def latents(self, job_id: UUID, failures: int) -> Latents | None:
        """The checkpoint of this job that is kept since its last failure, the furthest if there are two."""
        steps = {_step(path): path for path in self._latents_paths(job_id) if _failures(path) == failures}
        furthest = max(steps, default=0)
        body = self._read(steps[furthest]) if steps else None
        return Latents(furthest, body) if body is not None else None

    def drop(self, job_id: UUID) -> None:
        """Remove all that is kept of this job."""
        self._unlink(self._folder / f"{job_id}{IMAGE}")
        self.drop_latents(job_id)

    def drop_latents(self, job_id: UUID, *, but: str | None = None) -> None:
        """Remove this job's checkpoints, except the file named ``but``."""
        for path in self._latents_paths(job_id):
            if path.name != but:
                self._unlink(path)

    def _keep(self, name: str, body: bytes) -> bool:
        try:
            with self._writing:
                if not self._made_room(DIGEST_BYTES + len(body)):
                    self._say("a drawn image stays in memory alone: OVIS_HELD_MB allows no more")
                    return False
                self._write(self._folder / name, body)
        except OSError as error:
            self._failed("a drawn image stays in memory alone", error)
            return False
        return True

    def _write(self, path: Path, body: bytes) -> None:
        """Aside, then renamed. The folder itself is not synchronised: a power cut may take the name too."""
        aside = path.with_name(f"{uuid4()}{PART}")
        try:
            with open(aside, "xb", opener=_private) as file:
                file.write(hashlib.sha256(body).digest())
                file.write(body)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        except OSError:
            self._unlink(aside)
            raise

    def _made_room(self, more_bytes: int) -> bool:
        """Whether ``more_bytes`` fit now; the oldest files go for them."""
        if more_bytes > self._most_bytes:
            return False
        oldest_first = sorted(self._files(), key=lambda found: found[1].st_mtime_ns)
        too_many_bytes = sum(file.st_size for _, file in oldest_first) + more_bytes - self._most_bytes
        for path, file in oldest_first:
            if too_many_bytes <= 0:
                break
            self._say("what was held longest goes: OVIS_HELD_MB allows no more")
            path.unlink(missing_ok=True)
            too_many_bytes -= file.st_size
        return True

    def _remove_forgotten(self) -> None:
        oldest = time.time() - KEPT_S
        for path, file in self._files():
            if file.st_mtime < oldest:
                path.unlink(missing_ok=True)

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self._folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another worker has removed it
                yield path, path.stat()

    def _latents_paths(self, job_id: UUID) -> list[Path]:
        try:
            return [path for path in self._folder.glob(f"{job_id}.*{LATENTS}") if _OF_LATENTS.fullmatch(path.name)]
        except OSError as error:
            self._failed("a checkpoint cannot be looked for", error)
            return []

    def _read(self, path: Path) -> bytes | None:
        """What was kept under this name, to the bit, or None."""
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._failed("a drawn image cannot be read", error)
            return None
        digest, body = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
        if digest != hashlib.sha256(body).digest():
            log.warning("%s was changed since it was written, and is removed", path)
            self._unlink(path)
            return None
        return body

    def _unlink(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self._failed("a drawn image cannot be removed", error)

    def _failed(self, what: str, error: OSError) -> None:
        self._say(f"{what}: {error.strerror or error} ({self._folder})")

    def _say(self, line: str) -> None:
        """Once a process."""
        if line not in self._said:
            self._said.add(line)
            log.warning("%s", line)


def _step(path: Path) -> int:
    return int(path.name.split(".")[2])


def _failures(path: Path) -> int:
    return int(path.name.split(".")[1])


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
