"""``Idempotency-Key`` on every POST, as the IETF draft "The Idempotency-Key HTTP Header Field" has it.

The same key with the same request is answered as at first (and says so: ``Idempotency-Replayed: true``), with another
request it is refused (422), and while the first is still at work, too (409).

Jobs and batches handed in under ``/api/v1`` do not come by here: their keys are kept in the transaction that submits
(``store.submit``), so that nothing is submitted twice whatever dies. All other POSTs are answered from ``answers``:

- Kept is the answer to what was done. A refusal (4xx) did nothing and is forgotten, so that it can be asked again,
  corrected, with the same key. So is a failure (5xx), which mostly did nothing. Where Postgres was lost just after
  the commit it did something: asked again, a step (cancel, pause, retry …) is found done, and what is made has its id
  from the key (``parameters.id_by``), so there is no second one. Only a file that is uploaded may then be there twice.
- An answer is for those who may see what it tells: the tenant's callers. An administrator is told of all tenants; so
  it counts, too, whether one asked, and what one was told is answered to administrators alone.
- An answer that is streamed, larger than ``KEPT_BYTES`` or not to be stored (a new API key) is not kept; asked again,
  409 tells that it was done. Images drawn under ``/v1`` are asked anew instead: their jobs know the key.
- A process that dies at work leaves the key at work for a minute; then it is done again.

Bodies are not held: a fingerprint is taken of them as they pass by.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import TypeAdapter, ValidationError
from python_multipart.multipart import parse_options_header
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from producer.api import problems
from producer.api.access import Caller
from producer.api.bodies import LINES_MAX_BYTES
from producer.api.errors import AnswerNotKept, ApiError, Fault, Invalid, TooLarge
from producer.api.parameters import IDEMPOTENCY_KEY, Fingerprint, KeyText
from producer.api.services import Services, caller_of
from producer.jobs import contract
from producer.jobs.answers import RENEW_S, Answer, Answers, Held
from producer.jobs.errors import FarmError, KeyReused

log = logging.getLogger(__name__)

PREFIXES = ("/api/v1/", "/v1/")
IN_THEIR_TRANSACTION = frozenset({"/api/v1/jobs", "/api/v1/batches"})
ANSWERED_ANEW = frozenset({"/v1/images/generations", "/v1/batches"})
"""Whose jobs are known by the key, too: what cannot be kept of their answers can be asked for again."""
KEPT_BYTES = 1_000_000
UNREAD_BYTES = 1_000_000
"""Of a body that nobody wanted to read, and that has a fingerprint nevertheless."""
REPLAYED = "Idempotency-Replayed"
_KEY = TypeAdapter(KeyText)


class IdempotentPosts:
    """ASGI middleware: answers a POST whose key came before, and keeps the answers of the others."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not _concerned(scope):
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            caller = await caller_of(request)
            caller.need(contract.Scope.SUBMIT)
        except (ApiError, FarmError):
            await self._app(scope, receive, send)  # which finds the same, and says it
            return
        services: Services = scope["app"].state.services
        answers = Answers(services.database)
        try:
            begun = await run_in_threadpool(answers.begin, caller.tenant, _key(request))
            response = await _replayed(request, caller, begun) if isinstance(begun, Answer) else None
        except (ApiError, FarmError) as error:
            response = problems.of_known(request, error)
        except ClientDisconnect:
            return
        if response is not None:
            await response(scope, receive, send)
        elif isinstance(begun, Held):
            await _Exchange(request, caller, answers, begun, send).run(self._app)


def _concerned(scope: Scope) -> bool:
    return (
        scope["type"] == "http"
        and scope["method"] == "POST"
        and scope["path"].startswith(PREFIXES)
        and scope["path"] not in IN_THEIR_TRANSACTION
        and any(name == b"idempotency-key" for name, _ in scope["headers"])
    )


def _key(request: Request) -> str:
    """Raises: Invalid."""
    try:
        return _KEY.validate_python(request.headers[IDEMPOTENCY_KEY])
    except ValidationError as error:
        faults = problems.faults_of(error.errors())
        raise Invalid([Fault(field=IDEMPOTENCY_KEY, message=fault.message) for fault in faults]) from None


async def _replayed(request: Request, caller: Caller, answer: Answer) -> Response:
    """The answer of then. Raises: KeyReused, AnswerNotKept, TooLarge."""
    body = _Body(request, caller)
    async for piece in request.stream():
        body.add(piece)
        if body.size_bytes > LINES_MAX_BYTES:
            raise TooLarge(f"the body is larger than {LINES_MAX_BYTES:,} bytes")
    if answer.fingerprint is not None and body.fingerprint() != answer.fingerprint:
        raise KeyReused(request.headers[IDEMPOTENCY_KEY])
    if answer.body is None:
        raise AnswerNotKept
    response = Response(answer.body, answer.status)
    for name, value in answer.headers:
        response.headers.append(name, value)
    response.headers[REPLAYED] = "true"
    return response


class _Exchange:
    """One request that is at work, and its answer, which is kept before its end is sent."""

    def __init__(self, request: Request, caller: Caller, answers: Answers, held: Held, send: Send) -> None:
        self._request = request
        self._answers = answers
        self._held = held
        self._send = send
        self._asked = _Body(request, caller)
        self._asked_whole = False
        self._start: Message = {"status": 500, "headers": []}
        self._pieces: list[bytes] | None = []
        self._ended = False

    async def run(self, app: ASGIApp) -> None:
        async with self._renewing():
            try:
                await app(self._request.scope, self._receive, self._answer)
            finally:
                if not self._ended:  # it broke off
                    self._pieces = None
                    await self._end()

    @contextlib.asynccontextmanager
    async def _renewing(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self._renew())
        try:
            yield
        finally:
            task.cancel()

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(RENEW_S)
            await self._noted(self._answers.renew, self._held)

    async def _receive(self) -> Message:
        message = await self._request.receive()
        if message["type"] == "http.request":
            self._asked.add(message.get("body", b""))
            self._asked_whole = not message.get("more_body", False)
        return message

    async def _answer(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            if not _storable(message):
                self._pieces = None
        elif message["type"] == "http.response.body":
            self._take(message.get("body", b""))
            if not message.get("more_body", False):
                await self._end()
        await self._send(message)

    def _take(self, piece: bytes) -> None:
        if self._pieces is not None:
            self._pieces.append(piece)
            if sum(map(len, self._pieces)) > KEPT_BYTES:
                self._pieces = None

    async def _end(self) -> None:
        self._ended = True
        fingerprint = None
        if self._start["status"] < 400 and await self._read_whole():
            fingerprint = self._asked.fingerprint()
        answer = self._kept(fingerprint)
        if answer is None:
            await self._noted(self._answers.give_up, self._held)
        else:
            await self._noted(self._answers.keep, self._held, answer)

    def _kept(self, fingerprint: str | None) -> Answer | None:
        """What is kept of the answer; None: nothing, and the key is free. ``fingerprint`` is None if it is unknown."""
        status = self._start["status"]
        if status >= 400:
            return None
        if self._pieces is not None and fingerprint is not None:
            headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in self._start["headers"]]
            headers = [(name, value) for name, value in headers if name.lower() != "content-length"]
            return Answer(status, fingerprint, headers, b"".join(self._pieces))
        return None if self._request.scope["path"] in ANSWERED_ANEW else Answer(status, fingerprint, [], None)

    async def _read_whole(self) -> bool:
        """Whether all of the body is in the fingerprint; what nobody read so far is read for it."""
        limit_bytes = self._asked.size_bytes + UNREAD_BYTES
        while not self._asked_whole:
            message = await self._receive()
            if message["type"] == "http.disconnect" or self._asked.size_bytes > limit_bytes:
                return False
        return True

    async def _noted(self, note: Callable[..., None], *what: Any) -> None:
        """Without Postgres the answer goes out all the same; the key stays at work until it counts as lost."""
        try:
            await run_in_threadpool(note, *what)
        except FarmError as error:
            log.warning("an answer to an idempotency key is not noted: %s", error)


def _storable(start: Message) -> bool:
    """Whether a response that begins so may be kept."""
    headers = {name.lower(): value.lower() for name, value in start["headers"]}
    streamed = headers.get(b"content-type", b"").startswith(b"text/event-stream")
    return not streamed and b"no-store" not in headers.get(b"cache-control", b"")


class _Body:
    """What a request is known by: method, path, query, whether an administrator asks, and its body, piece by piece.

    The boundary between the parts of a form is left out of it: libraries draw it by lot at each attempt.
    """

    def __init__(self, request: Request, caller: Caller) -> None:
        self.size_bytes = 0
        query = request.scope["query_string"].decode("latin-1")
        self._fingerprint = Fingerprint(request, query=query, admin=caller.admin)
        self._boundary = _boundary(request.headers.get("content-type", ""))
        self._held = b""

    def add(self, piece: bytes) -> None:
        self.size_bytes += len(piece)
        if not self._boundary:
            self._fingerprint.add(piece)
            return
        whole = (self._held + piece).replace(self._boundary, b"")
        certain = max(0, len(whole) - len(self._boundary) + 1)  # what follows may be the beginning of a boundary
        self._fingerprint.add(whole[:certain])
        self._held = whole[certain:]

    def fingerprint(self) -> str:
        """To be asked once, when all was added."""
        self._fingerprint.add(self._held)
        return self._fingerprint.hex()


def _boundary(content_type: str) -> bytes:
    """As the form itself is read."""
    return parse_options_header(content_type)[1].get(b"boundary", b"")
