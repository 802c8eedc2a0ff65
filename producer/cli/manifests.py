"""A manifest from the command line: how it is read, what it would become, what is wrong with it."""

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from http import HTTPStatus
from itertools import islice
from pathlib import Path
from typing import IO, Any

from producer.cli.jobs import EXIT_BAD_INPUT, console, errors, print_json
from producer.client import Batch, Client, ClientError, Estimate, Fault, ManifestKind, Preview, Refused
from producer.client.bodies import MEDIA_TYPES
from producer.jobs.errors import SettingsError
from producer.manifest import SEPARATORS, Recipe

STDIN = Path("-")
SPOOL_BYTES = 8 * 2**20
TOLD_REJECTIONS = 20
SHOWN_ROWS = 5
OPTION_NAMES = {"file_name": "--name", "template": "--template", "vary": "--vary", "default": "--default"}


def show_preview(client: Client, file: Path, kind: ManifestKind | None, options: dict[str, Any], as_json: bool) -> int:
    """Print what it would become; returns the exit code that its submission would end with. Raises: SettingsError."""
    with telling_what_is_wrong(file), opened(file) as source:
        preview = client.preview_manifest(source, kind=kind_of(file, kind), **options)
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
        yield _in_words(problem)
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
        yield told_carried(preview.carried)
    if preview.estimate:
        yield from _estimated(preview.estimate)


def _estimated(estimate: Estimate) -> Iterator[str]:
    end = f"done by {estimate.finishes_at:%Y-%m-%d %H:%M} UTC" if estimate.finishes_at else "done in no time to tell"
    yield f"{estimate.gpu_s:,.0f} GPU-seconds; {end}, with what waits before it"
    if estimate.by == "measured":
        yield f"as measured by {estimate.workers} live {'worker' if estimate.workers == 1 else 'workers'}"
    else:
        live = f"of {estimate.workers} live workers none has drawn yet" if estimate.workers else "no worker is live"
        yield f"by the model's arithmetic on an H100, since {live}"


def carried_columns(client: Client, batch: Batch, options: dict[str, Any]) -> list[str]:
    """Columns of the batch's first row that nothing used. None if the farm does not say: it is submitted."""
    recipe = Recipe(template=options.get("template"), file_name=options.get("file_name"))
    with contextlib.suppress(ClientError):
        for job in islice(client.batch_jobs(batch, page=1), 1):
            recipe.check_header(list(job.source or ()), 1)
    return recipe.carried


def told_carried(columns: list[str]) -> str:
    return f"only carried along into the results: {', '.join(columns)}"


def tell_rejections(client: Client, batch: Batch) -> None:
    """Beside the JSON, not in it."""
    told = 0
    for rejection in client.rejections(batch, page=TOLD_REJECTIONS):
        fault = Fault(field=rejection.field or "", message=rejection.message, line=rejection.line)
        errors.print(str(fault), markup=False)
        told += 1
        if told == TOLD_REJECTIONS:
            break
    if batch.rejected > told:
        errors.print(f"… and {batch.rejected - told} more", markup=False)
    errors.print(f"left out: {batch.rejected} {'row' if batch.rejected == 1 else 'rows'}", markup=False)


@contextlib.contextmanager
def telling_what_is_wrong(file: Path) -> Iterator[None]:
    """By line and column, one a line."""
    try:
        yield
    except Refused as refused:
        if refused.problem.errors is None or refused.problem.status != HTTPStatus.UNPROCESSABLE_ENTITY:
            raise
        faults = [_in_words(fault) for fault in refused.problem.errors]
        detail = [refused.problem.detail] if len(faults) > 1 else []
        raise SettingsError("\n".join([f"{file}: nothing was submitted:", *faults, *detail])) from None
    except (OSError, ValueError) as error:
        raise SettingsError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _in_words(fault: Fault) -> str:
    """An option by the name that it has here."""
    if fault.line is not None or fault.field not in OPTION_NAMES:
        return str(fault)
    return f"{OPTION_NAMES[fault.field]}: {fault.message}"


def kind_of(file: Path, kind: ManifestKind | None) -> ManifestKind | None:
    """Raises: SettingsError: nothing says how the file is written."""
    if file == STDIN:
        return kind or "csv"
    if kind is None and file.suffix.lower().removeprefix(".") not in MEDIA_TYPES:
        raise SettingsError(f"{file} is none of {', '.join(MEDIA_TYPES)} by its name: give its kind with --kind")
    return kind


@contextlib.contextmanager
def opened(file: Path) -> Iterator[IO[bytes]]:
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
