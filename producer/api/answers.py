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


def preview_path(job_id: UUID) -> str:
    """Where the last preview of a job is asked for; a redirect leads to the bucket."""
    return f"{PREFIX}/jobs/{job_id}/preview"


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

    @computed_field  # type: ignore[prop-decorator]
    @property
    def preview_url(self) -> str | None:
        """A path on this server while the job is being drawn and was shown."""
        return preview_path(self.id) if self.preview_key is not None else None

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
    """Some jobs of a batch, and where the next ones start."""

    jobs: list[Job]
    next: int | None = Field(description="To be given as 'after'; null: the end.")


class RejectionPage(BaseModel):
    """Lines of a batch's input that became no job, and where the next ones start."""

    rejections: list[contract.Rejection]
    next: int | None = Field(description="To be given as 'after'; null: the end.")


class FoundJobs(BaseModel):
    """Jobs that were asked for, and where the next ones start."""

    jobs: list[Job] = Field(description="Fewer than asked for, or none, though there may be more.")
    next: str | None = Field(description="To be given as 'cursor', with all else as before; null: the end.")


class FoundBatches(BaseModel):
    """Batches that were asked for, and where the next ones start."""

    batches: list[Batch]
    next: str | None = Field(description="To be given as 'cursor', with all else as before; null: the end.")


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
