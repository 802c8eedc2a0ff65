"""API keys from the command line: ``ovis-batch keys create``, ``list``, ``revoke``.

They speak to Postgres directly: the first key must be made while no door of the farm is open, and whoever has the
database's address is its administrator anyway. From elsewhere an administrator's key does the same over HTTP.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Annotated
from uuid import UUID

import typer
from pydantic import ValidationError

from producer.jobs.contract import DEFAULT_TENANT, Scope
from producer.jobs.settings import load_settings

if TYPE_CHECKING:
    from producer.jobs.keys import Keys

keys = typer.Typer(help="Make, list and revoke API keys, in the farm's Postgres itself.", no_args_is_help=True)


@keys.command()
def create(
    name: Annotated[str, typer.Argument(help="What a person will know it by.")],
    tenant: Annotated[str, typer.Option(help="On whose behalf it asks.")] = DEFAULT_TENANT,
    scope: Annotated[list[Scope] | None, typer.Option(help="What it may do; default: submit and read.")] = None,
    admin: Annotated[bool, typer.Option("--admin", help="It may do everything, for every tenant.")] = False,
) -> None:
    """Make a key, and show it this once: standard output holds it and nothing else.

    A farm that listens on its own machine alone, as that of `ovis-batch up` does, asks nobody for one.
    """
    from producer.api.access import at_home
    from producer.api.bodies import KeyRequest

    given = {"scopes": [Scope.ADMIN] if admin else scope} if admin or scope else {}
    try:
        wanted = KeyRequest.model_validate({"name": name, "tenant": tenant, **given})
    except ValidationError as error:
        raise typer.BadParameter("; ".join(f"{fault['loc'][0]}: {fault['msg']}" for fault in error.errors())) from None
    with _keys() as of_farm:
        record, key = of_farm.create(tenant, wanted.name, wanted.scopes)
    may = ", ".join(record.scopes)
    settings = load_settings()
    if at_home(settings.api_host, ()) and not settings.require_keys:
        typer.echo(
            f"an API on this machine alone (OVIS_API_HOST={settings.api_host}, OVIS_REQUIRE_KEYS not set) "
            "asks for no key; this one counts there too",
            err=True,
        )
    typer.echo(f"key {record.id} of tenant {record.tenant} may {may}; it is not shown again:", err=True)
    typer.echo(key)


@keys.command("list")
def list_() -> None:
    """All keys, revoked ones too; none can be read again."""
    with _keys() as of_farm:
        rows = of_farm.list()
    for key in rows:
        end = f"revoked {_minute(key.revoked_at)}" if key.revoked_at else f"used {_minute(key.used_at)}"
        typer.echo(f"{key.id}  {key.shown}…  {key.tenant}  {','.join(key.scopes)}  {end}  {key.name}")


@keys.command()
def revoke(key_id: Annotated[UUID, typer.Argument(help="As `list` shows it.")]) -> None:
    """Revoke a key: it opens nothing from now on."""
    with _keys() as of_farm:
        key = of_farm.revoke(key_id)
    typer.echo(f"key {key.id} ({key.name}) opens nothing any more")


@contextmanager
def _keys() -> Iterator["Keys"]:
    from producer.jobs import schema
    from producer.jobs.keys import Keys
    from producer.jobs.postgres import Database

    database_url = load_settings().require("database_url")
    schema.check(database_url)
    database = Database.at(database_url, connections=1)
    try:
        yield Keys(database)
    finally:
        database.close()


def _minute(moment: datetime | None) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC" if moment else "never"
