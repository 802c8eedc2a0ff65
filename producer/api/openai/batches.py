"""``/v1/batches``: every batch of the farm, and new ones out of uploaded files."""

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from pipeline.request import Text
from producer.api.bodies import JSON, parse, read_document, spooled, validated
from producer.api.documents import body_of
from producer.api.errors import Fault, Invalid
from producer.api.openai.contents import Endpoint
from producer.api.openai.documents import errors
from producer.api.openai.errors import PREFIX, Ended, submitted
from producer.api.openai.files import batch_of, content_of, row_of
from producer.api.openai.identifiers import FileId, Part, batch_id, batch_name, called
from producer.api.openai.lines import Input, Refused
from producer.api.openai.progress import ENDED, Progress, Window, progress_of
from producer.api.parameters import Fingerprint, Key
from producer.api.services import Here, Services
from producer.jobs import contract
from producer.jobs.contract import SubmissionKey
from producer.jobs.models import Models

PAGE_MAX = 100
PAIRS_MAX = 16

MetadataKey = Annotated[Text, StringConstraints(max_length=64)]
MetadataValue = Annotated[Text, StringConstraints(max_length=512)]

BATCHES = f"{PREFIX}/batches"

router = APIRouter(prefix=BATCHES, tags=["openai"])


class BatchCreation(BaseModel):
    """``POST /v1/batches``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input_file_id: str
    endpoint: Endpoint
    completion_window: Window = Field(description="Means nothing: batches do not expire.")
    metadata: dict[MetadataKey, MetadataValue] | None = Field(default=None, max_length=PAIRS_MAX)


class ProgressList(BaseModel):
    """Some of them, the newest first, and whether there are more."""

    object: Literal["list"] = "list"
    data: list[Progress]
    first_id: str | None
    last_id: str | None
    has_more: bool


@router.post("", openapi_extra=body_of({JSON: "BatchCreation"}), responses=errors(404, 413))
async def create(
    request: Request, body: Annotated[bytes, Depends(read_document)], here: Here, key: Key = None
) -> Progress:
    """Make a batch of a file's lines. When this answers, the file was read and no job of it can be lost.

    A line that is no request, has another url, repeats a ``custom_id``, or names a model that the farm cannot promise
    (as of single images) fails the whole batch, with the number of each such line; nothing is drawn then. A request
    that cannot be drawn goes to the error file, alone.
    """
    asked = validated(BatchCreation, parse(body))
    source = FileId.read(asked.input_file_id)
    if source.part not in {None, Part.INPUT}:
        raise Invalid([Fault(field="input_file_id", message="is no input of a batch")])
    fingerprint = Fingerprint(request)
    fingerprint.add(body)
    made = await here.bulk.begin(_made, asked, source, here, fingerprint.with_key(key))
    with submitted(f"{BATCHES}/{batch_name(made.id)}"):
        (progress,) = await run_in_threadpool(progress_of, [made], here)
    return progress


def _made(asked: BatchCreation, source: FileId, here: Services, key: SubmissionKey | None) -> contract.Batch:
    name = row_of(source, here).name if source.part is None else batch_of(source, here).name
    tenant, file_id, metadata = here.whose(None), str(source), asked.metadata
    with spooled() as file:  # so that no transaction waits for the bucket
        for piece in content_of(source, here):
            file.write(piece)
        file.seek(0)
        lines = Input(file, [model.name for model in Models(here.database).all()])
        try:
            return here.store.submit_batch(
                name,
                lines.entries(),
                max_failures=here.settings.max_failures,
                tenant=tenant,
                key=key,
                file_id=file_id,
                metadata=metadata,
            )
        except Refused as refused:
            return here.store.refuse_batch(
                name, refused.faults, tenant=tenant, key=key, file_id=file_id, metadata=metadata
            )


@router.get("", responses=errors(404))
def all_batches(
    here: Here,
    after: Annotated[str | None, Query(description="The id of the last batch of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=PAGE_MAX)] = 20,
) -> ProgressList:
    """The newest first, whichever way they came in."""
    last = _found(after, here).id if after else None
    found = here.store.batches(limit + 1, after=last)
    data = progress_of(found[:limit], here)
    return ProgressList(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=len(found) > limit,
    )


@router.get("/{name}", responses=errors(404))
def one_batch(name: str, here: Here) -> Progress:
    """One batch."""
    (found,) = progress_of([_found(name, here)], here)
    return found


def _found(name: str, here: Services) -> contract.Batch:
    """Raises: NotFound."""
    with called("batch", name):
        return here.store.batch(batch_id(name))


@router.post("/{name}/cancel", responses=errors(404, 409))
def cancel(name: str, here: Here) -> Progress:
    """Cancel all of a batch that has not ended; what is drawn stays, and is in its output. Cancelling twice is one."""
    batch = _found(name, here)
    (before,) = progress_of([batch], here)
    if before.status in ENDED - {"cancelled"}:
        raise Ended(before.status)
    (after,) = progress_of([here.store.cancel_batch(batch.id)], here)
    return after
