"""A proxy that loses connections as networks do: at the worst moment, when the answer is on its way."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from urllib.parse import urlsplit

PIECE_BYTES = 65_536
LIMIT_S = 30


class CuttingProxy:
    """Passes bytes on to the server at ``url``, but cuts the first ``cuts`` connections at the answer's first byte.

    Whatever the server did for what it was asked is done by then, and the caller learns nothing of it. ``before_cut``
    is called while the caller still waits.
    """

    def __init__(self, listener: socket.socket, url: str, cuts: int, before_cut: Callable[[], object]) -> None:
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.left = cuts
        self._before_cut = before_cut
        self._listener = listener
        self._server = (urlsplit(url).hostname, urlsplit(url).port)
        self._threads: list[threading.Thread] = []

    def run(self) -> None:
        """Until the listener is closed."""
        while True:
            try:
                caller, _ = self._listener.accept()
            except OSError:
                break
            self._start(self._serve, caller)
        for thread in self._threads:
            thread.join(LIMIT_S)

    def _serve(self, caller: socket.socket) -> None:
        with closing(caller), closing(socket.create_connection(self._server, LIMIT_S)) as server:
            asking = self._start(self._pass_on, caller, server)
            with suppress(OSError):
                self._answer(server, caller)
            for end in (caller, server):  # the other thread waits in one of them
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
            asking.join(LIMIT_S)

    def _answer(self, server: socket.socket, caller: socket.socket) -> None:
        while piece := server.recv(PIECE_BYTES):
            if self.left:
                self.left -= 1
                self._before_cut()
                return
            caller.sendall(piece)

    def _pass_on(self, source: socket.socket, to: socket.socket) -> None:
        with suppress(OSError):
            while piece := source.recv(PIECE_BYTES):
                to.sendall(piece)

    def _start(self, target: Callable[..., None], *args: socket.socket) -> threading.Thread:
        thread = threading.Thread(target=target, args=args)
        thread.start()
        self._threads.append(thread)
        return thread


@contextmanager
def cutting(url: str, *, cuts: int, before_cut: Callable[[], object] = lambda: None) -> Iterator[CuttingProxy]:
    """A proxy before the server at ``url``."""
    listener = socket.create_server(("127.0.0.1", 0))
    proxy = CuttingProxy(listener, url, cuts, before_cut)
    thread = threading.Thread(target=proxy.run)
    thread.start()
    try:
        yield proxy
    finally:
        listener.shutdown(socket.SHUT_RDWR)  # wakes accept
        listener.close()
        thread.join(LIMIT_S)
        assert not thread.is_alive(), "a connection was left open"
