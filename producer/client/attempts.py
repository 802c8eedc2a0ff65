"""When a question is asked again, and when it is given up. Waits for nothing and sends nothing itself.

Everything is asked again a few times when the farm is away for a moment or the connection is lost. Every POST carries
an idempotency key, by which the farm knows what it has done already: nothing is done twice.
"""

import random
import time

import httpx
from pydantic import ValidationError

from producer.client.errors import REFUSALS, Refused, ServerError, Unreachable
from producer.client.models import Problem

ATTEMPTS = 5
FIRST_WAIT_S = 0.25
LONGEST_WAIT_S = 8.0
"""A farm that wants to be asked later than that is not waited for."""
RETRIED_STATUSES = frozenset({429, 500, 502, 503, 504})
"""500 too: nothing that is asked here does more when it is asked twice."""
AT_WORK = "urn:ovis-batch:problem:key-at-work"
"""The farm is still at what was asked with the same key: by an attempt whose connection was lost, or by others."""
UNHEARD_ERRORS = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.UnsupportedProtocol)
RETRIED_ERRORS = (httpx.TimeoutException, httpx.NetworkError, httpx.ProxyError, httpx.RemoteProtocolError)


class Attempts:
    """Of one question to the farm at ``url``. An earlier attempt that is still at work is waited for ``patience_s``,
    from when the farm first says so."""

    def __init__(self, url: str, patience_s: float) -> None:
        self._url = url
        self._patience_s = patience_s
        self._deadline: float | None = None
        self._failed = 0
        self._heard = False
        self._perhaps_done = False

    @property
    def perhaps_done(self) -> bool:
        """Whether an earlier attempt may have done what was asked, and its answer was lost."""
        return self._perhaps_done

    def lost(self, error: httpx.HTTPError) -> float:
        """No answer came: how long to wait before the next attempt, in seconds. Raises: Unreachable."""
        if not isinstance(error, UNHEARD_ERRORS):
            self._heard = self._perhaps_done = True
        wait_s = self._backoff_s()
        if self._failed == ATTEMPTS or not isinstance(error, RETRIED_ERRORS):
            raise Unreachable(self._url, str(error) or type(error).__name__, heard=self._heard) from error
        return wait_s

    def refused(self, response: httpx.Response) -> float:
        """This came: how long to wait before the next attempt, in seconds. Raises: ServerError, Refused."""
        self._heard = True
        self._perhaps_done = self._perhaps_done or response.status_code >= 500
        problem, asked_s = problem_in(response), _retry_after_s(response)
        if problem.type == AT_WORK and self._is_waited_for(time.monotonic()):
            return asked_s or LONGEST_WAIT_S
        wait_s = self._backoff_s() + (asked_s or 0)
        if self._failed == ATTEMPTS or response.status_code not in RETRIED_STATUSES or wait_s > LONGEST_WAIT_S:
            raise _error_class(response.status_code)(problem, asked_s, perhaps_done=self._perhaps_done)
        return wait_s

    def _is_waited_for(self, now: float) -> bool:
        if self._deadline is None:
            self._deadline = now + self._patience_s
        return now < self._deadline

    def _backoff_s(self) -> float:
        """From half of it to all of it, so that clients that were cut off together do not come back together."""
        self._failed += 1
        return float(FIRST_WAIT_S * 2 ** (self._failed - 1)) * random.uniform(0.5, 1)


def problem_in(response: httpx.Response) -> Problem:
    """The problem document, or one made up for an answer that is none: a proxy's, or the bucket's."""
    try:
        return Problem.model_validate_json(response.content)
    except ValidationError:
        return Problem(
            type="about:blank",
            title=response.reason_phrase or "no problem document",
            status=response.status_code,
            detail=response.text[:500],
            instance=response.url.path,
        )


def _retry_after_s(response: httpx.Response) -> float | None:
    value = response.headers.get("Retry-After", "")
    return float(value) if value.isdecimal() else None


def _error_class(status: int) -> type[ServerError | Refused]:
    return ServerError if status >= 500 else REFUSALS.get(status, Refused)
