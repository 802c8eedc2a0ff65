"""The embedded S3 server: ministack's S3 behind a guard. Runs as a process: ``python -m producer.jobs.local.s3``.

ministack is an emulator for tests. By itself it takes any secret in an Authorization header, empties every bucket
for whoever posts to one path, opens brokers of other services, and looks for containers to remove. None of that
is fit for a store of results, so only its ASGI application is used, without its start-up, and this guard lets
through what is signed with the one key pair, in the header or in a presigned URL, and nothing else.

Invariants: it listens on one port of 127.0.0.1; a request that is not signed with the secret reaches no data;
ministack's own administration is out of reach even when signed. The body's checksum is part of what is signed
but is not computed again: who can change a body on the loopback can read the secret too.
"""

import hmac
import importlib
import os
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import uvicorn
from botocore.auth import S3SigV4Auth, S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

PORT_VARIABLE = "GATEWAY_PORT"
HOST = "127.0.0.1"
ALGORITHM = "AWS4-HMAC-SHA256"
SKEW = timedelta(minutes=15)
LONGEST_PRESIGN = timedelta(days=7)
ADMINISTRATION = "/_"  # no bucket's name begins so


class Refused(Exception):
    """The request is not signed with the server's key pair: .code is S3's name for what is wrong."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Request:
    """What of a request its signature covers, as it came over the wire (nothing decoded)."""

    method: str
    url: str
    headers: dict[str, str]

    @classmethod
    def from_scope(cls, scope: MutableMapping[str, Any]) -> "Request":
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        path = scope["raw_path"].decode("latin-1").partition("?")[0]
        query = scope["query_string"].decode("latin-1")
        url = f"http://{headers.get('host', '')}{path}" + (f"?{query}" if query else "")
        return cls(scope["method"], url, headers)


@dataclass(frozen=True)
class Claimed:
    """A signature and what it says it covers (AWS Signature Version 4)."""

    key_id: str
    scope: str
    signed_headers: list[str]
    signature: str
    timestamp: str

    @property
    def signed_at(self) -> datetime:
        try:
            return datetime.strptime(self.timestamp, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        except ValueError:
            raise Refused("AccessDenied", "the request carries no date that can be read") from None


class Verifier:
    """Checks requests against one key pair, by signing them again with botocore's own signer."""

    def __init__(self, key_id: str, secret: str) -> None:
        self._key_id = key_id
        self._credentials = Credentials(key_id, secret)

    def check(self, request: Request, now: datetime) -> None:
        """Returns if the request is signed with the key pair and its time has not passed.

        Raises:
            Refused: it is not.
        """
        query = dict(parse_qsl(urlsplit(request.url).query, keep_blank_values=True))
        if "X-Amz-Signature" in query:
            self._check_presigned(request, query, now)
        elif request.headers.get("authorization", "").startswith(f"{ALGORITHM} "):
            self._check_header(request, now)
        else:
            raise Refused("AccessDenied", "the request is not signed by AWS Signature Version 4")

    def _check_header(self, request: Request, now: datetime) -> None:
        fields = request.headers["authorization"].removeprefix(f"{ALGORITHM} ").split(",")
        parts = dict(field.strip().partition("=")[::2] for field in fields)
        claimed = _claimed(
            parts.get("Credential", ""),
            parts.get("SignedHeaders", ""),
            parts.get("Signature", ""),
            request.headers.get("x-amz-date", ""),
        )
        if abs(now - claimed.signed_at) > SKEW:
            raise Refused("RequestTimeTooSkewed", "the request was signed too long ago, or a clock is wrong")
        self._compare(S3SigV4Auth, claimed, request, request.url)

    def _check_presigned(self, request: Request, query: dict[str, str], now: datetime) -> None:
        claimed = _claimed(
            query.get("X-Amz-Credential", ""),
            query.get("X-Amz-SignedHeaders", ""),
            query["X-Amz-Signature"],
            query.get("X-Amz-Date", ""),
        )
        expires = query.get("X-Amz-Expires", "")
        lifetime = timedelta(seconds=int(expires)) if expires.isdecimal() and len(expires) < 8 else timedelta()
        if not claimed.signed_at - SKEW <= now <= claimed.signed_at + min(lifetime, LONGEST_PRESIGN):
            raise Refused("AccessDenied", "Request has expired")
        base, _, pairs = request.url.partition("?")
        kept = "&".join(pair for pair in pairs.split("&") if not pair.startswith("X-Amz-Signature="))
        self._compare(S3SigV4QueryAuth, claimed, request, f"{base}?{kept}")

    def _compare(
        self, signer: type[S3SigV4Auth | S3SigV4QueryAuth], claimed: Claimed, request: Request, url: str
    ) -> None:
        _, region, service, _ = claimed.scope.split("/")
        auth = signer(self._credentials, service, region)
        covered = {name: request.headers.get(name, "") for name in claimed.signed_headers}
        again = AWSRequest(method=request.method, url=url, headers=covered)
        again.context["timestamp"] = claimed.timestamp
        expected = auth.signature(auth.string_to_sign(again, auth.canonical_request(again)), again)
        if claimed.key_id != self._key_id:
            raise Refused("InvalidAccessKeyId", "the access key is not this server's")
        if not hmac.compare_digest(expected.encode(), claimed.signature.encode()):
            raise Refused("SignatureDoesNotMatch", "the request was signed with another secret, or changed since")


def _claimed(credential: str, signed_headers: str, signature: str, timestamp: str) -> Claimed:
    key_id, _, scope = credential.partition("/")
    names = signed_headers.split(";")
    if scope.count("/") != 3 or not timestamp.startswith(scope.partition("/")[0]) or "host" not in names:
        raise Refused("AccessDenied", "the signature is incomplete")
    return Claimed(key_id, scope, names, signature, timestamp)


class Guard:
    """The ASGI application in front of ministack's: HTTP that is signed goes through, all else ends here."""

    def __init__(self, app: App, verifier: Verifier) -> None:
        self._app = app
        self._verifier = verifier

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        try:
            if scope["path"].startswith(ADMINISTRATION):
                raise Refused("AccessDenied", "only S3 is served here")
            self._verifier.check(Request.from_scope(scope), datetime.now(UTC))
        except Refused as refused:
            await _send_refusal(send, refused)
        else:
            await self._app(scope, receive, send)


async def _send_refusal(send: Send, refused: Refused) -> None:
    body = f"<Error><Code>{refused.code}</Code><Message>{refused}</Message></Error>".encode()
    headers = [(b"content-type", b"application/xml"), (b"content-length", str(len(body)).encode())]
    # The unread body of a refused upload would be taken for the next request.
    headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def environment(port: int, data: Path, key_id: str, secret: str) -> dict[str, str]:
    """The variables this process is started with; ministack reads its own while it is imported."""
    return {
        PORT_VARIABLE: str(port),
        "AWS_ACCESS_KEY_ID": key_id,
        "AWS_SECRET_ACCESS_KEY": secret,
        "S3_PERSIST": "1",
        "S3_DATA_DIR": str(data),
        "PERSIST_STATE": "0",
        "SERVICES": "s3",
        "LOG_LEVEL": "WARNING",
    }


def main() -> None:
    """Serve until SIGTERM. Everything it needs is in the variables of ``environment``."""
    verifier = Verifier(os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"])
    app: App = importlib.import_module("ministack.app").app
    uvicorn.run(
        Guard(app, verifier),
        host=HOST,
        port=int(os.environ[PORT_VARIABLE]),
        lifespan="off",
        ws="none",
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=3,
    )


if __name__ == "__main__":
    main()
