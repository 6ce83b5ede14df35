"""Starting the dashboard: one hardened Streamlit command line, the same for the CLI, the demo and the tests."""

from __future__ import annotations

import ipaddress
import os
import sys
from pathlib import Path
from typing import NoReturn

import entropy_monitor
from entropy_dashboard.settings import ALLOWED_HOSTS, OPERATOR_TOKEN, RUNS_DIR
from entropy_dashboard.theme import STREAMLIT_THEME
from entropy_monitor.errors import ConfigError

DEFAULT_ADDRESS, DEFAULT_PORT = "127.0.0.1", 8501
HARDENING: dict[str, str | bool] = {
    "server.enableCORS": True,
    "server.enableXsrfProtection": True,
    "server.fileWatcherType": "none",
    "server.enableStaticServing": False,
    "server.enableAgentApi": False,
    "browser.gatherUsageStats": False,
    "client.showErrorDetails": "none",
    "client.showErrorLinks": False,
    "client.toolbarMode": "viewer",
    "runner.magicEnabled": False,
}
"""Streamlit's options that keep strangers out and details in."""
_EVERY_ADDRESS = ("0.0.0.0", "::", "[::]", "")
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


def serve(
    runs_dir: str | Path, address: str = DEFAULT_ADDRESS, port: int = DEFAULT_PORT, *, headless: bool = True
) -> NoReturn:
    """Become the dashboard: this process is replaced by the server, so whoever stops it stops the server.

    A child would be left behind when its parent is killed, and would not hear the parent's Ctrl-C.

    Args:
        runs_dir: a directory of runs, or a run.
        address: where to listen.
        port: where to listen.
        headless: False opens a browser.
    """
    line = command(address, port, headless=headless)
    os.execve(line[0], line, environment(runs_dir))


def command(address: str = DEFAULT_ADDRESS, port: int = DEFAULT_PORT, *, headless: bool = True) -> list[str]:
    """The command line of the server; flags, since they outrank every configuration file.

    Args:
        address: where to listen.
        port: where to listen.
        headless: False opens a browser.

    Returns:
        Program and arguments.

    Raises:
        ConfigError: others could reach this address, and no operator token is set.
    """
    if not _is_loopback(address) and not os.environ.get(OPERATOR_TOKEN):
        raise ConfigError(
            f"expected {OPERATOR_TOKEN} to be set for a dashboard that others can reach; found none with address "
            f"{address}: set it to a secret of your choice, or use --address {DEFAULT_ADDRESS} and a tunnel (ssh -L "
            f"{port}:{DEFAULT_ADDRESS}:{port})"
        )
    options = {
        "server.address": address,
        "server.port": port,
        "server.headless": headless,
        **HARDENING,
        **STREAMLIT_THEME,
    }
    script = Path(__file__).with_name("launch") / "app.py"
    flags = [f"--{name}={_text(value)}" for name, value in options.items()]
    flags += [f"--server.allowedHosts={host}" for host in _allowed_hosts(address)]
    return [sys.executable, "-m", "streamlit", "run", str(script), *flags]


def environment(runs_dir: str | Path) -> dict[str, str]:
    """The environment of the server: this process's, and what the dashboard needs to know.

    Args:
        runs_dir: a directory of runs, or a run.

    Returns:
        The variables.
    """
    # A checkout need not be installed; the child finds the same packages as this process.
    roots = [str(Path(package).resolve().parents[1]) for package in (__file__, entropy_monitor.__file__ or "")]
    inherited = os.environ.get("PYTHONPATH")
    python_path = os.pathsep.join([*dict.fromkeys(roots), *([inherited] if inherited else [])])
    return {**os.environ, "PYTHONPATH": python_path, RUNS_DIR: str(Path(runs_dir).absolute())}


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.strip("[]")).is_loopback
    except ValueError:
        return address == "localhost"


def _allowed_hosts(address: str) -> list[str]:
    # Names that a browser may use, against DNS rebinding; none, which is any, where they cannot be known.
    given = os.environ.get(ALLOWED_HOSTS, "").replace(",", " ").split()
    if not given and address in _EVERY_ADDRESS:
        return []
    named = [] if address in _EVERY_ADDRESS else [address.strip("[]")]
    return list(dict.fromkeys([*_LOOPBACK_NAMES, *named, *given]))
