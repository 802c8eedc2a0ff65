"""Whose folder it is: images of two batches are called alike, and none may take the place of another's.

A folder is its batch's from the first file on. A small file names the batch, so that a download that was killed before
its table was written goes on all the same.
"""

import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

from producer.jobs.errors import SettingsError

MARKER = ".ovis-batch"
"""Holds whose folder it is, in a line."""
DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


def proposed_folder(id: UUID) -> str:
    """A folder that is named for nobody else."""
    return f"results-{id.hex[:8]}"


def claim_folder(to: Path, owner: str, others: Iterable[Path] = ()) -> None:
    """Make the folder ``owner``'s, or leave it so.

    Args:
        others: what stands in the owner's way in a folder that is nobody's yet and not empty; looked at only there.

    Raises:
        SettingsError: it is somebody else's, or cannot be written. Nothing was written.
    """
    with writing(to):
        before = _owner(to)
        if before not in ("", owner):
            raise SettingsError(f"{to} holds the results of {before}: choose another folder with --to")
        if not before and any(to.iterdir()):
            for path in others:
                raise in_the_way(path)
        if not before:
            (to / MARKER).write_text(f"{owner}\n", encoding="utf-8")


def in_the_way(path: Path) -> SettingsError:
    """The refusal to replace a file."""
    return SettingsError(f"{path} is there already, and is another: choose another folder with --to")


@contextmanager
def writing(to: Path) -> Iterator[None]:
    """A folder to write to. Raises: SettingsError, with what to do."""
    try:
        to.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise _unwritable(to, error) from error


def _owner(to: Path) -> str:
    """'' if it is nobody's."""
    try:
        return (to / MARKER).read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return ""


def _unwritable(to: Path, error: OSError) -> SettingsError:
    if error.errno in DISK_FULL:
        return SettingsError(
            f"{to} is on a full disk ({error.strerror}): free some space and ask again, which fetches what is missing"
        )
    return SettingsError(f"{to} cannot be written ({error.strerror or error}): choose another folder with --to")
