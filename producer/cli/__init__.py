"""The command line, ``ovis-batch``. Speaks HTTP to a farm, or starts one.

Exit codes, the same for every command:

0    done; every image that was waited for succeeded
1    done, and some image did not succeed
2    bad input or settings, or a dry run of such: the message says what to change; nothing was submitted
3    the farm, or a server that it needs, does not answer
4    no such job, batch or key
130  interrupted; jobs that were submitted go on

A command that runs a part of the farm imports it inside its own function: celery, fastapi, alembic and boto3 take
seconds, and whoever submits, waits or asks for help needs none of them.
"""

import sys
from typing import NoReturn

import typer
from rich.console import Console

from pipeline.errors import PipelineError
from producer.cli import batches, farm, jobs, keys, results, roles, submit, tenants, webhooks
from producer.cli.jobs import EXIT_BAD_INPUT
from producer.client import ClientError, NotFound, Overloaded, ServerError, Unauthorized, Unreachable
from producer.jobs import errors
from producer.jobs.errors import FarmError, Unavailable
from producer.jobs.settings import told

EXIT_UNREACHABLE = 3
EXIT_NOT_FOUND = 4
EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="ovis-batch",
    help="A render farm for Ovis-Image: hand in prompts, get images.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for module in (submit, jobs, results, batches, farm, roles):
    for command in module.COMMANDS:
        app.command()(command)
app.add_typer(keys.keys, name="keys")
app.add_typer(tenants.tenants, name="tenants")
app.add_typer(webhooks.webhooks, name="webhooks")


def main() -> NoReturn:
    """Run the command line and exit with one of the codes above."""
    try:
        code = app(standalone_mode=False)
    except typer.Abort:
        sys.exit(EXIT_INTERRUPTED)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except (FarmError, PipelineError, ClientError) as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            f"ovis-batch: {told(error)}{_hint(error)}", markup=False
        )
        sys.exit(_exit_code(error))
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except Exception as error:
        show = getattr(error, "show", None)  # click's own errors: a wrong option, a missing argument
        if show is None:
            raise
        show()
        sys.exit(EXIT_BAD_INPUT)
    sys.exit(code if isinstance(code, int) else 0)


def _hint(error: Exception) -> str:
    if isinstance(error, Unreachable):
        return ": start a farm with `ovis-batch up`, or set OVIS_API_URL"
    if isinstance(error, Overloaded) and error.retry_after_s is not None:
        return f": come back in {error.retry_after_s:,.0f} s"
    return ": set OVIS_API_KEY to one that holds" if isinstance(error, Unauthorized) else ""


def _exit_code(error: Exception) -> int:
    if isinstance(error, NotFound | errors.NotFound):
        return EXIT_NOT_FOUND
    return EXIT_UNREACHABLE if isinstance(error, Unreachable | ServerError | Unavailable) else EXIT_BAD_INPUT
