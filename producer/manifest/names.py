"""The names of outputs in one manifest: no two may be one file, on any disk.

They are compared by ``same_file_key``, as they are where the images are saved; it is kept and not the name: some 130
bytes for a name of any length. A job without a name is called by its place in the batch, and such names clash as well.
"""

from collections.abc import Sequence

from producer.jobs.file_names import same_file_key
from producer.manifest.problem import Problem


class Names:
    """Every name that was taken, with its line."""

    def __init__(self) -> None:
        self._lines: dict[int, int] = {}
        self._unnamed = bytearray()  # of each job in its place: whether it has no name of its own

    def take(self, line: int, names: Sequence[str | None]) -> Problem | None:
        """Take all the names of a row, or none of them and say which is taken already."""
        within: dict[int, str] = {}
        for place, name in enumerate(names, start=len(self._unnamed)):
            shown = name or _place_name(place)
            key = same_file_key(shown)
            if key in within:
                told = f"{shown!r} is the name of two images of this row: let the names hold what is varied"
                return Problem(line, "name", told)
            earlier = self._lines.get(key)
            if earlier is not None or (name and self._is_place_of_unnamed(name)):
                of = f"of line {earlier}" if earlier else "of an image without a name"
                told = f"{shown!r} is the name {of} already: names must differ, by another column or {{seed}}"
                return Problem(line, "name", told)
            if name:
                within[key] = shown
        self._lines.update(dict.fromkeys(within, line))
        self._unnamed.extend(name is None for name in names)
        return None

    def _is_place_of_unnamed(self, name: str) -> bool:
        place = int(name) - 1 if name.isascii() and name.isdecimal() and len(name) < 12 else -1
        return 0 <= place < len(self._unnamed) and bool(self._unnamed[place]) and name == _place_name(place)


def _place_name(place: int) -> str:
    """As ``contract.Job.file_name`` calls it."""
    return f"{place + 1:06d}"
