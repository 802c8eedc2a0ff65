"""The command that submits: one prompt, or a manifest, which the farm itself reads."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any
from uuid import uuid4

import typer
from pydantic import ValidationError

from pipeline.request import ImageFormat
from producer.cli.folder import proposed_folder
from producer.cli.jobs import AsJson, connect, console, errors, print_json, wait_and_tell
from producer.cli.manifests import (
    STDIN,
    carried_columns,
    kind_of,
    opened,
    show_preview,
    tell_rejections,
    telling_what_is_wrong,
    told_carried,
)
from producer.client import Batch, Client, Job, ManifestKind, Overloaded, Refused, ServerError, Unreachable
from producer.client.attempts import AT_WORK
from producer.jobs.contract import Priority, Submission
from producer.jobs.errors import SettingsError
from producer.manifest import drawn_larger


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
        typer.Option(
            min=0, max=3, help="Unfinished pictures of each image on its way; `status` of its job says where."
        ),
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
    given = {field: value for field, value in fields.items() if value is not None}
    shared: dict[str, Any] = {"tenant": tenant, "deduplicate": deduplicate, "previews": previews}
    of_manifest: dict[str, Any] = {
        "template": template,
        "vary": vary,
        "default": default,
        "weight": weight,
        "partial": partial,
    }
    with connect() as client:
        if file is None:
            _refuse_options(of_manifest | {"dry-run": dry_run}, "goes with a manifest: give --file")
            values = _checked({"prompt": prompt, "name": name, **given})
            with _telling_the_key(key):
                submitted: Job | Batch = client.submit(values, key=key, **shared)
        else:
            options = {
                **shared,
                **of_manifest,
                "name": batch_name or (file.stem if file != STDIN else "stdin"),
                "file_name": name,
                "default": [*(f"{field}={value}" for field, value in given.items()), *(default or ())],
            }
            options = {option: value for option, value in options.items() if value not in (None, [], False)}
            if dry_run:
                return show_preview(client, file, kind, options, as_json)
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


def _refuse_options(options: Mapping[str, object], why: str) -> None:
    """Raises: SettingsError: some of them were given."""
    if given := [f"--{option}" for option, value in options.items() if value]:
        raise SettingsError(f"{', '.join(given)} {why}")


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
    with telling_what_is_wrong(file), opened(file) as source, _telling_the_key(key):
        batch = client.submit_manifest(source, kind=kind_of(file, kind), key=key, **options)
    if batch.rejected:
        tell_rejections(client, batch)
    if columns := carried_columns(client, batch, options):
        errors.print(told_carried(columns), markup=False)
    return batch


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
