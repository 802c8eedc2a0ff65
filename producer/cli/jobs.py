"""The commands of those who submitted images: status, wait, cancel. They speak HTTP to the farm."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Annotated
from uuid import UUID

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from producer.cli.folder import proposed_folder
from producer.cli.progress import BatchProgress, how_to_resume
from producer.client import Batch, Client, Farm, Job, NotFound, Refused, Worker
from producer.jobs.contract import DEFAULT_TENANT
from producer.jobs.errors import SettingsError
from producer.jobs.settings import Settings, load_settings

EXIT_SOME_FAILED = 1
EXIT_BAD_INPUT = 2
FAILURES_READ = 1_000
"""Jobs that are asked why they failed: a batch may have a million."""
MESSAGE_SHOWN = 300
"""Characters of the words of an error that stand for many; a job's own status has them all."""

NO_WORKER = (
    "no worker lives: `ovis-batch up` starts the whole farm with one, which takes some seconds to load; "
    "`ovis-batch workers` starts one more for each device of this machine"
)


def parsed_id(text: str) -> UUID:
    """The id of a job or a batch; also as OpenAI's door shows a batch's. Raises: BadParameter."""
    try:
        return UUID(text.removeprefix("batch_"))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no UUID, and no batch_… of OpenAI's door") from None


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for a program to read.")]
Id = Annotated[UUID, typer.Argument(parser=parsed_id, metavar="ID", help="A job or a batch.")]
console = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)


def status(
    id: Annotated[
        UUID | None, typer.Argument(parser=parsed_id, metavar="ID", help="A job or a batch; default: the whole farm.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show a job, a batch with why its jobs failed, or the whole farm."""
    with connect() as client:
        shown: Job | Batch | Farm = client.farm() if id is None else find(client, id)
        if as_json:
            print_json(shown)
        elif isinstance(shown, Farm):
            console.print(_farm_table(shown), markup=False)
        else:
            console.print("\n".join([line(shown), *_more(client, shown)]), markup=False)


def wait(id: Id, as_json: AsJson = False) -> int:
    """Wait until a job or all of a batch has ended; exit code 1 if an image did not succeed."""
    with connect() as client:
        return wait_and_tell(client, find(client, id), as_json)


def cancel(id: Id, as_json: AsJson = False) -> None:
    """Cancel a job, or all of a batch that has not ended; images that are there stay. What has ended stays as it is."""
    with connect() as client:
        found = find(client, id)
        cancelled = _cancelled(client, found)
    if as_json:
        print_json(cancelled)
    else:
        console.print(line(cancelled) + ("; nothing was left to cancel" if found.done else ""), markup=False)


def _cancelled(client: Client, found: Job | Batch) -> Job | Batch:
    """Cancelled as far as it had not ended: a job that ended otherwise is no error, as in a batch."""
    if isinstance(found, Batch):
        return client.cancel_batch(found)
    try:
        return client.cancel(found)
    except Refused as refused:
        if refused.problem.state is None:
            raise
        return client.job(found)


def connect() -> Client:
    """The farm that the settings name. Raises: SettingsError."""
    return client_of(load_settings())


def client_of(settings: Settings) -> Client:
    """The farm that these settings name, with their key. Raises: SettingsError: the key is none."""
    key = settings.api_key.get_secret_value() if settings.api_key else None
    if key and not (key.isascii() and key.isprintable()):
        raise SettingsError("OVIS_API_KEY holds what no key holds: set it to what `ovis-batch keys create` printed")
    return Client(settings.base_url, api_key=key)


def find(client: Client, id: UUID) -> Job | Batch:
    """The batch or the job with this id. Raises: NotFound, ClientError."""
    try:
        return client.batch(id)
    except NotFound:
        pass
    try:
        return client.job(id)
    except NotFound as unknown:
        raise NotFound(unknown.problem.model_copy(update={"detail": f"no job or batch {id}"})) from None


@contextlib.contextmanager
def of_a_batch(client: Client, id: UUID, command: str) -> Iterator[None]:
    """Raises: SettingsError: what the ``command`` did not find as a batch is a job."""
    try:
        yield
    except NotFound as unknown:
        with contextlib.suppress(NotFound):
            client.job(id)
            raise SettingsError(f"{id} is a job: {command} takes a batch") from None
        raise unknown


def wait_and_tell(client: Client, submitted: Job | Batch, as_json: bool) -> int:
    """Wait until all has ended and tell how; the exit code."""
    try:
        if isinstance(submitted, Batch):
            ended: Job | Batch = wait_for_batch(client, submitted)
        else:
            ended = client.wait(submitted)
    except KeyboardInterrupt:
        errors.print(f"\nthe jobs go on; come back with: ovis-batch wait {submitted.id}", markup=False)
        raise
    if as_json:
        print_json(ended)
    else:
        told = [line(ended), *_more(client, ended), f"  ovis-batch results {ended.id} --to {proposed_folder(ended.id)}"]
        console.print("\n".join(told), markup=False)
    return exit_code(ended)


def _more(client: Client, shown: Job | Batch) -> Iterator[str]:
    """What one line does not hold: how a paused batch goes on, why jobs failed, where a preview is."""
    if isinstance(shown, Job):
        if shown.preview_url and not shown.done:
            yield f"  preview: {client.base_url}{shown.preview_url}"
        return
    if shown.paused and not shown.done:
        yield f"  {how_to_resume(shown)}"
    failed = shown.counts.get("failed", 0)
    if failed > FAILURES_READ:
        yield f"  of the first {FAILURES_READ:,} that failed:"
    if failed:
        yield from failures(islice(client.batch_jobs(shown, state="failed"), FAILURES_READ))


def failures(failed: Iterator[Job]) -> Iterator[str]:
    """Each error code with how many jobs have it, the most frequent first, and what the first of them says."""
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    for job in failed:
        code = job.error_code or "without a code"
        counts[code] += 1
        first.setdefault(code, job.error_message or "says nothing")
    for code, count in counts.most_common():
        yield f"  {count} failed, {code}: {' '.join(first[code].split())[:MESSAGE_SHOWN]}"


def exit_code(ended: Job | Batch) -> int:
    """0 if every image is there, 1 otherwise."""
    good = ended.counts["succeeded"] == ended.jobs if isinstance(ended, Batch) else ended.state == "succeeded"
    return 0 if good else EXIT_SOME_FAILED


def wait_for_batch(client: Client, batch: Batch, on_poll: Callable[[], None] = lambda: None) -> Batch:
    """Wait until the whole batch has ended, with a progress bar; ``on_poll`` is called at each look."""
    with BatchProgress(errors, batch.name, batch.jobs) as show:

        def look(now: Batch) -> None:
            show(now)
            on_poll()

        return client.wait(batch, progress=look, poll_s=0.5)


def print_json(shown: BaseModel) -> None:
    """For a program to read."""
    print(shown.model_dump_json(indent=2))


def line(shown: Job | Batch) -> str:
    """What is said of it in one line."""
    whose = f" of tenant {shown.tenant}" if shown.tenant != DEFAULT_TENANT else ""
    if isinstance(shown, Batch):
        counts = ", ".join(f"{count} {state}" for state, count in shown.counts.items() if count)
        ended = f"{shown.finished} of {shown.jobs} ended ({counts or 'empty'})"
        refused = f", {shown.rejected} rows rejected" if shown.rejected else ""
        return f"batch {shown.id} {shown.name!r}{whose}: {ended}{refused}{', paused' if shown.paused else ''}"
    cause = f": {shown.error_message}" if shown.error_message else ""
    return f"job {shown.id}{whose}: {shown.state}{cause}"


def _farm_table(farm: Farm) -> Table:
    table = Table(title=", ".join(f"{count} {state}" for state, count in farm.counts.items()), title_justify="left")
    for column in ("worker", "device", "model", "drawing", "heartbeat"):
        table.add_column(column)
    for worker in farm.workers:
        age = f"{worker.heartbeat_age_s:.0f} s ago" + ("" if worker.live else ", silent")
        table.add_row(f"{worker.host}:{worker.pid}", worker.device, _model(worker), str(len(worker.drawing)), age)
    if not any(worker.live for worker in farm.workers):
        table.caption = NO_WORKER
        table.caption_justify = "left"
    return table


def _model(worker: Worker) -> str:
    """With what makes its pictures others: fp8 stands in the revision, which is too long for a table."""
    return worker.model + ("+fp8" if worker.revision.endswith("+fp8") else "")


COMMANDS = (status, wait, cancel)
