"""Runs the API in this process until it is told to stop."""

import errno
import ipaddress
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from types import FrameType

import uvicorn

from producer.api.app import create_app
from producer.api.services import Services
from producer.jobs.errors import PortTaken, SettingsError
from producer.jobs.keys import Keys
from producer.jobs.settings import Settings

log = logging.getLogger(__name__)

GRACE_S = 10
"""What open requests may still take after SIGTERM or SIGINT."""


def _say(url: str) -> None:
    log.info("the page is at %s/, the API at %s/api/v1, its description at %s/docs", url, url, url)


def serve(settings: Settings, *, announce: Callable[[str], None] = _say) -> None:
    """Answer on ``api_host:api_port`` until SIGTERM or SIGINT, then finish the open requests and return.

    Port 0 takes a free one. ``announce`` is called with the base URL once requests are answered.
    To be called from the main thread: the signals are the process's.

    Beyond the loopback it answers only with keys, and not before there is one with which keys can be made.

    Raises:
        PortTaken: somebody listens there already.
        SettingsError: a setting is missing or wrong, there is no key yet, or the schema is not this code's
            (SchemaMismatch).
        Unavailable: Postgres or S3 is away.
    """
    with closing(listen(settings.api_host, settings.api_port)) as listener:
        if beyond := not on_loopback(listener):
            settings = settings.model_copy(update={"require_keys": True})
        with closing(Services.at(settings)) as services:
            services.prepare()  # said plainly here, before a server turns it into a traceback
            if settings.require_keys:
                _check_keys(services, beyond=beyond)
        server = Server(settings, announce)
        with _ending_by_signal(server):
            server.run(sockets=[listener])


def _check_keys(services: Services, *, beyond: bool) -> None:
    """Raises: SettingsError: nobody could ever ask anything, and others than this machine's users could try."""
    if Keys(services.database).administered():
        return
    needed = "there is no administrator's key: make one with `ovis-batch keys create --admin NAME`"
    if beyond:
        host = services.settings.api_host
        raise SettingsError(f"OVIS_API_HOST={host} is beyond this machine, and {needed}; it asks Postgres directly")
    log.warning("keys are required, and %s", needed)


def on_loopback(listener: socket.socket) -> bool:
    """Whether only programs of this machine reach the socket."""
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises: PortTaken, SettingsError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise SettingsError(f"OVIS_API_HOST={host}: {error.strerror}: set it to an address of this machine") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise PortTaken(host, port, "OVIS_API_PORT") from error
        raise SettingsError(f"{host}:{port} cannot be listened on ({error.strerror}): set OVIS_API_HOST") from error
    return listener


class Server(uvicorn.Server):
    """uvicorn, which says where it listens once it answers."""

    def __init__(self, settings: Settings, announce: Callable[[str], None]) -> None:
        self._app = create_app(settings)
        super().__init__(
            uvicorn.Config(
                self._app,
                log_config=None,
                access_log=False,
                server_header=False,
                lifespan="on",
                timeout_graceful_shutdown=GRACE_S,
            )
        )
        self._announce = announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and sockets:
            self._announce(url_of(sockets[0]))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.state.feed.close()  # streams of events would be waited for as long as open requests may be
        await super().shutdown(sockets)


def url_of(listener: socket.socket) -> str:
    """Where the socket answers to a browser on this machine."""
    host, port = listener.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"


@contextmanager
def _ending_by_signal(server: uvicorn.Server) -> Iterator[None]:
    """uvicorn raises the signals that it caught once more when it has ended: they find a handler, not the default."""

    def end(number: int, frame: FrameType | None) -> None:
        server.should_exit = True

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
