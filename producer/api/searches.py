"""What may be asked of the lists of jobs and of batches, as it stands in the query."""

from enum import StrEnum
from typing import Annotated
from uuid import UUID

from pydantic import AfterValidator, AwareDatetime, BaseModel, Field, StringConstraints, model_validator

from producer.api.parameters import TenantName
from producer.jobs.contract import State
from producer.jobs.prompt_words import words_of
from producer.jobs.search import BatchFilter, JobFilter, Sort

PAGE_MAX = 1000
BATCHES_MAX = 100


def _searchable(words: str) -> str:
    if not words_of(words):
        raise ValueError("holds neither a letter nor a digit")
    return words


def _storable(words: str) -> str:
    if "\x00" in words:
        raise ValueError("holds a NUL")
    return words


Words = Annotated[str, StringConstraints(max_length=200), AfterValidator(_searchable)]
Text = Annotated[str, StringConstraints(min_length=1, max_length=200), AfterValidator(_storable)]
Cursor = Annotated[str, StringConstraints(max_length=300)]

NEXT = "'next' of the page before."


class JobQuery(BaseModel):
    """Which jobs, in which order, from where on."""

    state: State | None = None
    batch: UUID | None = None
    tenant: TenantName | None = None
    error_code: Text | None = Field(default=None, description="Of the last failure.")
    submitted_after: AwareDatetime | None = Field(default=None, description="That moment is included.")
    submitted_before: AwareDatetime | None = None
    prompt: Words | None = Field(default=None, description="Each of these words begins a word of the prompt.")
    sort: Sort = Field(default=Sort.NEWEST, description="A minus: the last one first.")
    cursor: Cursor | None = Field(default=None, description=NEXT)
    limit: int = Field(default=100, ge=1, le=PAGE_MAX, description="Jobs a page.")

    @model_validator(mode="after")
    def _in_order_of_submission(self) -> "JobQuery":
        if self.prompt is not None and self.sort.column != "created_at":
            raise ValueError("a text in the prompt is found in the order of submission alone: sort by created_at")
        return self

    @property
    def filter(self) -> JobFilter:
        return JobFilter(
            self.state,
            self.batch,
            self.tenant,
            self.error_code,
            self.submitted_after,
            self.submitted_before,
            self.prompt,
        )


class Completion(StrEnum):
    """Whether a batch still has something to do."""

    OPEN = "open"
    FINISHED = "finished"


class BatchQuery(BaseModel):
    """Which batches, from where on."""

    state: Completion | None = None
    tenant: TenantName | None = None
    name: Text | None = Field(default=None, description="A part of the batch's name.")
    cursor: Cursor | None = Field(default=None, description=NEXT)
    limit: int = Field(default=20, ge=1, le=BATCHES_MAX, description="Batches a page.")

    @property
    def filter(self) -> BatchFilter:
        finished = None if self.state is None else self.state is Completion.FINISHED
        return BatchFilter(finished, self.tenant, self.name)
