"""The paths of batches: submit many jobs at once, all or none, and read them back in order."""

from collections.abc import Callable
from functools import partial
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import TypeAdapter, ValidationError

from producer.api.answers import PREFIX, Batch, BatchList, Job, JobPage
from producer.api.bodies import (
    BATCH_MAX_BYTES,
    JSON,
    NDJSON,
    BatchName,
    media_type,
    parse_batch,
    read,
    spool,
    spooled,
    submissions,
)
from producer.api.documents import body_of, problems
from producer.api.errors import Fault, Invalid
from producer.api.jobs import Limit
from producer.api.parameters import Fingerprint, Key, Tenant, Weight
from producer.api.problems import faults_of
from producer.api.services import Here
from producer.jobs import contract
from producer.jobs.contract import DEFAULT_TENANT, State

POSITION_MAX = 2**31 - 1

router = APIRouter(prefix=f"{PREFIX}/batches", tags=["batches"])


@router.post(
    "",
    status_code=201,
    openapi_extra=body_of({JSON: "BatchSubmission", NDJSON: "Submission"}),
    responses=problems(400, 413, 415, 422),
)
async def submit(
    request: Request,
    here: Here,
    response: Response,
    name: Annotated[str | None, Query(description="Of the batch; for application/x-ndjson alone.")] = None,
    tenant: Tenant = DEFAULT_TENANT,
    weight: Weight = 1.0,
    key: Key = None,
) -> Batch:
    """Submit a batch: all of its jobs, or none.

    ``application/json`` holds the name and up to 10,000 jobs. ``application/x-ndjson`` holds one job a line, as many
    as there are, and is never held in memory; its name stands in the query.

    When this answers, no job of it can be lost. Asking again with the same ``Idempotency-Key`` is safe.
    """
    fingerprint = Fingerprint(request, name=name, weight=weight)
    hand_in = partial(here.store.submit_batch, max_failures=here.settings.max_failures, tenant=tenant, weight=weight)
    if media_type(request, JSON, NDJSON) == JSON:
        body = await read(request, BATCH_MAX_BYTES)
        fingerprint.add(body)
        batch = await run_in_threadpool(_submit_document, hand_in, body, fingerprint.with_key(key))
    else:
        title = _checked_name(name)
        with spooled() as file:
            await spool(request, file, fingerprint.add)
            batch = await run_in_threadpool(hand_in, title, submissions(file), key=fingerprint.with_key(key))
    response.headers["Location"] = f"{PREFIX}/batches/{batch.id}"
    return Batch.from_contract(batch)


def _submit_document(
    hand_in: Callable[..., contract.Batch], body: bytes, key: contract.SubmissionKey | None
) -> contract.Batch:
    document = parse_batch(body)
    return hand_in(document.name, document.jobs, key=key)


def _checked_name(name: str | None) -> str:
    """Raises: Invalid."""
    if name is None:
        raise Invalid([Fault(field="name", message=f"is missing: {NDJSON} needs ?name=")])
    try:
        return TypeAdapter(BatchName).validate_python(name)
    except ValidationError as error:
        faults = faults_of(error.errors())
        raise Invalid([fault.model_copy(update={"field": "name"}) for fault in faults]) from None


@router.get("", responses=problems(422))
def batches(here: Here, limit: Annotated[int, Query(ge=1, le=100)] = 20) -> BatchList:
    """The newest batches first."""
    return BatchList(batches=[Batch.from_contract(batch) for batch in here.store.batches(limit)])


@router.get("/{batch_id}", responses=problems(404, 422))
def batch(batch_id: UUID, here: Here) -> Batch:
    """One batch, counted by state."""
    return Batch.from_contract(here.store.batch(batch_id))


@router.post("/{batch_id}/cancel", responses=problems(404, 422))
def cancel(batch_id: UUID, here: Here) -> Batch:
    """Cancel all of a batch that has not ended yet; images that are there stay."""
    return Batch.from_contract(here.store.cancel_batch(batch_id))


@router.get("/{batch_id}/jobs", responses=problems(404, 422))
def batch_jobs(
    batch_id: UUID,
    here: Here,
    after: Annotated[int, Query(ge=-1, le=POSITION_MAX, description="'next' of the page before.")] = -1,
    limit: Limit = 1000,
    state: State | None = None,
) -> JobPage:
    """The batch's jobs in the order of submission."""
    found = here.store.batch_jobs(batch_id, after=after, limit=limit, state=state)
    return JobPage(jobs=[Job.of(job) for job in found], next=found[-1].position if len(found) == limit else None)
