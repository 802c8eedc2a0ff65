"""What the images of one batch are called, side by side in one folder.

Everyone who names them walks through all jobs of the batch in their order, drawn or not. So the table of results, the
ZIP and the folder of the command line agree, and a retry changes no name that was given before.
"""

import itertools
import re
from hashlib import blake2b
from pathlib import PurePosixPath
from unicodedata import normalize

SHEETS_MAX = 5
SHEETS = ("contact-sheet.png", *(f"contact-sheet-{number}.png" for number in range(2, SHEETS_MAX + 1)))
TABLES = ("results.csv", "results.jsonl", "results.xlsx")
"""What stands beside the images: no image takes its place."""
STEM_MAX_BYTES = 200


def same_file_key(name: str) -> int:
    """Equal for names that are one file on some disk: where upper and lower case are one, or an accent and its letter
    are one character (macOS). Eight bytes of a hash: that two other names are equal by chance is one in a billion
    among two hundred thousand."""
    one_form = normalize("NFC", normalize("NFC", name).casefold())
    return int.from_bytes(blake2b(one_form.encode(errors="replace"), digest_size=8).digest())


class FileNames:
    """Gives each job a name that no other has, see ``same_file_key``.

    A name that is taken gets the number of its row, or the next that is free. Keeps the key of each name, so that a
    hundred thousand take a few megabytes; two that had the same by chance would cost one of them a number.
    """

    def __init__(self) -> None:
        self._taken = {same_file_key(name) for name in (*SHEETS, *TABLES)}
        self._next: dict[int, int] = {}  # of names that were taken: no number below it is free

    def name(self, file_name: str, position: int) -> str:
        """The name of the job's file, a plain one whatever ``file_name`` holds. To be asked in the jobs' order."""
        stem, suffix = _plain(file_name)
        name = stem + suffix
        if same_file_key(name) in self._taken:
            name = self._numbered(stem, suffix, position + 1)
        self._taken.add(same_file_key(name))
        return name

    def _numbered(self, stem: str, suffix: str, least: int) -> str:
        alike = same_file_key(stem + suffix)
        numbers = itertools.count(max(least, self._next.get(alike, 0)))
        number = next(number for number in numbers if same_file_key(f"{stem}-{number}{suffix}") not in self._taken)
        self._next[alike] = number + 1
        return f"{stem}-{number}{suffix}"


def _plain(file_name: str) -> tuple[str, str]:
    """Stem and suffix, without path, control characters and excessive length. The farm's own names have none of it;
    this is for whoever asks a farm that is not what it seems."""
    path = PurePosixPath(re.sub(r"[\x00-\x1f\x7f]", "_", file_name.replace("\\", "/")))
    stem, suffix = (path.stem, path.suffix) if path.name not in {"", ".."} else ("image", "")
    return stem.encode(errors="replace")[:STEM_MAX_BYTES].decode(errors="ignore"), suffix[:10]
