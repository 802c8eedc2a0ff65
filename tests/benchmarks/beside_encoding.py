"""The time of a step with threads beside it that encode PNGs and push their bytes, with nothing but Python to install.

``beside_uploads.py`` measures the same with a worker's own S3 client and server, which a machine that is lent for its
GPU seldom has. Here the bytes go through a socket to another process, which throws them away.
"""

import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from pipeline.image_file import encode
from pipeline.request import ImageRequest

THREADS = 16
SWITCH_INTERVAL_S = 1e-4  # a worker's (worker.app, whose import needs Celery)

_SINK = """
import socketserver
class Sink(socketserver.BaseRequestHandler):
    def handle(self):
        while self.request.recv(1 << 16):
            pass
class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
with Server(("127.0.0.1", 0), Sink) as server:
    print(server.server_address[1], flush=True)
    server.serve_forever()
"""


def seconds_beside(act: Callable[[], float], request: ImageRequest, *, pause_s: float | None) -> tuple[float, int]:
    """What ``act`` says, and the PNGs of ``request`` that were pushed meanwhile, by sixteen threads.

    Each pauses ``pause_s`` after each; with None there are no threads. The switch interval is a worker's in any case.
    """
    with switching_every(SWITCH_INTERVAL_S), _pushing(request, pause_s) as pushed:
        return act(), len(pushed)


@contextmanager
def _pushing(request: ImageRequest, pause_s: float | None) -> Iterator[list[int]]:
    """Gives the sizes in bytes of what was pushed so far."""
    pushed = list[int]()
    if pause_s is None:
        yield pushed
        return
    pixels, stop = _picture(request), threading.Event()

    def push(number: int) -> None:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            stop.wait(pause_s * number / THREADS)  # in turn, not all at once
            while not stop.is_set():
                body = encode(pixels, request, "random", "random")
                connection.sendall(body)
                pushed.append(len(body))
                stop.wait(pause_s)

    with _sink() as port:
        threads = [threading.Thread(target=push, args=(number,)) for number in range(THREADS)]
        for thread in threads:
            thread.start()
        try:
            yield pushed
        finally:
            stop.set()
            for thread in threads:
                thread.join()


@contextmanager
def _sink() -> Iterator[int]:
    """The port of a process that reads and forgets."""
    with subprocess.Popen([sys.executable, "-c", _SINK], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()


@contextmanager
def switching_every(seconds: float) -> Iterator[None]:
    """Python's switch interval for as long as the block runs."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(seconds)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def _picture(request: ImageRequest) -> NDArray[np.uint8]:
    """Soft shades with a little grain: about as many bytes a pixel as a drawn picture has."""
    rows, columns = np.mgrid[: request.height, : request.width]
    grain = np.random.default_rng(0).integers(0, 8, (request.height, request.width, 3))
    shades = np.stack([rows, columns, rows + columns], axis=-1) * 248 // (request.height + request.width)
    return (shades + grain).astype(np.uint8)
