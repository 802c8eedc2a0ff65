"""What the API answers with: the contract's own models, with what a caller needs to go on from there."""

from datetime import datetime
from uuid import UUID

from pydantic import BaseModel, Field, computed_field

from producer.jobs import contract
from producer.jobs.contract import Outcome, State

PREFIX = "/api/v1"


def image_path(job_id: UUID) -> str:
    """Where a job's image is asked for; a redirect leads to the bucket."""
    return f"{PREFIX}/jobs/{job_id}/image"


class Job(contract.Job):
    """A job, with the name of its file and the way to its image."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def file_name(self) -> str:
        """What the downloaded image is called."""
        return super().file_name

    @computed_field  # type: ignore[prop-decorator]
    @property
    def image_url(self) -> str | None:
        """A path on this server once the job has succeeded."""
        return image_path(self.id) if self.state is State.SUCCEEDED else None

    @classmethod
    def of(cls, job: contract.Job) -> "Job":
        return cls.model_construct(**vars(job))


class Batch(contract.Batch):
    """A batch, counted by state."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def finished(self) -> int:
        """Jobs that have succeeded, failed or been cancelled."""
        return super().finished

    @computed_field  # type: ignore[prop-decorator]
    @property
    def done(self) -> bool:
        """Whether nothing of it is queued or running any more."""
        return super().done

    @classmethod
    def from_contract(cls, batch: contract.Batch) -> "Batch":
        return cls.model_construct(**vars(batch))


class JobPage(BaseModel):
    """Some jobs, and where the next ones start."""

    jobs: list[Job]
    next: int | None = Field(
        description="To be given as 'before' (of all jobs) or 'after' (of a batch); null: the end."
    )


class BatchList(BaseModel):
    """The newest batches first."""

    batches: list[Batch]


class TenantList(BaseModel):
    """Tenants that were given a weight, by name; all others have 1."""

    tenants: list[contract.Tenant]


class ClaimRecord(BaseModel):
    """One worker's taking of a job: when, where, and how it ended."""

    claim: int
    worker_id: UUID
    host: str | None
    device: str | None
    claimed_at: datetime
    ended_at: datetime | None
    outcome: Outcome | None
    error: str | None


class History(BaseModel):
    """A job's claims, first to last."""

    claims: list[ClaimRecord]
