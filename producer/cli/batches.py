"""The commands that steer what was submitted: retry, pause, resume, prioritise, delete. They speak HTTP to the farm."""

import sys
from collections.abc import Collection
from typing import Annotated
from uuid import UUID

import typer

from producer.cli.jobs import AsJson, Id, connect, console, find, line, of_a_batch, parsed_id, print_json
from producer.client import Batch, Job, Priority, RetriedState
from producer.jobs.errors import SettingsError

BatchId = Annotated[UUID, typer.Argument(parser=parsed_id, metavar="ID", help="A batch.")]


def retry(
    id: Id,
    failed: Annotated[bool, typer.Option("--failed", help="Of a batch what failed; so it is without any option.")] = (
        False
    ),
    cancelled: Annotated[bool, typer.Option("--cancelled", help="Of a batch what was cancelled.")] = False,
    as_json: AsJson = False,
) -> None:
    """Draw again what failed, with the seeds that it had. What succeeded stays."""
    states: list[RetriedState] = ["failed"] * (failed or not cancelled)
    states += ["cancelled"] * cancelled
    with connect() as client:
        found = find(client, id)
        again = client.retry_batch(found, states) if isinstance(found, Batch) else client.retry(found)
    _tell(again, as_json)
    if isinstance(found, Batch) and not as_json and not sum(found.counts.get(state, 0) for state in states):
        console.print(f"  {_nothing_retried(found, states)}", markup=False)


def _nothing_retried(batch: Batch, states: Collection[str]) -> str:
    """Why nothing is drawn again, and with which option something is."""
    had = {"failed": "had failed", "cancelled": "was cancelled"}
    told = f"nothing {' or '.join(had[state] for state in states)}"
    for state in had.keys() - set(states):
        if count := batch.counts.get(state, 0):
            told += f"; {state}: {count}, drawn again by: ovis-batch retry {batch.id} --{state}"
    return told


def pause(id: BatchId, as_json: AsJson = False) -> None:
    """Begin nothing more of a batch until it is resumed; what is being drawn is drawn."""
    with connect() as client, of_a_batch(client, id, "pause"):
        _tell(client.pause(id), as_json)


def resume(id: BatchId, as_json: AsJson = False) -> None:
    """Go on with a paused batch."""
    with connect() as client, of_a_batch(client, id, "resume"):
        _tell(client.resume(id), as_json)


def prioritise(
    id: BatchId,
    priority: Annotated[Priority, typer.Argument(help="Who goes first.")],
    as_json: AsJson = False,
) -> None:
    """Give all of a batch that has not ended another priority."""
    with connect() as client, of_a_batch(client, id, "prioritise"):
        _tell(client.prioritise(id, priority), as_json)


def delete(
    id: BatchId,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete a batch: its jobs at once, its images some minutes later. It cannot be undone."""
    with connect() as client, of_a_batch(client, id, "delete"):
        batch = client.batch(id)
        if not yes:
            _confirm(f"{line(batch)}\ndelete all of it, with its images?")
        client.delete_batch(batch)
    console.print(f"deleted batch {id}", markup=False)


def _confirm(question: str) -> None:
    """Return if the answer is yes. Raises: SettingsError: there is nobody to ask; Abort."""
    try:
        sure = typer.confirm(question, err=True)
    except typer.Abort as abort:
        if sys.stdin.isatty() or not isinstance(abort.__context__, EOFError):  # Ctrl-C
            raise
        raise SettingsError("nothing was deleted, as nobody is there to ask: say --yes (-y)") from None
    if not sure:
        raise typer.Abort


def _tell(now: Batch | Job, as_json: bool) -> None:
    if as_json:
        print_json(now)
    else:
        console.print(line(now), markup=False)


COMMANDS = (retry, pause, resume, prioritise, delete)
