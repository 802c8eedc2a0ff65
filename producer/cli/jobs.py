"""The commands of those who want images: submit, status, wait, results. They speak HTTP to the farm."""

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import IO, Annotated, Any
from uuid import UUID, uuid4

import typer
from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.table import Table

from pipeline.request import ImageFormat
from producer.cli.download import download
from producer.cli.progress import BatchProgress
from producer.client import Batch, Client, Farm, Job, NotFound, Refused, ServerError, Unreachable, Worker
from producer.jobs.contract import DEFAULT_TENANT, Priority, Submission
from producer.jobs.errors import SettingsError
from producer.jobs.settings import load_settings
from producer.manifest import ManifestError, ManifestKind, accept, read

EXIT_SOME_FAILED = 1
SPOOL_BYTES = 8 * 2**20

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for a program to read.")]
console = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)


def submit(
    prompt: Annotated[str | None, typer.Argument(help="What to draw; or give --file.")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="A .csv or .jsonl manifest; - is stdin.")] = None,
    kind: Annotated[
        ManifestKind | None, typer.Option(help="How the manifest is written, if its name says not.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Output names from columns: '{sku}_{width}x{height}'.")] = None,
    batch_name: Annotated[str | None, typer.Option(help="Name of the batch; default: the file's name.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to keep away from.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels, 64 to 2048.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels, 64 to 2048.")] = None,
    steps: Annotated[int | None, typer.Option(help="1 to 100.")] = None,
    guidance: Annotated[float | None, typer.Option(help="0 to 20.")] = None,
    seed: Annotated[int | None, typer.Option(help="For an image that can be drawn again.")] = None,
    format: Annotated[ImageFormat | None, typer.Option(help="Of the image file.")] = None,
    quality: Annotated[int | None, typer.Option(help="Of jpeg and webp, 1 to 100.")] = None,
    priority: Annotated[Priority | None, typer.Option(help="Who goes first.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Whose jobs they are: tenants share the farm.")] = None,
    weight: Annotated[
        float | None, typer.Option(help="Of a batch, beside the tenant's others: 0.01 to 100; default: 1.")
    ] = None,
    key: Annotated[str | None, typer.Option(help="Idempotency key: the same again submits nothing twice.")] = None,
    partial: Annotated[bool, typer.Option("--partial", help="Submit the good rows though others are bad.")] = False,
    wait_: Annotated[bool, typer.Option("--wait", help="Wait until all is drawn.")] = False,
    as_json: AsJson = False,
) -> int:
    """Submit one prompt, or a manifest with one image a row. The options are defaults for all rows."""
    if (prompt is None) == (file is None):
        raise SettingsError("give either a prompt or --file")
    if file is None and weight is not None:
        raise SettingsError("--weight is a batch's: give --file")
    key = str(uuid4()) if key is None else key  # an empty one is the farm's to refuse
    given = {
        "negative_prompt": negative_prompt,
        "width": width,
        "height": height,
        "steps": steps,
        "guidance": guidance,
        "seed": seed,
        "format": format,
        "quality": quality,
        "priority": priority,
    }
    defaults = {field: value for field, value in given.items() if value is not None}
    with _client() as client:
        if file is None:
            values = _checked({"prompt": prompt, "name": name, **defaults})
            with _telling_the_key(key):
                submitted: Job | Batch = client.submit(values, tenant=tenant, key=key)
        else:

            def hand_in(name: str, rows: Iterator[dict[str, Any]]) -> Batch:
                with _telling_the_key(key):
                    return client.submit_batch(name, rows, tenant=tenant, weight=weight, key=key)

            submitted = _submit_manifest(hand_in, file, kind, name, batch_name, defaults, partial)
        if not wait_:
            _say_submitted(submitted, as_json)
            return 0
        return _wait(client, submitted, as_json)


def status(
    id: Annotated[UUID | None, typer.Argument(help="A job or a batch; default: the whole farm.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show a job, a batch, or the whole farm."""
    with _client() as client:
        shown: Job | Batch | Farm = client.farm() if id is None else _find(client, id)
    if as_json:
        _print_json(shown)
    else:
        console.print(_farm_table(shown) if isinstance(shown, Farm) else _line(shown), markup=False)


def wait(id: Annotated[UUID, typer.Argument(help="A job or a batch.")], as_json: AsJson = False) -> int:
    """Wait until a job or all of a batch has ended; exit code 1 if an image did not succeed."""
    with _client() as client:
        return _wait(client, _find(client, id), as_json)


def cancel(id: Annotated[UUID, typer.Argument(help="A job or a batch.")], as_json: AsJson = False) -> None:
    """Cancel a job, or all of a batch that has not ended; images that are there stay. What has ended stays as it is."""
    with _client() as client:
        found = _find(client, id)
        cancelled = _cancelled(client, found)
    if as_json:
        _print_json(cancelled)
    else:
        console.print(_line(cancelled) + ("; nothing was left to cancel" if found.done else ""), markup=False)


def results(
    id: Annotated[UUID, typer.Argument(help="A batch or a job.")],
    to: Annotated[Path, typer.Option(help="The folder to fill.")] = Path("results"),
    as_json: AsJson = False,
) -> int:
    """Download images, with results.csv and a contact sheet. Asking again goes on where it stopped."""
    with _client() as client:
        found = _find(client, id)
        jobs = list(client.batch_jobs(found)) if isinstance(found, Batch) else [found]
        with errors.status(f"downloading {len(jobs)} images") if errors.is_terminal else contextlib.nullcontext():
            download(client, jobs, to)
    there = sum(job.state == "succeeded" for job in jobs)
    if as_json:
        print(json.dumps({"folder": str(to), "images": there, "jobs": len(jobs)}))
    else:
        console.print(downloaded(there, len(jobs), to), markup=False)
    return 0 if there == len(jobs) else EXIT_SOME_FAILED


def downloaded(images: int, of: int, to: Path) -> str:
    """What a download ends with."""
    return f"{images} of {of} images in {to}, with results.csv and contact-sheet.png"


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


@contextlib.contextmanager
def _telling_the_key(key: str) -> Iterator[None]:
    """When no answer came back, the farm may have submitted it nevertheless; the key finds out."""
    told = f"it may be submitted: the same command with --key {key} does it no second time"
    try:
        yield
    except KeyboardInterrupt:
        errors.print(f"\n{told}", markup=False)
        raise
    except (Unreachable, ServerError, Refused) as error:
        if _leaves_it_open(error):
            errors.print(told, markup=False)
        raise


def _leaves_it_open(error: Unreachable | ServerError | Refused) -> bool:
    """Whether it may be submitted all the same. A 429 refuses only this attempt: an earlier one may have been heard."""
    if isinstance(error, Unreachable):
        return error.heard
    return isinstance(error, ServerError) or error.problem.status == HTTPStatus.TOO_MANY_REQUESTS


def _client() -> Client:
    return Client(load_settings().base_url)


def _find(client: Client, id: UUID) -> Job | Batch:
    try:
        return client.batch(id)
    except NotFound:
        return client.job(id)


def _checked(values: dict[str, Any]) -> dict[str, Any]:
    """The values, if they make a submission; the error names the option otherwise."""
    values = {field: value for field, value in values.items() if value is not None}
    try:
        Submission.model_validate(values)
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors())
        raise SettingsError("; ".join(problems)) from None
    return values


def _submit_manifest(
    hand_in: Callable[..., Batch],
    file: Path,
    kind: ManifestKind | None,
    name: str | None,
    batch_name: str | None,
    defaults: dict[str, Any],
    partial: bool,
) -> Batch:
    """Read all rows first, into a spool, so that a bad one is told before any is submitted."""
    with tempfile.SpooledTemporaryFile(SPOOL_BYTES, mode="w+", encoding="utf-8") as spool:
        try:
            with _opened(file) as source:
                rows = read(source, kind or _kind(file), name_template=name, defaults=defaults)
                left_out = accept(rows, keep=lambda row: _write_line(spool, row), partial=partial)
        except ManifestError as error:
            raise SettingsError(f"{file}: nothing was submitted:\n{error}") from None
        except KeyboardInterrupt:
            errors.print("\nnothing was submitted", markup=False)
            raise
        if left_out.rows:
            errors.print(str(left_out), markup=False)  # beside the JSON, not in it
        spool.seek(0)
        return hand_in(batch_name or (file.stem if str(file) != "-" else "stdin"), map(json.loads, spool))


def _write_line(spool: IO[str], row: Submission) -> None:
    spool.write(row.model_dump_json(exclude_defaults=True) + "\n")


def _kind(file: Path) -> ManifestKind:
    return ManifestKind.CSV if str(file) == "-" else ManifestKind.of(file)


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    if str(file) == "-":
        sys.stdin.reconfigure(encoding="utf-8-sig", newline="")  # type: ignore[union-attr]
        yield sys.stdin
        return
    try:
        with file.open(encoding="utf-8-sig", newline="") as source:
            yield source
    except OSError as error:
        raise SettingsError(f"{file} cannot be read: {error.strerror}") from None


def _wait(client: Client, submitted: Job | Batch, as_json: bool) -> int:
    try:
        if isinstance(submitted, Batch):
            ended: Job | Batch = wait_for_batch(client, submitted)
        else:
            ended = client.wait(submitted)
    except KeyboardInterrupt:
        errors.print(f"\nthe jobs go on; come back with: ovis-batch wait {submitted.id}", markup=False)
        raise
    if as_json:
        _print_json(ended)
    else:
        console.print(f"{_line(ended)}\n  ovis-batch results {ended.id} --to results", markup=False)
    return exit_code(ended)


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


def _say_submitted(submitted: Job | Batch, as_json: bool) -> None:
    if as_json:
        _print_json(submitted)
        return
    id = submitted.id
    what = f"batch {id}, jobs: {submitted.jobs}" if isinstance(submitted, Batch) else f"job {id}"
    console.print(f"submitted {what}\n  ovis-batch wait {id}\n  ovis-batch results {id} --to results", markup=False)


def _print_json(shown: BaseModel) -> None:
    print(shown.model_dump_json(indent=2))


def _line(shown: Job | Batch) -> str:
    whose = f" of tenant {shown.tenant}" if shown.tenant != DEFAULT_TENANT else ""
    if isinstance(shown, Batch):
        counts = ", ".join(f"{count} {state}" for state, count in shown.counts.items() if count)
        ended = f"{shown.finished} of {shown.jobs} ended ({counts or 'empty'})"
        return f"batch {shown.id} {shown.name!r}{whose}: {ended}"
    cause = f": {shown.error_message}" if shown.error_message else ""
    return f"job {shown.id}{whose}: {shown.state}{cause}"


def _farm_table(farm: Farm) -> Table:
    table = Table(title=", ".join(f"{count} {state}" for state, count in farm.counts.items()), title_justify="left")
    for column in ("worker", "device", "model", "drawing", "heartbeat"):
        table.add_column(column)
    for worker in farm.workers:
        age = f"{worker.heartbeat_age_s:.0f} s ago" + ("" if worker.live else ", silent")
        table.add_row(f"{worker.host}:{worker.pid}", worker.device, _model(worker), str(len(worker.drawing)), age)
    if not farm.workers:
        table.caption = "no worker: start one with `ovis-batch worker`"
    return table


def _model(worker: Worker) -> str:
    """With what makes its pictures others: fp8 stands in the revision, which is too long for a table."""
    return worker.model + ("+fp8" if worker.revision.endswith("+fp8") else "")


COMMANDS = (submit, status, wait, results, cancel)
