"""Webhooks from the command line: addresses that the farm tells of events. It speaks HTTP to the farm."""

from enum import StrEnum
from typing import Annotated, cast
from uuid import UUID

import typer

from producer.cli.jobs import AsJson, connect, console, print_json
from producer.client import Delivery, Webhook, WebhookKind
from producer.jobs.contract import DEFAULT_TENANT

webhooks = typer.Typer(help="Let addresses be told of what happens, signed by Standard Webhooks.", no_args_is_help=True)


class Kind(StrEnum):
    """``producer.client.WebhookKind``: Typer takes no list of Literals."""

    JOB_RUNNING = "job.running"
    JOB_QUEUED = "job.queued"
    JOB_SUCCEEDED = "job.succeeded"
    JOB_FAILED = "job.failed"
    JOB_CANCELLED = "job.cancelled"
    BATCH_FINISHED = "batch.finished"


WebhookId = Annotated[UUID, typer.Argument(help="As `list` shows it.")]


@webhooks.command()
def add(
    url: Annotated[str, typer.Argument(help="Where events are sent, https://…")],
    kind: Annotated[
        list[Kind] | None, typer.Option(help="What is sent; may be given again; default: batch.finished.")
    ] = None,
    tenant: Annotated[
        str | None, typer.Option(help="Whose events are told; another's only an administrator's key may name.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Let an address be told, and show the secret by which its receiver verifies that, this once."""
    with connect() as client:
        made = client.create_webhook(url, kinds=cast(list[WebhookKind], kind), tenant=tenant)
    if as_json:
        print_json(made)
        return
    told = f"{', '.join(made.kinds)}{_whose(made)}"
    typer.echo(f"webhook {made.id} is told {told}; its secret is not shown again:", err=True)
    typer.echo(made.secret)


@webhooks.command("list")
def list_(as_json: AsJson = False) -> None:
    """All webhooks, disabled ones too."""
    with connect() as client:
        for webhook in client.webhooks():
            _tell(webhook, as_json)


@webhooks.command()
def remove(id: WebhookId) -> None:
    """Tell an address nothing more, and forget what it was told."""
    with connect() as client:
        client.delete_webhook(id)
    typer.echo(f"webhook {id} is gone")


@webhooks.command()
def enable(id: WebhookId, as_json: AsJson = False) -> None:
    """Go on telling an address that answered that it is gone."""
    with connect() as client:
        _tell(client.enable_webhook(id), as_json)


@webhooks.command()
def deliveries(id: WebhookId, as_json: AsJson = False) -> None:
    """What a webhook was told or is to be told lately, the newest first."""
    with connect() as client:
        for delivery in client.deliveries(id):
            _tell(delivery, as_json)


@webhooks.command()
def resend(
    id: WebhookId, delivery: Annotated[UUID, typer.Argument(help="As `deliveries` shows it.")], as_json: AsJson = False
) -> None:
    """Tell it once more, at once and under the same id."""
    with connect() as client:
        found = next((one for one in client.deliveries(id) if one.id == delivery), None)
        if found is None:
            raise typer.BadParameter(f"the webhook has no delivery {delivery}")
        _tell(client.resend(found), as_json)


def _tell(shown: Webhook | Delivery, as_json: bool) -> None:
    if as_json:
        print_json(shown)
    elif isinstance(shown, Webhook):
        state = f"disabled {shown.disabled_at:%Y-%m-%d %H:%M} UTC" if shown.disabled_at else "enabled"
        console.print(f"{shown.id}  {shown.url}  {','.join(shown.kinds)}{_whose(shown)}  {state}", markup=False)
    else:
        console.print(f"{shown.id}  {shown.kind}  {shown.created_at:%Y-%m-%d %H:%M} UTC  {_went(shown)}", markup=False)


def _whose(webhook: Webhook) -> str:
    return f" of tenant {webhook.tenant}" if webhook.tenant != DEFAULT_TENANT else ""


def _went(delivery: Delivery) -> str:
    if delivery.delivered_at:
        return f"delivered {delivery.delivered_at:%Y-%m-%d %H:%M} UTC"
    ahead = f"next attempt {delivery.next_at:%Y-%m-%d %H:%M} UTC" if delivery.next_at else "no further attempt"
    return f"{delivery.attempts} attempts, {delivery.last_error or 'none ended'}; {ahead}"
