"""What can go wrong between a program and the farm, classed by what the program must do.

ClientError
├── Unreachable       nobody answers, or the answer broke off: .url, .heard
├── ServerError       the farm answers that it cannot now (5xx): .problem, .retry_after_s
├── Refused           the farm refuses what was asked (4xx): .problem names the fields
│   ├── Unauthorized  the API key is missing, wrong or revoked (401)
│   ├── Forbidden     the API key may not do this (403)
│   ├── NotFound      there is no such job, batch or image (404)
│   └── Overloaded    a limit is reached (429): ask again after .retry_after_s
├── Corrupt           an image that arrived is not the one that was recorded
└── NotDone           the time to wait is over: .last is what was seen last
"""

from uuid import UUID

from producer.client.models import Batch, Job, Problem


class ClientError(Exception):
    """Root of all errors of this client."""


class Unreachable(ClientError):
    """Nobody answers at ``url``, or the answer broke off.

    ``heard`` says whether the farm may have got what was asked. What was being submitted may then be there: submitting
    it again with the same key finds out, and does no more.
    """

    def __init__(self, url: str, reason: str, *, heard: bool = True) -> None:
        super().__init__(f"{url}: {reason}")
        self.url = url
        self.heard = heard


class Answered(ClientError):
    """The farm answered with a problem document, ``problem``; ``retry_after_s`` is what it says of asking again.

    ``perhaps_done`` says whether an earlier attempt, whose answer was lost, may have done what was asked.
    """

    def __init__(self, problem: Problem, retry_after_s: float | None = None, *, perhaps_done: bool = False) -> None:
        super().__init__(str(problem))
        self.problem = problem
        self.retry_after_s = retry_after_s
        self.perhaps_done = perhaps_done


class ServerError(Answered):
    """The farm cannot do it now; ask again after ``retry_after_s``."""


class Refused(Answered):
    """The farm refuses; ``problem.errors`` names the fields."""


class Unauthorized(Refused):
    """The API key is missing, wrong or revoked."""


class Forbidden(Refused):
    """The API key is good, but not for this."""


class NotFound(Refused):
    """There is no such job, batch or image, or it is another tenant's."""


class Overloaded(Refused):
    """A limit is reached; ask again after ``retry_after_s``."""


class Corrupt(ClientError):
    """The image that arrived has another sha256 than the one that was recorded."""

    def __init__(self, job_id: UUID, expected: str | None, found: str) -> None:
        super().__init__(f"the image of job {job_id} has sha256 {found}, recorded is {expected}")
        self.job_id = job_id


class NotDone(ClientError):
    """The time to wait is over; the jobs go on in peace."""

    def __init__(self, last: Job | Batch, waited_s: float) -> None:
        super().__init__(f"{last.id} is not done after {waited_s:g} s; it goes on, wait for it again")
        self.last = last


REFUSALS: dict[int, type[Refused]] = {401: Unauthorized, 403: Forbidden, 404: NotFound, 429: Overloaded}
