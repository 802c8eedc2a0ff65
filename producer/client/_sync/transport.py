# Written by `make client` from producer/client/_async/transport.py: change that one.
"""Asks the farm and reads its answers: again where that may help, with one idempotency key for each POST."""

import tempfile
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, TypeVar

import httpx
from pydantic import ValidationError

from producer.client.attempts import Attempts
from producer.client.bodies import PIECE_BYTES, SPOOL_BYTES, key_headers
from producer.client.errors import Unreachable
from producer.client.models import Answer
from producer.client.waiting import aside, pause

FILE_PATIENCE_S = 300.0
"""A workbook of 100,000 rows is made before its first byte is sent."""

Answered = TypeVar("Answered", bound=Answer)


class Transport:
    """One connection pool on the API at ``base_url``."""

    def __init__(
        self, base_url: str = "http://127.0.0.1:8000", *, api_key: str | None = None, timeout_s: float = 30.0
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self._timeout_s = timeout_s
        authorization = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(base_url=f"{self.base_url}/api/v1/", timeout=timeout_s, headers=authorization)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def _asked(self, model: type[Answered], method: str, path: str, **options: Any) -> Answered:
        response = self._answer(method, path, **options)
        try:
            return model.model_validate_json(response.content)
        except ValidationError:
            raise _no_farm(response, model) from None

    def _listed(self, model: type[Answered], field: str, path: str, **params: Any) -> list[Answered]:
        """What stands under ``field`` of one answer."""
        items, _ = _items(self._answer("GET", path, params=params), model, field)
        return items

    def _pages(
        self, model: type[Answered], field: str, path: str, cursor: str, params: dict[str, Any]
    ) -> Iterator[Answered]:
        """What stands under ``field`` of all pages; ``cursor`` is the parameter that takes a page's ``next``."""
        while True:
            items, following = _items(self._answer("GET", path, params=params), model, field)
            for item in items:
                yield item
            if following is None:
                return
            params[cursor] = following

    def _written(self, path: str, to: Path | str, params: dict[str, Any]) -> None:
        """The answer's body in a file, which is there whole or not at all. What breaks off begins anew."""
        attempts = Attempts(self.base_url, self._timeout_s)
        part = Path(f"{to}.part")
        try:
            while not self._copied(path, params, part, attempts):
                pass
            part.replace(to)
        finally:
            part.unlink(missing_ok=True)

    def _copied(self, path: str, params: dict[str, Any], part: Path, attempts: Attempts) -> bool:
        """Whether the whole body came. Raises: Unreachable, when that was the last attempt."""
        response = self._answer("GET", path, params=params, stream=True, patience_s=FILE_PATIENCE_S)
        try:
            with part.open("wb") as file:
                for piece in response.iter_bytes(PIECE_BYTES):
                    aside(file.write, piece)
        except httpx.HTTPError as error:
            pause(attempts.lost(error))
            return False
        finally:
            response.close()
        return True

    def _removed(self, path: str) -> None:
        """Remove what is there. That it is gone is no error if an attempt came before whose answer was lost."""
        self._answer("DELETE", path, gone_by_us=True)

    def _answer(
        self,
        method: str,
        path: str,
        *,
        key: str | None = None,
        stream: bool = False,
        patience_s: float | None = None,
        gone_by_us: bool = False,
        **options: Any,
    ) -> httpx.Response:
        """A successful answer; asked again, with growing waits, where that may help.

        ``stream``: its body is still to come, and the caller closes it. ``patience_s``: how long the farm may say
        nothing. ``gone_by_us``: a 404 is as good as success behind an attempt whose answer was lost.
        """
        patience_s = patience_s or self._timeout_s
        timeout = httpx.Timeout(self._timeout_s, read=max(self._timeout_s, patience_s))
        headers = httpx.Headers(options.pop("headers", None))
        if method == "POST":
            headers.update(key_headers(key))
        attempts = Attempts(self.base_url, patience_s)
        while True:
            request = self._http.build_request(method, path, headers=headers, timeout=timeout, **options)
            try:
                response = self._http.send(request, stream=stream, follow_redirects=method == "GET")
                gone = gone_by_us and attempts.perhaps_done and response.status_code == HTTPStatus.NOT_FOUND
                if response.is_success or gone:
                    return response
                response.read()
            except httpx.HTTPError as error:
                pause(attempts.lost(error))
            else:
                pause(attempts.refused(response))


class Pieces:
    """A body that can be sent again: from its beginning, each time it is iterated."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._begins = file.tell()

    def __iter__(self) -> Iterator[bytes]:
        self._file.seek(self._begins)
        while piece := aside(self._file.read, PIECE_BYTES):
            yield piece


def rewindable(file: IO[bytes], spool: IO[bytes]) -> Pieces:
    """What is left of ``file``; by way of ``spool`` if it can be read only once, as a pipe."""
    if file.seekable():
        return Pieces(file)
    while piece := aside(file.read, PIECE_BYTES):
        aside(spool.write, piece)
    spool.seek(0)
    return Pieces(spool)


def spooled() -> IO[bytes]:
    """A temporary file that is in memory while it is small."""
    return tempfile.SpooledTemporaryFile(SPOOL_BYTES)


def _items(response: httpx.Response, model: type[Answered], field: str) -> tuple[list[Answered], int | str | None]:
    """What stands under ``field``, and where the next page starts, None at the end. Raises: Unreachable."""
    try:
        page = response.json()
        return [model.model_validate(item) for item in page[field]], page.get("next")
    except (ValueError, TypeError, LookupError, AttributeError):  # pydantic's ValidationError is a ValueError
        raise _no_farm(response, model) from None


def _no_farm(response: httpx.Response, model: type[Answer]) -> Unreachable:
    return Unreachable(str(response.url), f"what answers there is no ovis-batch API ({model.__name__})")
