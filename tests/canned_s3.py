"""A server that gives every request the same bytes and hangs up, whatever HTTP says of them."""

import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import parse_headers
from typing import ClassVar


class _Canned(socketserver.StreamRequestHandler):
    answer: ClassVar[bytes]

    def handle(self) -> None:
        self.rfile.readline()
        self.rfile.read(int(parse_headers(self.rfile).get("Content-Length", "0")))
        self.wfile.write(self.answer)


@contextmanager
def answering(answer: bytes) -> Iterator[str]:
    """The URL of a server that gives this answer, until the block is left."""
    handler = type("Handler", (_Canned,), {"answer": answer})
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, name="canned-s3")
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
