"""What a body can do wrong before it is a submission. ``problems`` turns each class into its answer.

ApiError
├── Malformed        not JSON, or no object
├── TooLarge         more bytes, or more jobs, than this way in takes
├── WrongMediaType   the Content-Type is none that is understood here
└── Invalid          well-formed, but fields are wrong: .faults names each
"""

from collections.abc import Sequence

from pydantic import BaseModel, Field


class Fault(BaseModel):
    """One wrong field."""

    line: int | None = Field(default=None, description="Line of the NDJSON body, from 1.")
    field: str = Field(description="Path of the field, for example 'width' or 'jobs.3.width'; '' for the whole.")
    message: str


class ApiError(Exception):
    """Root of the errors that belong to HTTP alone."""


class Malformed(ApiError):
    """The body cannot be read as what it says it is."""


class TooLarge(ApiError):
    """The body is beyond a limit; the message says what takes more."""


class WrongMediaType(ApiError):
    """The body's Content-Type is none that this path reads."""

    def __init__(self, given: str, expected: Sequence[str]) -> None:
        super().__init__(f"Content-Type {given or 'is missing'}: send {' or '.join(expected)}")


class Invalid(ApiError):
    """Fields are wrong; nothing was submitted."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        count = "1 field is" if len(faults) == 1 else f"{len(faults)} fields are"
        super().__init__(f"{count} wrong: nothing was submitted")
        self.faults = list(faults)
