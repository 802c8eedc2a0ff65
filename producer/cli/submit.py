"""The command that submits: one prompt, or a manifest, which the farm itself reads."""

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from http import HTTPStatus
from itertools import islice
from pathlib import Path
from typing import IO, Annotated, Any
from uuid import uuid4

import typer
from pydantic import ValidationError

from pipeline.request import ImageFormat
from producer.cli.folder import proposed_folder
from producer.cli.jobs import EXIT_BAD_INPUT, AsJson, connect, console, errors, print_json, wait_and_tell
from producer.client import Batch, Client, ClientError, Job, Overloaded, Preview, Refused, ServerError, Unreachable
from producer.client.attempts import AT_WORK
from producer.client.bodies import MEDIA_TYPES
from producer.jobs.contract import Priority, Submission
from producer.jobs.errors import SettingsError
from producer.manifest import SEPARATORS, ManifestKind, Recipe, drawn_larger

STDIN = Path("-")
SPOOL_BYTES = 8 * 2**20
TOLD_REJECTIONS = 20
SHOWN_ROWS = 5
OPTION_NAMES = {"file_name": "--name", "template": "--template", "vary": "--vary", "default": "--default"}


def submit(
    prompt: Annotated[str | None, typer.Argument(help="What to draw; or give --file.")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="A .csv, .xlsx or .jsonl manifest; - is stdin.")
    ] = None,
    kind: Annotated[
        ManifestKind | None, typer.Option(help="How the manifest is written, if its name says not.")
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="Prompts from columns: 'A {style} banner for {product}'.")
    ] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(help="Each row once for each: size=leaderboard,1024x1024 or seed=1..4; may be repeated."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Output names from columns: '{sku}_{size}.png'.")] = None,
    default: Annotated[
        list[str] | None, typer.Option(help="column=value for what rows leave empty; may be repeated.")
    ] = None,
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
    deduplicate: Annotated[
        bool, typer.Option("--deduplicate", help="Draw nothing again that was drawn already, with the same seed.")
    ] = False,
    previews: Annotated[
        int | None,
        typer.Option(min=0, max=3, help="Unfinished pictures of one prompt; `status` says where."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what a manifest would become and cost, and submit nothing.")
    ] = False,
    wait_: Annotated[bool, typer.Option("--wait", help="Wait until all is drawn.")] = False,
    as_json: AsJson = False,
) -> int:
    """Submit one prompt, or a manifest with an image or more a row. The options are defaults for all rows."""
    if (prompt is None) == (file is None):
        raise SettingsError("give either a prompt or --file")
    _check_text(key=key, tenant=tenant)
    new = key is None
    key = str(uuid4()) if key is None else key  # an empty one is the farm's to refuse
    fields = {
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
    of_manifest = {
        "template": template,
        "vary": vary,
        "default": default,
        "weight": weight,
        "partial": partial,
        "dry-run": dry_run,
    }
    given = {field: value for field, value in fields.items() if value is not None}
    with connect() as client:
        if file is None:
            if unfit := [f"--{option}" for option, value in of_manifest.items() if value]:
                raise SettingsError(f"{', '.join(unfit)} goes with a manifest: give --file")
            values = _checked({"prompt": prompt, "name": name, **given})
            with _telling_the_key(key):
                submitted: Job | Batch = client.submit(
                    values, tenant=tenant, key=key, deduplicate=deduplicate, previews=previews
                )
        else:
            if previews:
                raise SettingsError("--previews goes with one prompt, not with --file")
            options = {
                "name": batch_name or (file.stem if file != STDIN else "stdin"),
                "template": template,
                "vary": vary,
                "file_name": name,
                "default": [*(f"{field}={value}" for field, value in given.items()), *(default or ())],
                "partial": partial,
                "deduplicate": deduplicate,
                "tenant": tenant,
                "weight": weight,
            }
            options = {option: value for option, value in options.items() if value not in (None, [], False)}
            if dry_run:
                return _dry_run(client, file, kind, options, as_json)
            submitted = _submit_manifest(client, file, kind, options, key)
        if deduplicate:
            errors.print(_there_already(submitted, new=new), markup=False)
        if not wait_:
            _say_submitted(submitted, as_json)
            return 0
        return wait_and_tell(client, submitted, as_json)


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
    """Whether it may be submitted all the same. A 429 refuses only this attempt:
    an earlier one, whose answer was lost, may have done it."""
    if isinstance(error, Unreachable):
        return error.heard
    if isinstance(error, ServerError) or error.problem.type == AT_WORK:
        return True
    return isinstance(error, Overloaded) and error.perhaps_done


def _check_text(**options: str | None) -> None:
    """Raises: SettingsError: the terminal gave bytes that are no text."""
    for option, value in options.items():
        try:
            (value or "").encode()
        except UnicodeEncodeError:
            raise SettingsError(f"--{option} is no UTF-8: write it as such") from None


def _checked(values: dict[str, Any]) -> dict[str, Any]:
    """The values, if they make a submission; the error names the option otherwise."""
    values = {field: value for field, value in values.items() if value is not None}
    try:
        Submission.model_validate(values)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()]
        larger = drawn_larger(values.get("width"), values.get("height"))
        raise SettingsError("; ".join([*problems, *([larger] if larger else [])])) from None
    return values


def _submit_manifest(client: Client, file: Path, kind: ManifestKind | None, options: dict[str, Any], key: str) -> Batch:
    with _telling_what_is_wrong(file), _opened(file) as source, _telling_the_key(key):
        batch = client.submit_manifest(source, kind=_kind(file, kind), key=key, **options)
    if batch.rejected:
        _tell_rejections(client, batch)
    if carried := _carried(client, batch, options):
        errors.print(_told_carried(carried), markup=False)
    return batch


def _carried(client: Client, batch: Batch, options: dict[str, Any]) -> list[str]:
    """Columns of the batch's first row that nothing used. None if the farm does not say: it is submitted."""
    recipe = Recipe(template=options.get("template"), file_name=options.get("file_name"))
    with contextlib.suppress(ClientError):
        for job in islice(client.batch_jobs(batch, page=1), 1):
            recipe.check_header(list(job.source or ()), 1)
    return recipe.carried


def _told_carried(columns: list[str]) -> str:
    return f"only carried along into the results: {', '.join(columns)}"


def _tell_rejections(client: Client, batch: Batch) -> None:
    """Beside the JSON, not in it."""
    told = 0
    for rejection in client.rejections(batch, page=TOLD_REJECTIONS):
        column = f", column {rejection.field!r}" if rejection.field else ""
        errors.print(f"line {rejection.line}{column}: {rejection.message}", markup=False)
        told += 1
        if told == TOLD_REJECTIONS:
            break
    if batch.rejected > told:
        errors.print(f"… and {batch.rejected - told} more", markup=False)
    errors.print(f"left out: {batch.rejected} {'row' if batch.rejected == 1 else 'rows'}", markup=False)


def _dry_run(client: Client, file: Path, kind: ManifestKind | None, options: dict[str, Any], as_json: bool) -> int:
    with _telling_what_is_wrong(file), _opened(file) as source:
        preview = client.preview_manifest(source, kind=_kind(file, kind), **options)
    if as_json:
        print_json(preview)
    else:
        console.print("\n".join(_previewed(preview, partial="partial" in options)), markup=False)
    refused = preview.rejected and not (options.get("partial") and preview.jobs)
    return EXIT_BAD_INPUT if refused else 0


def _previewed(preview: Preview, *, partial: bool) -> Iterator[str]:
    for row in preview.rows[:SHOWN_ROWS]:
        steps = f"{row['steps']} steps, guidance {row['guidance']:g}"
        named = f" -> {row['name']}" if row["name"] else ""
        yield f"line {row['line']}: {row['width']}x{row['height']}, {steps}: {row['prompt']}{named}"
    if preview.jobs > SHOWN_ROWS:
        yield f"… and {preview.jobs - SHOWN_ROWS} more"
    for problem in preview.problems:
        yield _told(problem.line, problem.field, problem.message)
    if preview.problem_count > len(preview.problems):
        yield f"… and {preview.problem_count - len(preview.problems)} more problems"
    then = "which are left out" if partial else "with which nothing is submitted without --partial"
    rejected = f"; bad rows: {preview.rejected}, {then}"
    yield f"{preview.jobs} images{rejected if preview.rejected else ''}"
    if preview.separator not in (None, ","):
        yield f"its first row says that a {SEPARATORS[preview.separator]} separates the cells"
    if preview.short_rows:
        yield f"rows shorter than the header, their last cells taken as empty: {preview.short_rows}"
    if preview.carried:
        yield _told_carried(preview.carried)
    if preview.estimate:
        estimate = preview.estimate
        end = (
            f"done by {estimate.finishes_at:%Y-%m-%d %H:%M} UTC" if estimate.finishes_at else "done in no time to tell"
        )
        yield f"{estimate.gpu_s:,.0f} GPU-seconds; {end}, with what waits before it"
        if estimate.by == "measured":
            yield f"as measured by {estimate.workers} live {'worker' if estimate.workers == 1 else 'workers'}"
        else:
            live = f"of {estimate.workers} live workers none has drawn yet" if estimate.workers else "no worker is live"
            yield f"by the model's arithmetic on an H100, since {live}"


@contextlib.contextmanager
def _telling_what_is_wrong(file: Path) -> Iterator[None]:
    """By line and column, one a line."""
    try:
        yield
    except Refused as refused:
        if refused.problem.errors is None or refused.problem.status != HTTPStatus.UNPROCESSABLE_ENTITY:
            raise
        faults = [_told(fault.line, fault.field, fault.message) for fault in refused.problem.errors]
        detail = [refused.problem.detail] if len(faults) > 1 else []
        raise SettingsError("\n".join([f"{file}: nothing was submitted:", *faults, *detail])) from None
    except (OSError, ValueError) as error:
        raise SettingsError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _told(line: int | None, field: str, message: str) -> str:
    if line is None:
        return f"{OPTION_NAMES.get(field, field)}: {message}" if field else message
    column = f", column {field!r}" if field else ""
    return f"line {line}{column}: {message}"


def _kind(file: Path, kind: ManifestKind | None) -> str | None:
    """Raises: SettingsError: nothing says how the file is written."""
    if file == STDIN:
        return kind or "csv"
    if kind is None and file.suffix.lower().removeprefix(".") not in MEDIA_TYPES:
        raise SettingsError(f"{file} is none of {', '.join(MEDIA_TYPES)} by its name: give its kind with --kind")
    return kind


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[IO[bytes]]:
    with contextlib.ExitStack() as opened:
        yield _whole(file, opened)


def _whole(file: Path, opened: contextlib.ExitStack) -> IO[bytes]:
    """The file, in memory or on disk until ``opened`` is closed: before it is there, nothing is sent."""
    try:
        source = sys.stdin.buffer if file == STDIN else opened.enter_context(file.open("rb"))
        if source.seekable():
            return source
        spool = opened.enter_context(tempfile.SpooledTemporaryFile(SPOOL_BYTES))  # noqa: SIM115
        shutil.copyfileobj(source, spool)
        spool.seek(0)
    except KeyboardInterrupt:
        errors.print("\nnothing was submitted", markup=False)
        raise
    return spool


def _there_already(submitted: Job | Batch, *, new: bool) -> str:
    """What deduplication has found, beside the JSON. Of a ``new`` submission what is drawn was drawn before; with a key
    that the farm may know, nobody can tell that from what was drawn since."""
    told = "there already" if new else "there already, or drawn since --key was first used"
    if isinstance(submitted, Batch):
        return f"{told}: {submitted.counts['succeeded']} of {submitted.jobs} images"
    if submitted.state == "succeeded":
        return f"{told}: the image"
    return f"{told}: nothing{', so it is drawn' if new else ''}"


def _say_submitted(submitted: Job | Batch, as_json: bool) -> None:
    if as_json:
        print_json(submitted)
        return
    id = submitted.id
    what = f"batch {id}, jobs: {submitted.jobs}" if isinstance(submitted, Batch) else f"job {id}"
    console.print(
        f"submitted {what}\n  ovis-batch wait {id}\n  ovis-batch results {id} --to {proposed_folder(id)}", markup=False
    )


COMMANDS = (submit,)
