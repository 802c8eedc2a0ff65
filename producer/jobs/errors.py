"""Every error of the farm around the pipeline, classed by what the caller must do.

FarmError
├── SettingsError       a person must change a setting or start something: the message says which
│   ├── SchemaMismatch  the database's schema is behind or ahead of this code
│   ├── PortTaken       .port
│   └── AlreadyRunning  .pid holds the data folder
├── Unavailable         a dependency is away (.dependency): back off and ask again; nothing is lost
├── Overloaded          a limit of the tenant is reached: ask again after .retry_after_s
├── LostClaim           another worker owns the row: stop quietly, write nothing
├── NotFound            no such job, batch or image
├── BadCursor           a page is asked for by a cursor that this list never gave
├── KeyReused           the idempotency key (.key) came before with something else
├── KeyAtWork           what was asked with that key is not answered yet: ask again soon
├── MadeBefore          what is made with that key is there: look at it
├── Deleted             what was submitted with that key was deleted since
├── NotReady            the job has no image (yet): .state says why
├── WebhookDisabled     enable it first
├── TooManyWebhooks     delete one first
├── TooManyJobs         hand them in as several batches, or in several days
├── TooManyRejections   mend what makes so many lines wrong
├── TooManyColumns      no table holds as many: take JSON lines
└── IllegalTransition   .state cannot go there

The pipeline's own errors (``pipeline.errors``) are classed the same way; the table that maps every class to
its outcome is in ``worker.executor``.
"""

from pathlib import Path
from uuid import UUID


class FarmError(Exception):
    """Root of all errors of the farm around the pipeline."""


class SettingsError(FarmError):
    """A person must change a setting or start something; the message says what to do."""


class SchemaMismatch(SettingsError):
    """The database's schema is not the one that this code was written for."""


class PortTaken(SettingsError):
    """The port that a server should listen on is in use."""

    def __init__(self, host: str, port: int, setting: str) -> None:
        super().__init__(f"{host}:{port} is already in use: stop what listens there, or set {setting} to a free port")
        self.port = port


class AlreadyRunning(SettingsError):
    """Another process already runs the embedded servers of this data folder; ``pid`` is None if it is not known."""

    def __init__(self, data_dir: Path, pid: int | None) -> None:
        holder = "another process" if pid is None else f"process {pid}"
        super().__init__(
            f"{holder} already runs the farm in {data_dir}: stop it, or set OVIS_DATA_DIR to another folder"
        )
        self.data_dir = data_dir
        self.pid = pid


class Unavailable(FarmError):
    """A dependency does not answer. Try again later; nothing is lost meanwhile."""

    def __init__(self, dependency: str, message: str) -> None:
        super().__init__(f"{dependency}: {message}")
        self.dependency = dependency


class Overloaded(FarmError):
    """A limit of the tenant is reached, and nothing was done. ``retry_after_s``: whole seconds, when to ask again."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class LostClaim(FarmError):
    """The row is another worker's, or a person's: stop quietly and write nothing."""

    def __init__(self, job_id: UUID, claim: int) -> None:
        super().__init__(f"claim {claim} of job {job_id} no longer holds")
        self.job_id = job_id
        self.claim = claim


class NotFound(FarmError):
    """No such job, batch or image."""

    def __init__(self, kind: str, identifier: object) -> None:
        super().__init__(f"no {kind} {identifier}")
        self.kind = kind


class NotReady(FarmError):
    """The job has no image, or not yet."""

    def __init__(self, job_id: UUID, state: str) -> None:
        super().__init__(f"job {job_id} is {state}: only a succeeded job has an image")
        self.state = state


class BadCursor(FarmError):
    """The cursor is none that this list, in this order, ever gave."""

    def __init__(self) -> None:
        super().__init__("the cursor is none of this list: begin without one, or give the 'next' of the page before")


class KeyReused(FarmError):
    """An idempotency key stands for what was asked with it first: anything else needs another key."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the idempotency key {key!r} was used for something else: take a new key for a new request")
        self.key = key


class KeyAtWork(FarmError):
    """What was asked first with this idempotency key is still being done. Ask again: its answer is then yours."""

    def __init__(self, key: str) -> None:
        super().__init__(f"what was asked with the idempotency key {key!r} is still being done: ask again in a moment")
        self.key = key


class MadeBefore(FarmError):
    """What is to be made with an idempotency key is there already; what it holds in secret was told then, or never."""

    def __init__(self, kind: str, identifier: object) -> None:
        super().__init__(
            f"{kind} {identifier} was made with this idempotency key, and its secret is told nobody again: use it, "
            "or remove it and take a new idempotency key to make another"
        )


class Deleted(FarmError):
    """What was submitted with an idempotency key is there no more; nothing is submitted by asking again."""

    def __init__(self, key: str) -> None:
        super().__init__(
            f"what was submitted with the idempotency key {key!r} was deleted since: take a new key to submit it again"
        )


class WebhookDisabled(FarmError):
    """Nothing is sent to a webhook that is disabled: enable it first."""

    def __init__(self, webhook_id: UUID) -> None:
        super().__init__(f"webhook {webhook_id} is disabled: enable it first")


class TooManyWebhooks(FarmError):
    """The tenant has as many webhooks as it may have."""

    def __init__(self, most: int) -> None:
        super().__init__(f"there are {most} webhooks, and no more may be: delete one first")


class TooManyJobs(FarmError):
    """No batch holds as many jobs, or none of this tenant ever may: it is of no use to ask again."""

    def __init__(self, most: int, why: str = "a batch has no more: hand them in as several batches") -> None:
        super().__init__(f"there are more than {most:,} jobs, and {why}")


class TooManyRejections(FarmError):
    """So many lines of the input are wrong that it cannot be meant so."""

    def __init__(self, most: int) -> None:
        super().__init__(
            f"more than {most:,} lines are wrong, or they are too long to be kept: so many that something else must be:"
            " mend the file"
        )


class TooManyColumns(FarmError):
    """The lines of a batch's input have more columns between them than a table is made of."""

    def __init__(self, most: int) -> None:
        super().__init__(
            f"the rows have more than {most:,} different columns, and no csv or xlsx is made of as many: take jsonl"
        )


class IllegalTransition(FarmError):
    """The job's state allows no such step."""

    def __init__(self, job_id: UUID, state: str, wanted: str) -> None:
        super().__init__(f"job {job_id} is {state} and cannot become {wanted}")
        self.state = state
