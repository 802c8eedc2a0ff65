"""The S3 server's clock, as its answers tell it: what requests and links are signed by.

A signature carries the time, and S3 refuses one that is more than 15 minutes off (RequestTimeTooSkewed); botocore
signs by this host's clock and has no correction of its own. So every answer's Date is compared with this host's
clock, and a refusal that came with a surprising Date is tried again at once.

Invariants: one clock a server, shared by its clients and threads; a host whose clock is right signs exactly as botocore
does.
"""

import logging
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

from botocore.auth import AUTH_TYPE_MAPS, SIGV4_TIMESTAMP, S3SigV4Auth, S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

log = logging.getLogger(__name__)

TOLERATED = timedelta(minutes=1)
"""A Date is whole seconds, and may be as old as its answer was slow."""
MOST_ATTEMPTS = 3
"""Of one request, so that a server with a senseless Date ends in its own refusal."""
REFUSED = frozenset({400, 401, 403})
"""S3 says 403, without a word more if the request was a HEAD; not every compatible server says the same."""
SIGNER = "s3v4-server-clock"
CLOCK = "server_clock"


class ServerClock:
    """How far this host's clock is off, learned from the answers that its clients get."""

    def __init__(self) -> None:
        self._ahead = timedelta()

    def now(self) -> datetime:
        """The server's time; this host's until an answer has told that they differ."""
        return datetime.now(UTC) + self._ahead

    def attach(self, client: "S3Client") -> None:
        """Let the client's requests and links be signed by this clock, and set it by the answers it gets."""
        AUTH_TYPE_MAPS.update({SIGNER: _Signer, f"{SIGNER}-query": _LinkSigner})
        hooks: Any = client.meta.events  # whose stubs know of no handler that answers
        hooks.register_first("choose-signer.s3", self._choose_signer)
        hooks.register_first("needs-retry.s3", self._compare)

    def _choose_signer(self, context: dict[str, Any], **_event: Any) -> str:
        context[CLOCK] = self
        return SIGNER  # botocore adds "-query" where it signs a link

    def _compare(self, response: Any, attempts: int, request_dict: dict[str, Any], **_event: Any) -> float | None:
        """botocore asks after every answer: the seconds to wait before the request is tried again, or None."""
        date = _date(response[0].headers.get("Date")) if response else None
        if date is None:
            return None
        self._set_by(date)
        signed_at = datetime.strptime(request_dict["context"]["timestamp"], SIGV4_TIMESTAMP).replace(tzinfo=UTC)
        wrongly_signed = abs(date - signed_at) > TOLERATED
        refused = response[0].status_code in REFUSED
        return 0.0 if refused and wrongly_signed and attempts < MOST_ATTEMPTS else None

    def _set_by(self, date: datetime) -> None:
        ahead = date - datetime.now(UTC)
        if abs(ahead - self._ahead) > TOLERATED:
            self._ahead = ahead
            side = "behind" if ahead > timedelta() else "ahead of"
            log.warning("this host's clock is %.0f s %s S3's: set it", abs(ahead.total_seconds()), side)


def _date(header: str | None) -> datetime | None:
    try:
        return parsedate_to_datetime(header).astimezone(UTC) if header else None
    except ValueError:
        return None


class _ByServerClock:
    """botocore's signers note the host's time in the request, and then sign by what is noted: here, between the two."""

    def _modify_request_before_signing(self, request: AWSRequest) -> None:
        request.context["timestamp"] = request.context[CLOCK].now().strftime(SIGV4_TIMESTAMP)
        super()._modify_request_before_signing(request)  # type: ignore[misc]  # the stubs leave it out


class _Signer(_ByServerClock, S3SigV4Auth):
    """Of requests."""


class _LinkSigner(_ByServerClock, S3SigV4QueryAuth):
    """Of presigned links."""
