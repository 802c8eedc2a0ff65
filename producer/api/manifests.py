"""The paths around manifests: how a spreadsheet is read, what it would become, what that costs, sizes by name.

``ManifestOptions`` and ``recipe`` are what the submission of a batch and its preview have in common, so that a preview
shows what a submission does.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Annotated

from fastapi import APIRouter, Depends, Query, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, Field

from producer.api.answers import PREFIX
from producer.api.bodies import LINES_MAX_BYTES, NDJSON, media_type, spool, spooled
from producer.api.documents import body_of, problems
from producer.api.errors import Fault, Invalid
from producer.api.parameters import Tenant, Weight
from producer.api.problems import printable
from producer.api.services import Here, Services
from producer.jobs.contract import Entry, Priority, Rejection, Submission
from producer.jobs.errors import TooManyJobs
from producer.jobs.estimate import Estimate, estimate
from producer.jobs.store.inserting import JOBS_MAX
from producer.manifest import ManifestError, ManifestKind, Problem, Reading, Recipe, size_sets

CSV = "text/csv"
XLSX = "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet"
KINDS = {NDJSON: ManifestKind.JSONL, CSV: ManifestKind.CSV, XLSX: ManifestKind.XLSX}
XLSX_MAX_BYTES = 64_000_000
SHOWN_ROWS = 20
OPTIONS_MAX = 100
WORK_MAX = 1e15
TEMPLATE_MAX_CHARACTERS = 8_000

router = APIRouter(prefix=PREFIX, tags=["batches"])

Words = Annotated[list[str], Field(max_length=OPTIONS_MAX)]


class ManifestOptions(BaseModel):
    """How the rows of a manifest become jobs."""

    template: str | None
    file_name: str | None
    vary: list[str]
    default: list[str]
    partial: bool

    @property
    def plain(self) -> bool:
        """Whether none is given."""
        return self == ManifestOptions(template=None, file_name=None, vary=[], default=[], partial=False)

    def recipe(self) -> Recipe:
        """Raises: Invalid."""
        with telling_faults():
            return Recipe(template=self.template, file_name=self.file_name, vary=self.vary, defaults=self.default)


def _options(
    template: Annotated[
        str | None,
        Query(
            max_length=TEMPLATE_MAX_CHARACTERS,
            description="Makes the prompt from columns: 'A {style} banner for {product}'.",
        ),
    ] = None,
    vary: Annotated[
        Words | None,
        Query(description="'field=a,b', 'seed=1..4', 'size=leaderboard,1024x1024': every row once for each."),
    ] = None,
    file_name: Annotated[
        str | None,
        Query(max_length=TEMPLATE_MAX_CHARACTERS, description="Names outputs from columns: '{sku}_{size}.png'."),
    ] = None,
    default: Annotated[Words | None, Query(description="'field=value' for what rows leave empty.")] = None,
    partial: Annotated[bool, Query(description="Submit the good rows though others are bad.")] = False,
) -> ManifestOptions:
    return ManifestOptions(
        template=template, file_name=file_name, vary=vary or [], default=default or [], partial=partial
    )


Options = Annotated[ManifestOptions, Depends(_options)]


@dataclass(frozen=True)
class Turn:
    """By what a batch gets its turn among others."""

    tenant: str
    weight: float = 1.0


def _turn(
    here: Here,
    name: Annotated[str | None, Query(description="Means nothing here.")] = None,
    tenant: Tenant = None,
    weight: Weight = 1.0,
    deduplicate: Annotated[bool, Query(description="Means nothing here.")] = False,
    previews: Annotated[int, Query(description="Means nothing here.")] = 0,
) -> Turn:
    """What else a submission takes: a preview may be asked with the very same query."""
    return Turn(here.whose(tenant), weight)


async def spool_manifest(
    request: Request, file: IO[bytes], seen: Callable[[bytes], None] = lambda piece: None
) -> ManifestKind:
    """Write a body that is a manifest to ``file``. Raises: WrongMediaType, TooLarge."""
    kind = KINDS[media_type(request, *KINDS)]
    await spool(request, file, seen, XLSX_MAX_BYTES if kind is ManifestKind.XLSX else LINES_MAX_BYTES)
    return kind


def entries_of(reading: Reading, *, partial: bool) -> Iterator[Entry | Rejection]:
    """Every job of it. Raises: Invalid."""
    with telling_faults():
        yield from reading.entries(partial=partial)


@contextmanager
def telling_faults() -> Iterator[None]:
    """What is wrong with a manifest as faults. Raises: Invalid."""
    try:
        yield
    except ManifestError as error:
        raise Invalid(_faults(error.problems), error.count) from None


def _faults(found: list[Problem]) -> list[Fault]:
    return [
        Fault(line=problem.line or None, field=printable(problem.column or ""), message=printable(problem.message))
        for problem in found
    ]


class PreviewRow(Submission):
    """A job as it would be submitted."""

    line: int = Field(description="Of the manifest, from 1, the header included.")


class Preview(BaseModel):
    """What a manifest would become."""

    rows: list[PreviewRow] = Field(description="The first of its jobs.")
    jobs: int
    rejected: int = Field(description="Rows that are bad. Without 'partial' none is submitted while there are any.")
    problems: list[Fault] = Field(description="What is wrong with them: the first ones.")
    problem_count: int
    carried: list[str] = Field(description="Columns that nothing uses and that come along into the results.")
    separator: str | None = Field(description="What separates the cells of a CSV file, by its first row.")
    short_rows: int = Field(
        description="Good rows of a CSV file that end before the header: the rest is taken as empty."
    )
    work: float = Field(description="Of all jobs, in megapixel-steps.")
    estimate: Estimate


@router.post(
    "/manifests/preview",
    openapi_extra=body_of({NDJSON: "Submission", CSV: "Submission", XLSX: "Submission"}),
    responses=problems(400, 413, 415),
)
async def preview(request: Request, here: Here, options: Options, turn: Annotated[Turn, Depends(_turn)]) -> Preview:
    """What a manifest would become: its first jobs, how many, what is wrong, what it costs. Submits nothing."""
    recipe = await run_in_threadpool(options.recipe)
    with spooled() as file:
        kind = await spool_manifest(request, file)
        return await here.bulk.begin(_previewed, _services(request), turn, Reading(file, kind, recipe))


def _previewed(services: Services, turn: Turn, reading: Reading) -> Preview:
    rows: list[PreviewRow] = []
    jobs, work, rank = 0, 0.0, 0
    try:
        for entry in reading.entries(partial=True):
            if isinstance(entry, Entry):
                jobs += 1
                if jobs > JOBS_MAX:
                    raise TooManyJobs(JOBS_MAX)
                work += entry.submission.work
                rank = max(rank, entry.submission.priority.rank)  # the least urgent are the last
                if len(rows) < SHOWN_ROWS:
                    rows.append(PreviewRow.model_construct(**vars(entry.submission), line=entry.line))
    except ManifestError as error:
        if not reading.rejected or error.count > reading.count:  # the file, and not only its rows
            raise Invalid(_faults(error.problems), error.count) from None
    return Preview(
        rows=rows,
        jobs=jobs,
        rejected=reading.rejected,
        problems=_faults(reading.problems),
        problem_count=reading.count,
        carried=[printable(column) for column in reading.carried],
        separator=reading.separator,
        short_rows=reading.short_rows,
        work=work,
        estimate=_estimated(services, work, turn, Priority.of_rank(rank)),
    )


@router.get("/estimate", responses=problems(422))
def get_estimate(
    request: Request,
    here: Here,
    work: Annotated[float, Query(ge=0, le=WORK_MAX, allow_inf_nan=False, description="Megapixel-steps.")],
) -> Estimate:
    """What so much work costs: drawn pixels times steps times branches (two with guidance above 1), in millions."""
    return _estimated(_services(request), work, Turn(here.whose(None)), Priority.STANDARD)


def _estimated(services: Services, work: float, turn: Turn, priority: Priority) -> Estimate:
    return estimate(
        services.database,
        work,
        lease_s=services.settings.durations.lease_s,
        tenant=turn.tenant,
        weight=turn.weight,
        priority=priority,
    )


def _services(request: Request) -> Services:
    """Of the process, not of the caller: what is before somebody in the queue is everybody's."""
    services: Services = request.app.state.services
    return services


class NamedSize(BaseModel):
    """A size that may be given by its name, in pixels."""

    name: str
    set: str
    width: int
    height: int


class SizeList(BaseModel):
    """All sizes that have a name."""

    sizes: list[NamedSize]


@router.get("/sizes", responses=problems())
async def sizes(here: Here) -> SizeList:
    """Sizes by name; the name of a set stands for all of it where a size is varied."""
    return SizeList(
        sizes=[
            NamedSize(name=name, set=set_name, width=size.width, height=size.height)
            for set_name, named in size_sets().items()
            for name, size in named.items()
        ]
    )
