"""What the dashboard is told through its environment."""

from __future__ import annotations

import os
from pathlib import Path

RUNS_DIR = "ENTROPY_MONITOR_RUNS_DIR"
REFRESH_S = "ENTROPY_MONITOR_REFRESH_S"
OPERATOR_TOKEN = "ENTROPY_MONITOR_OPERATOR_TOKEN"
KEY = "ENTROPY_MONITOR_KEY"
ALLOWED_HOSTS = "ENTROPY_MONITOR_ALLOWED_HOSTS"
"""Names under which browsers reach a dashboard that listens on every address, separated by commas."""


def runs_dir() -> Path:
    """The directory of runs, or a run itself.

    Returns:
        An absolute path.
    """
    return Path(os.environ.get(RUNS_DIR) or "runs").absolute()


def refresh_s() -> float:
    """Seconds between two looks of one viewer.

    Returns:
        At least 0.2.
    """
    try:
        return max(0.2, float(os.environ.get(REFRESH_S, "1")))
    except ValueError:
        return 1.0


def operator_token() -> str | None:
    """The secret that unlocks control; None disables control.

    Returns:
        The token.
    """
    return os.environ.get(OPERATOR_TOKEN) or None


def signing_key() -> str | None:
    """The secret shared with the trainer, with which commands are signed.

    Returns:
        The key, or None when commands are not signed.
    """
    return os.environ.get(KEY) or None
