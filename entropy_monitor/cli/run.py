"""``entropy-monitor run``: a training command, unmodified, with hooks."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from entropy_monitor.cli.foreground import run_in_foreground
from entropy_monitor.config import hooks_disabled, load_config
from entropy_monitor.runtime_dir import runtime_dir

if TYPE_CHECKING:
    from collections.abc import Mapping

logger = logging.getLogger(__name__)

_NOTES = "notes.jsonl"


def run(
    context: typer.Context,
    command: Annotated[
        list[str], typer.Argument(help="The command and its arguments, best after --.", metavar="CMD...")
    ],
    run: Annotated[str, typer.Option("--run", help="Run directory; another start of the job is a new attempt of it.")],
    every: Annotated[int | None, typer.Option(min=1, help="Sample every N optimizer steps.")] = None,
    steer: Annotated[
        bool, typer.Option("--steer", help="Let commands change training; else it is only observed.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say what was found in each process.")] = False,
) -> None:
    """Run a training command with hooks: a script, -m, torchrun, accelerate launch; its exit code is the result.

    128 + n when signal n ended it, 127 when it was not found, 126 when it could not be executed.
    """
    given = {name: value for name, value in (("every", every), ("steer", steer or None)) if value is not None}
    load_config(run=run, hooks=given)  # what is wrong is said before anything is started
    if hooks_disabled():
        logger.info("ENTROPY_MONITOR_MODE=disabled: nothing is observed")
        raise typer.Exit(run_in_foreground(command, os.environ))
    directory = _launch_directory()
    try:
        settings = {
            "RUN": run if "://" in run else str(Path(run).absolute()),
            "LAUNCH": str(directory),
            **{name.upper(): str(value).lower() for name, value in given.items()},
            **({"VERBOSE": "1"} if verbose else {}),
        }
        code = run_in_foreground(command, _environment(settings))
        notes = _read_notes(directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    if "step" not in notes and code not in (126, 127):
        hint = "" if "python" in notes else "; no Python in it took our start-up hook (-I, -S and -E keep it out)"
        print(f"entropy-monitor: no optimizer step was seen in: {shlex.join(command)}{hint}", file=sys.stderr)
    raise typer.Exit(code)


def _environment(settings: Mapping[str, str]) -> dict[str, str]:
    """The command's environment: ours first on its Python path.

    Returns:
        A copy with our variables.
    """
    hooks = importlib.util.find_spec("entropy_hooks")  # found, not imported: that takes seconds
    assert hooks is not None
    assert hooks.origin is not None
    paths = [str(Path(hooks.origin).parent / "launch" / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {f"ENTROPY_MONITOR_{name}": value for name, value in settings.items()}
    return {**os.environ, **variables, "PYTHONPATH": os.pathsep.join(paths)}


def _launch_directory() -> Path:
    """Where the processes of this launch meet; those of launchers that were killed are removed.

    Returns:
        A fresh directory.
    """
    parent = runtime_dir()
    for left in parent.glob("launch-*-*"):
        try:
            os.kill(int(left.name.split("-")[1]), 0)
        except ProcessLookupError:
            shutil.rmtree(left, ignore_errors=True)
        except (ValueError, PermissionError):  # nothing of ours
            continue
    return Path(tempfile.mkdtemp(prefix=f"launch-{os.getpid()}-", dir=parent))


def _read_notes(directory: Path) -> set[str]:
    """What the processes have told; see `entropy_hooks.launch.bootstrap.note`.

    Returns:
        The kinds of notes.
    """
    try:
        lines = (directory / _NOTES).read_text(encoding="utf-8").splitlines()
    except OSError:  # not one process had our start-up hook
        return set()
    kinds: set[str] = set()
    for line in lines:
        try:
            kinds.add(json.loads(line)["what"])
        except ValueError:  # its process was killed as it wrote
            continue
        logger.info("%s", line)
    return kinds
