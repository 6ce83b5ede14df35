"""``entropy-monitor dashboard``: the Streamlit app."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from entropy_monitor.errors import ConfigError


def dashboard(
    runs_dir: Annotated[Path, typer.Argument(help="Directory of runs, or one run.")] = Path("runs"),
    address: Annotated[
        str, typer.Option(help="Address to listen on; others than this machine need a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8501,
) -> None:
    """Serve the dashboard on this machine; read-only unless ENTROPY_MONITOR_OPERATOR_TOKEN is set."""
    try:
        from entropy_dashboard.server import serve
    except ImportError as error:
        raise ConfigError(f"the dashboard needs {error.name}: pip install 'entropy-monitor[dashboard]'") from error
    serve(runs_dir, address=address, port=port)
