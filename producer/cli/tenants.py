"""Tenants from the command line: what each one's jobs weigh beside the others', and its limits. It speaks HTTP to the
farm, with an administrator's key where keys are required."""

from math import isfinite, nan
from typing import Annotated, Any

import typer

from producer.cli.jobs import AsJson, connect, console, print_json
from producer.client import Tenant
from producer.jobs.errors import SettingsError

UNLIMITED = "none"

tenants = typer.Typer(help="Show and set what tenants weigh, and their limits.", no_args_is_help=True)


@tenants.command("list")
def list_(as_json: AsJson = False) -> None:
    """Tenants that were given a weight or a limit; all others weigh 1 and have none."""
    with connect() as client:
        for tenant in client.tenants():
            _tell(tenant, as_json)


@tenants.command("set")
def set_(
    name: Annotated[str, typer.Argument(help="Need not be known before.")],
    weight: Annotated[float | None, typer.Option(help="Of its share beside other tenants, 0.01 to 100.")] = None,
    max_queued: Annotated[str | None, typer.Option(help="Jobs that may wait; 'none': no limit.")] = None,
    max_a_day: Annotated[str | None, typer.Option(help="Jobs submitted in 24 hours; 'none': no limit.")] = None,
    max_running: Annotated[str | None, typer.Option(help="Images drawn at the same time; 'none': no limit.")] = None,
    max_requests_s: Annotated[
        str | None, typer.Option(help="Requests a second to each API process; 'none': no limit.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Change a tenant's weight and limits, for what waits already too. What is not named stays."""
    limits = {
        "max_queued": max_queued,
        "max_a_day": max_a_day,
        "max_running": max_running,
        "max_requests_s": max_requests_s,
    }
    changes: dict[str, Any] = {field: _limit(field, text) for field, text in limits.items() if text is not None}
    if weight is not None:
        changes["weight"] = weight
    if not changes:
        raise SettingsError("say what changes: --weight, or a limit")
    with connect() as client:
        _tell(client.set_tenant(name, **changes), as_json)


def _limit(field: str, text: str) -> float | None:
    """Raises: SettingsError."""
    if text == UNLIMITED:
        return None
    try:
        number = float(text)
    except ValueError:
        number = nan
    if not isfinite(number):
        raise SettingsError(f"--{field.replace('_', '-')}: {text!r} is neither a number nor {UNLIMITED!r}")
    return int(number) if number.is_integer() else number


def _tell(tenant: Tenant, as_json: bool) -> None:
    if as_json:
        print_json(tenant)
        return
    limits = {
        "waiting": tenant.max_queued,
        "a day": tenant.max_a_day,
        "drawn at once": tenant.max_running,
        "requests a second": tenant.max_requests_s,
    }
    told = ", ".join(f"{most:,} {what}" for what, most in limits.items() if most is not None)
    console.print(f"{tenant.name}  weight {tenant.weight:g}  at most {told or 'anything'}", markup=False)
