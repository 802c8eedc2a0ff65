"""The paths of batches: submit many jobs at once, all or none, and read them back in order."""

from collections.abc import Callable
from functools import partial
from typing import IO, Annotated, Literal
from uuid import UUID

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import TypeAdapter, ValidationError

from producer.api.answers import PREFIX, Batch, FoundBatches, Job, JobPage, RejectionPage
from producer.api.bodies import (
    BATCH_MAX_BYTES,
    JSON,
    BatchName,
    BatchPriority,
    media_type,
    parse,
    parse_batch,
    read_document,
    spool,
    spooled,
    validated,
)
from producer.api.documents import body_of, problems
from producer.api.errors import Fault, Invalid
from producer.api.jobs import REFUSALS, Limit
from producer.api.manifests import KINDS, Options, entries_of, spool_manifest
from producer.api.parameters import Fingerprint, Key, Previews, Tenant, Weight
from producer.api.problems import faults_of
from producer.api.searches import BatchQuery
from producer.api.services import Here
from producer.jobs import contract
from producer.jobs.contract import State
from producer.jobs.search import Search
from producer.manifest import Reading

POSITION_MAX = 2**31 - 1
SMALL_BYTES = 50_000
"""A document of up to as many holds no more jobs than a moment's work, and need not wait for a place."""

router = APIRouter(prefix=f"{PREFIX}/batches", tags=["batches"])


@router.post(
    "",
    status_code=201,
    openapi_extra=body_of({JSON: "BatchSubmission", **dict.fromkeys(KINDS, "Submission")}),
    responses=problems(*REFUSALS),
)
async def submit(
    request: Request,
    here: Here,
    response: Response,
    options: Options,
    name: Annotated[str | None, Query(description="Of the batch; a JSON body holds it itself.")] = None,
    tenant: Tenant = None,
    weight: Weight = 1.0,
    deduplicate: Annotated[bool, Query(description="Draw nothing again that the tenant has drawn already.")] = False,
    previews: Previews = 0,
    key: Key = None,
) -> Batch:
    """Submit a batch: all of its jobs, or none; with ``partial`` the good rows of a manifest.

    ``application/json`` holds the name and up to 10,000 jobs. A manifest has a row a job, up to 1,000,000 jobs, and is
    never held in memory: ``application/x-ndjson``, ``text/csv``, or XLSX of up to 64 MB. Its name stands in the query.

    When this answers, no job of it can be lost. Asking again with the same ``Idempotency-Key`` is safe. While as many
    large batches are taken in as this server does at once, further ones wait for up to a minute, and then are answered
    503 with ``Retry-After``.
    """
    asked = {"name": name, "weight": weight, "deduplicate": deduplicate, "previews": previews}
    fingerprint = Fingerprint(request, **asked, **options.model_dump())
    hand_in = partial(
        here.store.submit_batch,
        max_failures=here.settings.max_failures,
        tenant=here.whose(tenant),
        weight=weight,
        deduplicate=deduplicate,
        previews=previews,
    )
    if media_type(request, JSON, *KINDS) == JSON:
        if not options.plain:
            raise Invalid([Fault(field="", message=f"templates and the like are for {', '.join(KINDS)}")])
        with spooled() as file:
            size_bytes = await spool(request, file, fingerprint.add, BATCH_MAX_BYTES)
            run = run_in_threadpool if size_bytes <= SMALL_BYTES else here.bulk.begin
            batch = await run(_submit_document, hand_in, file, fingerprint.with_key(key))
    else:
        title, recipe = _checked_name(name), await run_in_threadpool(options.recipe)
        with spooled() as file:
            kind = await spool_manifest(request, file, fingerprint.add)
            entries = entries_of(Reading(file, kind, recipe), partial=options.partial)
            batch = await here.bulk.begin(hand_in, title, entries, key=fingerprint.with_key(key))
    response.headers["Location"] = f"{PREFIX}/batches/{batch.id}"
    return Batch.from_contract(batch)


def _submit_document(
    hand_in: Callable[..., contract.Batch], file: IO[bytes], key: contract.SubmissionKey | None
) -> contract.Batch:
    """In memory only here, where few are at a time."""
    document = parse_batch(file.read())
    return hand_in(document.name, document.jobs, key=key)


def _checked_name(name: str | None) -> str:
    """Raises: Invalid."""
    if name is None:
        raise Invalid([Fault(field="name", message="is missing: a manifest needs ?name=")])
    try:
        return TypeAdapter(BatchName).validate_python(name)
    except ValidationError as error:
        faults = faults_of(error.errors())
        raise Invalid([fault.model_copy(update={"field": "name"}) for fault in faults]) from None


@router.get("", responses=problems())
def batches(here: Here, query: Annotated[BatchQuery, Query()]) -> FoundBatches:
    """The batches that are all of what is asked, the newest first, a page at a time."""
    page = Search(here.database).batches(query.filter, cursor=query.cursor, limit=query.limit)
    return FoundBatches(batches=[Batch.from_contract(batch) for batch in page.found], next=page.next)


@router.get("/{batch_id}", responses=problems(404))
def batch(batch_id: UUID, here: Here) -> Batch:
    """One batch, counted by state."""
    return Batch.from_contract(here.store.batch(batch_id))


@router.post("/{batch_id}/cancel", responses=problems(404))
def cancel(batch_id: UUID, here: Here) -> Batch:
    """Cancel all of a batch that has not ended yet; images that are there stay."""
    return Batch.from_contract(here.store.cancel_batch(batch_id))


@router.post("/{batch_id}/pause", responses=problems(404))
def pause(batch_id: UUID, here: Here) -> Batch:
    """Begin no more of the batch until it is resumed; what is being drawn is drawn."""
    return Batch.from_contract(here.store.pause_batch(batch_id, paused=True))


@router.post("/{batch_id}/resume", responses=problems(404))
def resume(batch_id: UUID, here: Here) -> Batch:
    """Go on with a paused batch."""
    return Batch.from_contract(here.store.pause_batch(batch_id, paused=False))


@router.post("/{batch_id}/retry", responses=problems(404))
def retry(
    batch_id: UUID,
    here: Here,
    state: Annotated[
        list[Literal["failed", "cancelled"]] | None, Query(description="Which jobs; default: the failed ones.")
    ] = None,
) -> Batch:
    """Send the jobs that ended so back to the queue, each with the seed that it had. What succeeded stays."""
    return Batch.from_contract(here.store.retry_batch(batch_id, map(State, state or ["failed"])))


@router.put(
    "/{batch_id}/priority",
    openapi_extra=body_of({JSON: "BatchPriority"}),
    responses=problems(400, 404, 413, 415),
)
def prioritise(batch_id: UUID, body: Annotated[bytes, Depends(read_document)], here: Here) -> Batch:
    """Give all of the batch that has not ended another priority."""
    return Batch.from_contract(here.store.prioritise_batch(batch_id, validated(BatchPriority, parse(body)).priority))


@router.delete("/{batch_id}", status_code=204, responses=problems(404))
def delete(batch_id: UUID, here: Here) -> None:
    """Delete the batch with all of its jobs, at once; its images leave the bucket some time later."""
    here.store.delete_batch(batch_id)


@router.get("/{batch_id}/rejections", responses=problems(404))
def rejections(
    batch_id: UUID,
    here: Here,
    after: Annotated[int, Query(ge=0, le=POSITION_MAX, description="'next' of the page before.")] = 0,
    limit: Limit = 1000,
) -> RejectionPage:
    """The lines of the batch's input that became no job, in their order, with what is wrong with each."""
    here.store.batch(batch_id)  # or it is not found
    found, more = here.store.rejection_page(batch_id, after=after, limit=limit)
    return RejectionPage(rejections=found, next=found[-1].line if more else None)


@router.get("/{batch_id}/jobs", responses=problems(404))
def batch_jobs(
    batch_id: UUID,
    here: Here,
    after: Annotated[int, Query(ge=-1, le=POSITION_MAX, description="'next' of the page before.")] = -1,
    limit: Limit = 1000,
    state: State | None = None,
) -> JobPage:
    """The batch's jobs in the order of submission."""
    found, more = here.store.batch_page(batch_id, after=after, limit=limit, state=state)
    return JobPage(jobs=[Job.of(job) for job in found], next=found[-1].position if more else None)
