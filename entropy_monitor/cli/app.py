"""The typer application, and how exceptions become one line and an exit code."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from entropy_monitor import __version__
from entropy_monitor.cli import attach, dashboard, demo, doctor, phase, rank, run, status, watch
from entropy_monitor.errors import (
    ConfigError,
    EntropyMonitorError,
    NoSuchProcessError,
    NotARunError,
    RunNotFoundError,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

EXIT_FAILED, EXIT_USAGE, EXIT_NO_RUN = 1, 2, 3

_USAGE_ERROR: Any = typer.BadParameter.__base__
"""Base of all that typer raises about a command line; newer versions no longer take it from click."""

app = typer.Typer(
    name="entropy-monitor",
    help="See, live, how a neural network memorizes and compresses while it trains, and steer it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command(name="demo")(demo.demo)
app.command(name="run", context_settings={"allow_interspersed_args": False})(run.run)
app.command(name="attach")(attach.attach)
app.command(name="detach")(attach.detach)
app.command(name="watch")(watch.watch)
app.command(name="dashboard")(dashboard.dashboard)
app.command(name="status")(status.status)
app.command(name="phase")(phase.phase)
app.command(name="rank")(rank.rank)
app.command(name="doctor")(doctor.doctor)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"entropy-monitor {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    verbose: Annotated[int, typer.Option("--verbose", "-v", count=True, help="Say more; twice for everything.")] = 0,
    version: Annotated[  # read by its callback
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    levels = [logging.WARNING, logging.INFO, logging.DEBUG]
    logging.basicConfig(level=levels[min(verbose, 2)], format="%(levelname)s %(name)s: %(message)s")


def run_command(arguments: Sequence[str]) -> int:
    """Run one command.

    Args:
        arguments: what follows ``entropy-monitor``.

    Returns:
        0 done, 1 failed, 2 usage, 3 no such run or process. Errors are one line on stderr.
    """
    try:
        code = app(args=list(arguments), prog_name="entropy-monitor", standalone_mode=False)
    except _USAGE_ERROR as error:
        return _refuse(error)
    except (typer.Abort, KeyboardInterrupt):
        return EXIT_FAILED
    except (RunNotFoundError, NotARunError, NoSuchProcessError) as error:
        return _fail(error, EXIT_NO_RUN)
    except ConfigError as error:
        return _fail(error, EXIT_USAGE)
    except (EntropyMonitorError, OSError) as error:
        return _fail(error, EXIT_FAILED)
    return int(code or 0)


def _refuse(error: Any) -> int:
    """Say in one line what is wrong with the command line."""
    # Without arguments typer has shown the help already and has no message.
    if message := " ".join(error.format_message().split()):
        command = error.ctx.command_path if error.ctx else "entropy-monitor"
        print(f"error: {message} (see {command} --help)", file=sys.stderr)
    return EXIT_USAGE


def _fail(error: Exception, code: int) -> int:
    logging.getLogger(__name__).debug("", exc_info=error)
    print(f"error: {error}", file=sys.stderr)
    return code
