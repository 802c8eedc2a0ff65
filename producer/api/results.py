"""The paths of what came out of a batch: its table, and all of its images in one file. Both are streamed, in constant
memory; an error on the way breaks the connection off, so that half an answer is never taken for the whole."""

import re
from collections.abc import Callable, Generator, Iterable
from itertools import chain
from typing import Annotated, Any
from urllib.parse import quote
from uuid import UUID

import anyio
from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from producer.api.answers import PREFIX
from producer.api.archive import zip_pieces
from producer.api.documents import problems
from producer.api.services import Here
from producer.api.tables import Table, TableFormat, csv_pieces, jsonl_pieces, xlsx_pieces
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

    Its source ends with it, at once when the one who asked goes away.
    """

    def __init__(self, pieces: Pieces, file_name: str, media_type: str) -> None:
        headers = {"Content-Disposition": _attachment(file_name)}
        super().__init__(chain([next(pieces, b"")], pieces), headers=headers, media_type=media_type)
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await run_in_threadpool(self._pieces.close)


def _a_file(*media_types: str) -> dict[int | str, dict[str, Any]]:
    content = {media_type: {"schema": {"type": "string", "format": "binary"}} for media_type in media_types}
    return {200: {"description": "A file.", "content": content}, **problems(404, 422)}


@router.get(
    "/{batch_id}/results",
    response_class=StreamingResponse,
    responses=_a_file(*(format.media_type.partition(";")[0] for format in TableFormat)),
)
def results(
    batch_id: UUID,
    request: Request,
    here: Here,
    format: Annotated[TableFormat, Query(description="A spreadsheet reads csv and xlsx.")] = TableFormat.CSV,
) -> Download:
    """What became of each row of the input, in its order and with its own columns first; refused rows too.

    A text that a spreadsheet would run as a formula has a quotation mark in front in csv, and is plain text in xlsx.
    """
    batch = here.store.batch(batch_id)
    found = Results(here.store)
    table = Table(found.columns(batch_id), str(request.base_url))
    pieces = PIECES[format](table, found.of(batch_id))
    return Download(pieces, f"{batch.name} results.{format.value}", format.media_type)


@router.get("/{batch_id}/images.zip", response_class=StreamingResponse, responses=_a_file(ZIP))
def images(batch_id: UUID, request: Request, here: Here) -> Download:
    """All images of the batch that are there now, under their names, and ``results.csv``."""
    batch = here.store.batch(batch_id)
    found = Results(here.store)
    table = Table(found.columns(batch_id), str(request.base_url))
    pieces = zip_pieces(
        found.named_jobs(batch_id), here.storage, "results.csv", lambda: csv_pieces(table, found.of(batch_id))
    )
    return Download(pieces, f"{batch.name}.zip", ZIP)


def _attachment(file_name: str) -> str:
    """A browser saves it under this name, in every language (RFC 6266)."""
    plain = re.sub(r"[^A-Za-z0-9._ -]", "_", file_name)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(file_name, safe='')}"
