"""What a body can do wrong before it is a submission. ``problems`` turns each class into its answer.

ApiError
├── Malformed        not JSON, or no object
├── TooLarge         more bytes, or more jobs, than this way in takes
├── Unauthorized     a key is needed and none is given, or it is none: the answer says how to send one
├── Forbidden        the key is not for this
├── Busy             no place was free for so long a piece of work: ask again; nothing was done
├── AnswerNotKept    what was asked with the idempotency key was done, and its answer is not kept
├── WrongMediaType   the Content-Type is none that is understood here
└── Invalid          well-formed, but fields are wrong: .faults names each
"""

from collections.abc import Sequence

from pydantic import BaseModel, Field


class Fault(BaseModel):
    """One wrong field."""

    line: int | None = Field(default=None, description="Line of a manifest, from 1.")
    field: str = Field(description="Path of the field, for example 'width' or 'jobs.3.width'; '' for the whole.")
    message: str


class ApiError(Exception):
    """Root of the errors that belong to HTTP alone."""


class Malformed(ApiError):
    """The body cannot be read as what it says it is."""


class TooLarge(ApiError):
    """The body is beyond a limit; the message says what takes more."""


class Unauthorized(ApiError):
    """Nobody knows who asks."""


class Forbidden(ApiError):
    """It is known who asks, and this is not theirs to do."""


class Busy(ApiError):
    """As much that takes long is under way as this process does at once, and it was waited for in vain."""

    def __init__(self) -> None:
        super().__init__(
            "as much is being done at this moment as this server does at once: ask again; nothing was done"
        )


class AnswerNotKept(ApiError):
    """What was asked with the idempotency key was done, once; its answer was streamed, too large, or secret."""

    def __init__(self) -> None:
        super().__init__(
            "what was asked with this idempotency key was done and its answer is not kept: look at what it made, "
            "or take a new key to do it again"
        )


class WrongMediaType(ApiError):
    """The body's Content-Type is none that this path reads."""

    def __init__(self, given: str, expected: Sequence[str]) -> None:
        super().__init__(f"Content-Type {given or 'is missing'}: send {' or '.join(expected)}")


class Invalid(ApiError):
    """Fields are wrong; nothing was submitted."""

    def __init__(self, faults: Sequence[Fault], count: int | None = None) -> None:
        """``count`` is how many there are, where ``faults`` are only the first."""
        count = count or len(faults)
        fields = "1 field is" if count == 1 else f"{count:,} fields are"
        more = f", of which the first {len(faults)} are told" if count > len(faults) else ""
        super().__init__(f"{fields} wrong{more}: nothing was submitted")
        self.faults = list(faults)
