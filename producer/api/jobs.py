"""The paths of jobs: submit one, read, cancel, and reach its image."""

from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Depends, Query, Request, Response
from starlette.responses import RedirectResponse

from producer.api.answers import PREFIX, ClaimRecord, History, Job, JobPage
from producer.api.bodies import JSON, parse, read_document, validated
from producer.api.documents import body_of, problems
from producer.api.parameters import Fingerprint, Key, Tenant
from producer.api.services import Here
from producer.jobs.contract import DEFAULT_TENANT, State, Submission
from producer.jobs.errors import NotReady

PAGE_MAX = 1000
SEQ_MAX = 2**63 - 1

router = APIRouter(prefix=f"{PREFIX}/jobs", tags=["jobs"])

Limit = Annotated[int, Query(ge=1, le=PAGE_MAX, description="Jobs a page.")]


@router.post("", status_code=201, openapi_extra=body_of({JSON: "Submission"}), responses=problems(400, 413, 415, 422))
def submit(
    request: Request,
    body: Annotated[bytes, Depends(read_document)],
    here: Here,
    response: Response,
    tenant: Tenant = DEFAULT_TENANT,
    key: Key = None,
) -> Job:
    """Submit one job. When this answers, the job cannot be lost.

    Asking again with the same ``Idempotency-Key`` is safe.
    """
    fingerprint = Fingerprint(request)
    fingerprint.add(body)
    job = here.store.submit(
        validated(Submission, parse(body)),
        max_failures=here.settings.max_failures,
        tenant=tenant,
        key=fingerprint.with_key(key),
    )
    response.headers["Location"] = f"{PREFIX}/jobs/{job.id}"
    return Job.of(job)


@router.get("", responses=problems(422))
def jobs(
    here: Here,
    state: State | None = None,
    limit: Limit = 100,
    before: Annotated[int | None, Query(ge=0, le=SEQ_MAX, description="'next' of the page before.")] = None,
) -> JobPage:
    """All jobs, the newest first."""
    found, following = here.store.jobs(state=state, limit=limit, before=before)
    return JobPage(jobs=[Job.of(job) for job in found], next=following)


@router.get("/{job_id}", responses=problems(404, 422))
def job(job_id: UUID, here: Here) -> Job:
    """One job."""
    return Job.of(here.store.job(job_id))


@router.post("/{job_id}/cancel", responses=problems(404, 409, 422))
def cancel(job_id: UUID, here: Here) -> Job:
    """Cancel a queued or running job. Cancelling it twice is one cancel."""
    return Job.of(here.store.cancel(job_id))


@router.get("/{job_id}/history", responses=problems(404, 422))
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
    responses={307: {"description": "To the image in the bucket."}, **problems(404, 409, 422)},
)
def image(job_id: UUID, here: Here) -> RedirectResponse:
    """The way to the image: a link that is valid for a while, without a key."""
    job = here.store.job(job_id)
    if job.state is not State.SUCCEEDED or job.object_key is None:
        raise NotReady(job_id, job.state)
    # A browser that keeps the redirect for half the link's life asks for each picture once, not at every refresh.
    kept = {"Cache-Control": f"private, max-age={here.settings.presign_s // 2}"}
    return RedirectResponse(here.storage.link(job.object_key, job.file_name), 307, kept)
