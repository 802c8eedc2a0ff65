"""The paths of jobs: submit one, read, cancel, and reach its image."""

from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Depends, Query, Request, Response
from starlette.responses import RedirectResponse

from producer.api.answers import PREFIX, ClaimRecord, FoundJobs, History, Job
from producer.api.bodies import JSON, parse, read_document, validated
from producer.api.documents import body_of, problems
from producer.api.parameters import Fingerprint, Key, Previews, Tenant
from producer.api.searches import PAGE_MAX, JobQuery
from producer.api.services import Here
from producer.jobs.contract import State, Submission
from producer.jobs.errors import NotFound, NotReady
from producer.jobs.search import Search

REFUSALS = (400, 409, 410, 413, 415)
"""Of a submission: 409 and 410 speak of its idempotency key."""

router = APIRouter(prefix=f"{PREFIX}/jobs", tags=["jobs"])

Limit = Annotated[int, Query(ge=1, le=PAGE_MAX, description="Jobs a page.")]


@router.post("", status_code=201, openapi_extra=body_of({JSON: "Submission"}), responses=problems(*REFUSALS))
def submit(
    request: Request,
    body: Annotated[bytes, Depends(read_document)],
    here: Here,
    response: Response,
    tenant: Tenant = None,
    deduplicate: Annotated[bool, Query(description="If the very image is there, its job is the answer.")] = False,
    previews: Previews = 0,
    key: Key = None,
) -> Job:
    """Submit one job. When this answers, the job cannot be lost.

    Asking again with the same ``Idempotency-Key`` is safe.
    """
    fingerprint = Fingerprint(request, deduplicate=deduplicate, previews=previews)
    fingerprint.add(body)
    job = here.store.submit(
        validated(Submission, parse(body)),
        max_failures=here.settings.max_failures,
        tenant=here.whose(tenant),
        key=fingerprint.with_key(key),
        deduplicate=deduplicate,
        previews=previews,
    )
    response.headers["Location"] = f"{PREFIX}/jobs/{job.id}"
    return Job.of(job)


@router.get("", responses=problems())
def jobs(here: Here, query: Annotated[JobQuery, Query()]) -> FoundJobs:
    """The jobs that are all of what is asked, a page at a time. A page is not moved by rows that come and go."""
    page = Search(here.database).jobs(query.filter, sort=query.sort, cursor=query.cursor, limit=query.limit)
    return FoundJobs(jobs=[Job.of(job) for job in page.found], next=page.next)


@router.get("/{job_id}", responses=problems(404))
def job(job_id: UUID, here: Here) -> Job:
    """One job."""
    return Job.of(here.store.job(job_id))


@router.post("/{job_id}/cancel", responses=problems(404, 409))
def cancel(job_id: UUID, here: Here) -> Job:
    """Cancel a queued or running job. Cancelling it twice is one cancel."""
    return Job.of(here.store.cancel(job_id))


@router.post("/{job_id}/retry", responses=problems(404, 409))
def retry(job_id: UUID, here: Here) -> Job:
    """Send a failed or cancelled job back to the queue, with the seed that it had. Twice is once."""
    return Job.of(here.store.retry_job(job_id))


@router.get("/{job_id}/history", responses=problems(404))
def history(job_id: UUID, here: Here) -> History:
    """The job's claims, first to last: when, where, how each ended."""
    claims = here.store.history(job_id) or _none_yet(job_id, here)
    return History(claims=[ClaimRecord(**claim) for claim in claims])


def _none_yet(job_id: UUID, here: Here) -> list[dict[str, Any]]:
    """Nothing, if the job exists. Raises: NotFound."""
    here.store.job(job_id)
    return []


@router.get(
    "/{job_id}/image",
    status_code=307,
    response_class=RedirectResponse,
    responses={307: {"description": "To the image in the bucket."}, **problems(404, 409)},
)
def image(job_id: UUID, here: Here) -> RedirectResponse:
    """The way to the image: a link that is valid for a while, without a key."""
    job = here.store.job(job_id)
    if job.state is not State.SUCCEEDED or job.object_key is None:
        raise NotReady(job_id, job.state)
    # A browser that keeps the redirect for half the link's life asks for each picture once, not at every refresh.
    kept = {"Cache-Control": f"private, max-age={here.settings.presign_s // 2}"}
    return RedirectResponse(here.storage.link(job.object_key, job.file_name), 307, kept)


@router.get(
    "/{job_id}/preview",
    status_code=307,
    response_class=RedirectResponse,
    responses={307: {"description": "To the preview in the bucket."}, **problems(404)},
)
def preview(job_id: UUID, here: Here) -> RedirectResponse:
    """The way to the job's last preview, while it is being drawn: a small JPEG of the unfinished image.

    There is one if the job was submitted with ``previews``, after some of its steps, and none from its end on.
    """
    job = here.store.job(job_id)
    if job.preview_key is None:
        raise NotFound("preview of job", job_id)
    link = here.storage.link(job.preview_key, f"{job_id}-preview.jpg")
    return RedirectResponse(link, 307, {"Cache-Control": "no-store"})
