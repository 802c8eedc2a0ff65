"""``/v1/files``: inputs of batches that are uploaded, and what batches make of their rows when it is read."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Literal
from unicodedata import category
from uuid import uuid4

from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.responses import Response

from producer.api.bodies import chunks, media_type
from producer.api.errors import Fault, Invalid, Malformed, TooLarge
from producer.api.openai.contents import Content
from producer.api.openai.documents import UPLOAD, errors
from producer.api.openai.identifiers import FileId, Part, batch_name, called
from producer.api.openai.pictures import Pictures, Sizes
from producer.api.openai.progress import progress_of
from producer.api.problems import printable
from producer.api.results import Download, Pieces
from producer.api.services import Here, Services
from producer.jobs import files
from producer.jobs.contract import Batch
from producer.jobs.errors import NotFound
from producer.jobs.files import Files, file_key

FILE_MAX_BYTES = 200 * 1024 * 1024
OVERHEAD_BYTES = 100_000
"""Of the form around the file."""
FIELD_MAX_BYTES = 10_000
NAME_MAX = 200
PAGE_MAX = 10_000
PURPOSE = "batch"
JSONL = "application/jsonl"
FORM = "multipart/form-data"

router = APIRouter(prefix="/v1/files", tags=["openai"])


class FileObject(BaseModel):
    """A file. None of them ever expires: one that was uploaded stays until it is deleted."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"] = "processed"

    @classmethod
    def of(cls, file: files.File) -> "FileObject":
        return cls(
            id=str(FileId(file.id)),
            bytes=file.size_bytes,
            created_at=int(file.created_at.timestamp()),
            filename=file.name,
            purpose="batch",
        )


class FileObjects(BaseModel):
    """Some of them, and whether there are more."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(BaseModel):
    """It is gone."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


@router.post("", openapi_extra=UPLOAD, responses=errors(413))
async def upload(request: Request, here: Here) -> FileObject:
    """Upload the input of a batch: JSONL, 200 MB at most. What its lines hold is looked at when the batch is made."""
    tenant = here.whose(None)
    async with _form(request) as form:
        file, size_bytes = _checked(form)
        return await here.transfers.begin(_stored, file, size_bytes, tenant, here)


def _stored(file: UploadFile, size_bytes: int, tenant: str, here: Services) -> FileObject:
    """Raises: Unavailable."""
    known, file_id = Files(here.database), uuid4()
    note = known.expect(file_id, tenant=tenant)
    here.storage.put_file(file_key(tenant, file_id), file.file, JSONL)
    stored = known.add(
        file_id,
        note=note,
        within_s=here.settings.durations.sweep_s / 2,
        tenant=tenant,
        name=_plain(file.filename),
        purpose=PURPOSE,
        size_bytes=size_bytes,
    )
    return FileObject.of(stored)


@asynccontextmanager
async def _form(request: Request) -> AsyncIterator[FormData]:
    """The form, its file on disk. Raises: Malformed, WrongMediaType, TooLarge: as soon as that is known."""
    media_type(request, FORM)
    body = chunks(request, FILE_MAX_BYTES + OVERHEAD_BYTES)
    parser = _Parser(request.headers, body, max_files=1, max_fields=10, max_part_size=FIELD_MAX_BYTES)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise Malformed(f"no form that can be read: {error.message}") from None
    except TooLarge:
        raise _too_large() from None
    try:
        yield form
    finally:
        parser.close()


class _Parser(MultiPartParser):
    def close(self) -> None:
        """Files too that the form does not hold, since it broke off in their midst."""
        for file in self._files_to_close_on_error:
            file.close()


def _checked(form: FormData) -> tuple[UploadFile, int]:
    """The file and its size in bytes. Raises: Invalid, TooLarge."""
    for name in form:
        if name not in {"file", "purpose"}:
            raise _invalid(printable(name), "is not known here: files stay until they are deleted")
    if form.get("purpose") != PURPOSE:
        raise _invalid("purpose", f"must be {PURPOSE!r}: files are the inputs of batches here")
    file = form.get("file")
    if not isinstance(file, UploadFile):
        raise _invalid("file", "is missing")
    if not file.size:
        raise _invalid("file", "is empty")
    if file.size > FILE_MAX_BYTES:
        raise _too_large()
    return file, file.size


def _too_large() -> TooLarge:
    return TooLarge(f"the file is larger than {FILE_MAX_BYTES:,} bytes: cut it in several, each for a batch of its own")


def _invalid(field: str, message: str) -> Invalid:
    return Invalid([Fault(field=field, message=message)])


def _plain(name: str | None) -> str:
    """A name that can be shown, and kept: without control characters."""
    plain = "".join("_" if category(character) in {"Cc", "Cs", "Zl", "Zp"} else character for character in name or "")
    return plain[:NAME_MAX] if plain.strip() else "input.jsonl"


@router.get("", responses=errors(404))
def uploaded(
    here: Here,
    purpose: Annotated[str | None, Query(pattern=r"^[a-z_-]{1,100}$")] = None,
    after: Annotated[str | None, Query(description="The id of the last file of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=PAGE_MAX)] = PAGE_MAX,
    order: Literal["asc", "desc"] = "desc",
) -> FileObjects:
    """Uploaded files. Outputs and errors are named by their batches, and in no list: ``purpose=batch_output`` finds
    none, since how long such a file is can only be found by writing it."""
    last = FileId.read(after).id if after else None
    with called("file", after):
        found = Files(here.database).page(limit=limit + 1, after=last, purpose=purpose, oldest_first=order == "asc")
    data = [FileObject.of(file) for file in found[:limit]]
    return FileObjects(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=len(found) > limit,
    )


@router.get("/{file_id}", responses=errors(404))
async def file(file_id: str, here: Here) -> FileObject:
    """One file. How long one is that a batch makes of its rows is found by writing it."""
    found = FileId.read(file_id)
    if found.part is None:
        return FileObject.of(await run_in_threadpool(row_of, found, here))
    return await here.bulk.begin(_written, found, found.part, here)


def _written(file_id: FileId, part: Part, here: Services) -> FileObject:
    batch = batch_of(file_id, here)
    sizes = Sizes(here.storage)
    written_bytes = sum(map(len, Content(batch, here.store, sizes).of(part)))
    ended = batch.finished_at if part is not Part.INPUT else None
    return FileObject(
        id=str(file_id),
        bytes=written_bytes + sizes.left_out_bytes,
        created_at=int((ended or batch.created_at).timestamp()),
        filename=f"{batch_name(batch.id)}_{part}.jsonl",
        purpose="batch" if part is Part.INPUT else "batch_output",
    )


@router.get("/{file_id}/content", responses={200: {"content": {JSONL: {}}}, **errors(404)})
async def content(file_id: str, here: Here) -> Response:
    """What stands in the file. Links to images are valid for a while from now on; reading it again gives new ones."""
    found = FileId.read(file_id)
    return await here.transfers.begin(_download, found, here)


def _download(file_id: FileId, here: Services) -> Download:
    return Download(here, content_of(file_id, here), f"{file_id}.jsonl", JSONL)


def content_of(file_id: FileId, here: Services) -> Pieces:
    """The file in pieces. Raises: NotFound, at once; Unavailable, in its midst too."""
    if file_id.part is None:
        return (piece for piece in here.storage.pieces(row_of(file_id, here).object_key))
    return Content(batch_of(file_id, here), here.store, Pictures(here.storage)).of(file_id.part)


def row_of(file_id: FileId, here: Services) -> files.File:
    """An uploaded file's row. Raises: NotFound."""
    with called("file", file_id):
        return Files(here.database).file(file_id.id)


def batch_of(file_id: FileId, here: Services) -> Batch:
    """The batch whose part the file is. Raises: NotFound: there is none, or that part is not there (yet)."""
    with called("file", file_id):
        batch = here.store.batch(file_id.id)
    (progress,) = progress_of([batch], here)
    if str(file_id) not in {progress.input_file_id, progress.output_file_id, progress.error_file_id}:
        raise NotFound("file", file_id)
    return batch


@router.delete("/{file_id}", responses=errors(404))
def delete(file_id: str, here: Here) -> FileDeleted:
    """Delete an uploaded file; batches that were read from it lose nothing."""
    found = FileId.read(file_id)
    if found.part is not None:
        batch_of(found, here)
        raise _invalid("file_id", "is a part of its batch: DELETE /api/v1/batches/{id} deletes it all")
    with called("file", file_id):
        Files(here.database).delete(found.id)
    return FileDeleted(id=file_id)
