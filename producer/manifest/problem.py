"""What can be wrong with a manifest, told by line and column."""

from collections.abc import Sequence
from dataclasses import dataclass

from producer.jobs.errors import FarmError


@dataclass(frozen=True)
class Problem:
    """What is wrong with one place. ``line`` counts from 1, the header included; 0 is the file, or an option of it."""

    line: int
    column: str | None
    message: str

    def __str__(self) -> str:
        if not self.line:
            return f"{self.column}: {self.message}" if self.column else self.message
        column = f", column {self.column!r}" if self.column else ""
        return f"line {self.line}{column}: {self.message}"


class ManifestError(FarmError):
    """The manifest cannot be submitted as it is. ``problems`` are the first ones; ``count`` is how many there are."""

    def __init__(self, problems: Sequence[Problem], count: int | None = None) -> None:
        self.problems = list(problems)
        self.count = count or len(self.problems)
        more = [f"… and {self.count - len(self.problems)} more"] if self.count > len(self.problems) else []
        super().__init__("\n".join([*map(str, self.problems), *more]))

    @classmethod
    def of_file(cls, message: str, *, line: int = 0, column: str | None = None) -> "ManifestError":
        """Of something for which no more of the file can be read."""
        return cls([Problem(line, column, message)])
