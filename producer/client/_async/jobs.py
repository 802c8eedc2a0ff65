"""Jobs: submit one, read, cancel, retry, and fetch its image."""

import hashlib
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any
from uuid import UUID

from producer.client._async.transport import AsyncTransport
from producer.client.bodies import Request, document, fields_of, given, id_of
from producer.client.errors import Corrupt
from producer.client.models import Batch, ClaimRecord, Job, Sort, State


class AsyncJobs(AsyncTransport):
    """The client's half that knows jobs."""

    async def submit(
        self,
        request: Request,
        *,
        tenant: str | None = None,
        key: str | None = None,
        deduplicate: bool = False,
        previews: int | None = None,
        **more: Any,
    ) -> Job:
        """Submit one job; ``more`` are further fields, as ``name`` and ``priority``.

        Args:
            tenant: whose job it is; None: the API key's own tenant.
            key: what the farm knows this submission by. With the key of an earlier call, and the same request, the
                answer is that call's job and nothing is submitted. None: a new one.
            deduplicate: if the very image was drawn already (same fields, seed and model), its job is the answer.
            previews: unfinished pictures on the way, up to 3: ``Job.preview_url`` is where the last one is, while the
                job is drawn, and ``stream`` tells each.

        Raises:
            Refused: fields are wrong, or the key came before with another request.
            ClientError
        """
        params = given(tenant=tenant, deduplicate="true" if deduplicate else None, previews=previews)
        return await self._asked(Job, "POST", "jobs", params=params, key=key, **document(fields_of(request) | more))

    async def job(self, job: Job | UUID | str) -> Job:
        """The job as it is now. Raises: NotFound, ClientError."""
        return await self._asked(Job, "GET", f"jobs/{id_of(job)}")

    def jobs(
        self,
        *,
        state: State | None = None,
        batch: Batch | UUID | str | None = None,
        tenant: str | None = None,
        error_code: str | None = None,
        submitted_after: datetime | None = None,
        submitted_before: datetime | None = None,
        prompt: str | None = None,
        sort: Sort | None = None,
        page: int = 500,
    ) -> AsyncIterator[Job]:
        """All jobs, the newest first, asked for page by page.

        Args:
            submitted_after: that moment is included. With a time zone, as ``submitted_before``.
            prompt: words, each of which begins a word of the prompt.
            sort: None: ``-created_at``.
            page: jobs a page, 1 to 1000.

        Raises:
            ClientError
        """
        params = given(
            state=state,
            batch=None if batch is None else id_of(batch),
            tenant=tenant,
            error_code=error_code,
            submitted_after=submitted_after.isoformat() if submitted_after else None,
            submitted_before=submitted_before.isoformat() if submitted_before else None,
            prompt=prompt,
            sort=sort,
            limit=page,
        )
        return self._pages(Job, "jobs", "jobs", "cursor", params)

    async def history(self, job: Job | UUID | str) -> list[ClaimRecord]:
        """The job's claims, first to last. Raises: NotFound, ClientError."""
        return await self._listed(ClaimRecord, "claims", f"jobs/{id_of(job)}/history")

    async def cancel(self, job: Job | UUID | str) -> Job:
        """Cancel a queued or running job. Raises: Refused if it has ended otherwise, NotFound, ClientError."""
        return await self._asked(Job, "POST", f"jobs/{id_of(job)}/cancel")

    async def retry(self, job: Job | UUID | str) -> Job:
        """Draw a failed or cancelled job again. Raises: Refused if it is neither, NotFound, ClientError."""
        return await self._asked(Job, "POST", f"jobs/{id_of(job)}/retry")

    async def download(self, job: Job | UUID | str) -> bytes:
        """The image file of a succeeded job, checked against its sha256.

        Raises:
            Refused: the job has no image; ``problem.state`` says where it is.
            Corrupt, NotFound, ClientError
        """
        known = job if isinstance(job, Job) and job.sha256 else await self.job(job)
        body = (await self._answer("GET", f"jobs/{known.id}/image")).content
        found = hashlib.sha256(body).hexdigest()
        if found != known.sha256:
            raise Corrupt(known.id, known.sha256, found)
        return body
