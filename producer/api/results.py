"""The paths of what came out of a batch: its table, and all of its images in one file. Both are streamed, in constant
memory; an error on the way breaks the connection off, so that half an answer is never taken for the whole."""

import re
from collections.abc import AsyncIterator, Callable, Generator, Iterable
from typing import Annotated, Any
from urllib.parse import quote
from uuid import UUID

import anyio
from fastapi import APIRouter, Query, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from producer.api.answers import PREFIX
from producer.api.archive import zip_pieces
from producer.api.documents import problems
from producer.api.services import Here, Services
from producer.api.tables import IN_THE_WAY, Table, TableFormat, csv_pieces, jsonl_pieces, xlsx_pieces
from producer.jobs.errors import TooManyColumns
from producer.jobs.results import Result, Results

ZIP = "application/zip"
Pieces = Generator[bytes, None, None]
PIECES: dict[TableFormat, Callable[[Table, Iterable[Result]], Pieces]] = {
    TableFormat.CSV: csv_pieces,
    TableFormat.JSONL: jsonl_pieces,
    TableFormat.XLSX: xlsx_pieces,
}

router = APIRouter(prefix=f"{PREFIX}/batches", tags=["batches"])


class Download(StreamingResponse):
    """A file, streamed: what goes wrong before its first piece is answered as a problem.

    It is begun in a place of those that the services have; each further piece takes one for itself alone, so one who
    receives slowly holds none. Its source ends with it, at once when the one who asked goes away.
    """

    def __init__(self, here: Services, pieces: Pieces, file_name: str, media_type: str) -> None:
        headers = {"Content-Disposition": _attachment(file_name)}
        super().__init__(self._sent(next(pieces, None)), headers=headers, media_type=media_type)
        self._transfers = here.transfers
        self._pieces = pieces

    async def _sent(self, first: bytes | None) -> AsyncIterator[bytes]:
        piece = first
        while piece is not None:
            yield piece
            piece = await self._transfers.go_on(next, self._pieces, None)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await self._transfers.go_on(self._pieces.close)


def _a_file(*media_types: str) -> dict[int | str, dict[str, Any]]:
    content = {media_type: {"schema": {"type": "string", "format": "binary"}} for media_type in media_types}
    return {200: {"description": "A file.", "content": content}, **problems(404)}


@router.get(
    "/{batch_id}/results",
    response_class=StreamingResponse,
    responses=_a_file(*(format.media_type.partition(";")[0] for format in TableFormat)),
)
async def results(
    batch_id: UUID,
    request: Request,
    here: Here,
    format: Annotated[TableFormat, Query(description="A spreadsheet reads csv and xlsx.")] = TableFormat.CSV,
) -> Download:
    """What became of each row of the input, in its order and with its own columns first; refused rows too.

    Of a batch that is not finished, rows that are still to be drawn are there too: their ``state`` is ``queued`` or
    ``running``, and they have no ``url``, ``file`` or ``finished_at`` yet. Each row is as it was when it was read.

    A text that a spreadsheet would run as a formula has a quotation mark in front in csv, and is plain text in xlsx.
    """
    places = here.bulk if format is TableFormat.XLSX else here.transfers  # a workbook is made before its first piece
    return await places.begin(_table, batch_id, str(request.base_url), here, format)


def _table_pieces(batch_id: UUID, base_url: str, here: Services, format: TableFormat) -> Pieces:
    """Raises: TooManyColumns: not of lines."""
    found = Results(here.store)
    columns = found.columns(batch_id, called=IN_THE_WAY) if format is TableFormat.JSONL else found.columns(batch_id)
    return PIECES[format](Table(columns, base_url), found.of(batch_id))


def _table(batch_id: UUID, base_url: str, here: Services, format: TableFormat) -> Download:
    batch = here.store.batch(batch_id)
    pieces = _table_pieces(batch_id, base_url, here, format)
    return Download(here, pieces, f"{batch.name} results.{format.value}", format.media_type)


@router.get("/{batch_id}/images.zip", response_class=StreamingResponse, responses=_a_file(ZIP))
async def images(batch_id: UUID, request: Request, here: Here) -> Download:
    """All images of the batch that are there now, under their names, and ``results.csv``: as it is then, at the end.

    ``results.jsonl`` instead, if the input's rows have more columns between them than a table has.
    """
    return await here.transfers.begin(_images, batch_id, str(request.base_url), here)


def _images(batch_id: UUID, base_url: str, here: Services) -> Download:
    batch = here.store.batch(batch_id)
    format = TableFormat.CSV
    try:
        table = _table_pieces(batch_id, base_url, here, format)
    except TooManyColumns:
        format = TableFormat.JSONL
        table = _table_pieces(batch_id, base_url, here, format)
    jobs = Results(here.store).named_jobs(batch_id)
    pieces = zip_pieces(jobs, here.storage, f"results.{format.value}", table)
    return Download(here, pieces, f"{batch.name}.zip", ZIP)


def _attachment(file_name: str) -> str:
    """A browser saves it under this name, in every language (RFC 6266)."""
    plain = re.sub(r"[^A-Za-z0-9._ -]", "_", file_name)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(file_name, safe='')}"
