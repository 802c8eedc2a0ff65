"""The command that brings home what was drawn."""

import contextlib
import json
from pathlib import Path
from typing import Annotated

import typer

from producer.cli.download import Downloaded, download, download_one, download_zip, others_files
from producer.cli.folder import claim_folder
from producer.cli.jobs import EXIT_SOME_FAILED, AsJson, Id, connect, console, errors, exit_code, find
from producer.client import Batch, Client, ResultsFormat
from producer.jobs.errors import SettingsError


def results(
    id: Id,
    to: Annotated[Path, typer.Option(help="The folder to fill.")] = Path("results"),
    format: Annotated[ResultsFormat, typer.Option(help="Of the table of results.")] = "csv",
    zip: Annotated[bool, typer.Option("--zip", help="One ZIP with all of it, in one go.")] = False,
    as_json: AsJson = False,
) -> int:
    """Download a batch's images, with results.csv and contact sheets. Asking again goes on where it stopped.

    A folder holds one batch: another's is refused.
    """
    with connect() as client:
        found = find(client, id)
        if isinstance(found, Batch):
            return _bring_zip(client, found, to, as_json) if zip else _bring(client, found, to, format, as_json)
        if zip or format != "csv":
            raise SettingsError(f"{id} is a job: --zip and --format are for a batch")
        if found.state != "succeeded":
            _say(f"job {id} is {found.state}: it has no image", as_json, folder=str(to), images=0, jobs=1)
            return EXIT_SOME_FAILED
        path = download_one(client, found, to)
        _say(str(path), as_json, folder=str(to), images=1, jobs=1)
        return 0


def downloaded(done: Downloaded, to: Path, format: ResultsFormat = "csv") -> str:
    """What a download ends with."""
    sheets = f" and {len(done.sheets)} contact sheets" if len(done.sheets) > 1 else " and contact-sheet.png"
    kept = f" ({done.images - done.fetched} were there already)" if done.fetched < done.images else ""
    with_ = f"with results.{format}{sheets if done.sheets else ''}"
    return f"{done.images} of {done.jobs} images in {to}{kept}, {with_}"


def _bring(client: Client, batch: Batch, to: Path, format: ResultsFormat, as_json: bool) -> int:
    with errors.status(f"downloading {batch.jobs} images") if errors.is_terminal else contextlib.nullcontext():
        claim_folder(to, f"batch {batch.id}", others_files(client, batch, to, format))
        done = download(client, batch, to, format)
    facts = {"folder": str(to), "images": done.images, "fetched": done.fetched, "jobs": done.jobs}
    _say(downloaded(done, to, format), as_json, **facts)
    return 0 if done.images == done.jobs else EXIT_SOME_FAILED


def _bring_zip(client: Client, batch: Batch, to: Path, as_json: bool) -> int:
    path = download_zip(client, batch, to)
    now = client.batch(batch)
    _say(str(path), as_json, file=str(path), jobs=now.jobs)
    return exit_code(now)


def _say(line: str, as_json: bool, **facts: object) -> None:
    if as_json:
        print(json.dumps(facts))
    else:
        console.print(line, markup=False)


COMMANDS = (results,)
