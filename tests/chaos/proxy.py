"""A TCP proxy that stands between the farm and one of its servers, and does to the traffic what networks do.

It passes bytes on until it is given a ``Trouble``; then it applies that to what comes, on connections that stand as
well as on new ones, and counts how often it really did. It lives in a thread of its own and binds a free port.
"""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum, auto

CHUNK_BYTES = 65_536
HEAD_END = b"\r\n\r\n"
REFUSAL = b"<Error><Code>%s</Code><Message>asked for by the test</Message></Error>"


class Kind(Enum):
    """What happens to a request."""

    RESET = auto()  # the connection is reset before the request reaches the server
    LOSE_ANSWER = auto()  # the server gets the request, and nobody ever gets its answer
    TRUNCATE = auto()  # half of the answer's first part comes, then the end
    SLOW = auto()  # the request waits
    REFUSE = auto()  # HTTP alone: the proxy itself answers with ``status``


@dataclass(frozen=True)
class Trouble:
    """What to do to requests that hold ``pattern``; after ``times`` of them, nothing more."""

    kind: Kind
    pattern: bytes = b""
    times: float = float("inf")
    slow_s: float = 0.0
    status: bytes = b"503 Service Unavailable"
    code: bytes = b"ServiceUnavailable"


class Proxy:
    """Listens on ``port`` of the loopback and passes on to ``target_port``."""

    def __init__(self, target_port: int) -> None:
        self.port = 0
        self.done = 0
        self._target_port = target_port
        self._trouble: Trouble | None = None
        self._left = 0.0
        self._open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(10), "the proxy did not start"

    def stop(self) -> None:
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    @contextmanager
    def doing(self, trouble: Trouble) -> Iterator[None]:
        """Apply ``trouble`` while the body runs."""
        self._left, self._trouble = trouble.times, trouble
        try:
            yield
        finally:
            self._trouble = None

    def cut(self) -> None:
        """Reset every connection that stands."""
        self._loop.call_soon_threadsafe(self._cut_all)

    def _cut_all(self) -> None:
        for writer in list(self._open):
            writer.transport.abort()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        try:
            self._loop.run_forever()
        finally:
            server.close()
            for task in asyncio.all_tasks(self._loop):
                task.cancel()
            self._loop.run_until_complete(asyncio.sleep(0.05))
            self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:
            writer.transport.abort()
            return
        connection = _Connection(self, reader, writer, server_reader, server_writer)
        self._open |= {writer, server_writer}
        try:
            await connection.pass_on()
        finally:
            self._open -= {writer, server_writer}
            for end in (writer, server_writer):
                end.transport.abort() if connection.broken else end.close()

    def take(self, request: bytes) -> Trouble | None:
        """The trouble that this request shall have, if any; it is counted."""
        trouble = self._trouble
        if trouble is None or trouble.pattern not in request or self._left < 1:
            return None
        self._left -= 1
        self.done += 1
        return trouble


class _Connection:
    """One client's connection, and the one to the server that stands for it."""

    def __init__(
        self,
        proxy: Proxy,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        server_reader: asyncio.StreamReader,
        server_writer: asyncio.StreamWriter,
    ) -> None:
        self.broken = False
        self._proxy = proxy
        self._reader = reader
        self._writer = writer
        self._server_reader = server_reader
        self._server_writer = server_writer
        self._answer: Kind | None = None  # what shall happen to the next answer

    async def pass_on(self) -> None:
        ways = [asyncio.ensure_future(way) for way in (self._pass_requests(), self._pass_answers())]
        _, pending = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in pending:
            way.cancel()
        for way in ways:
            with suppress(asyncio.CancelledError, OSError):
                await way

    async def _pass_requests(self) -> None:
        while data := await self._reader.read(CHUNK_BYTES):
            trouble = self._proxy.take(data)
            if trouble is not None:
                if trouble.kind is Kind.RESET:
                    self.broken = True
                    return
                if trouble.kind is Kind.REFUSE:
                    await self._refuse(data, trouble)
                    return
                if trouble.kind is Kind.SLOW:
                    await asyncio.sleep(trouble.slow_s)
                else:
                    self._answer = trouble.kind
            self._server_writer.write(data)
            await self._server_writer.drain()

    async def _pass_answers(self) -> None:
        while data := await self._server_reader.read(CHUNK_BYTES):
            if self._answer is Kind.LOSE_ANSWER:
                self.broken = True
                return
            if self._answer is Kind.TRUNCATE:
                self._writer.write(data[: len(data) // 2])
                await self._writer.drain()
                return
            self._writer.write(data)
            await self._writer.drain()

    async def _refuse(self, data: bytes, trouble: Trouble) -> None:
        """Read the whole request, or the client would meet a reset instead of the answer."""
        head, _, body = data.partition(HEAD_END)
        left = _content_length(head) - len(body)
        while left > 0 and (more := await self._reader.read(CHUNK_BYTES)):
            left -= len(more)
        answer = REFUSAL % trouble.code
        headers = b"HTTP/1.1 %s\r\nContent-Type: application/xml\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
        self._writer.write(headers % (trouble.status, len(answer)) + answer)
        await self._writer.drain()


def _content_length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length":
            return int(value)
    return 0
