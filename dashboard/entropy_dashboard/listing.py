"""Runs below a directory: the only place where a name from a URL meets a path.

A name is a key into the listing, never joined to a path, so nothing outside the directory can be reached.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from entropy_monitor.store.layout import ROOT

if TYPE_CHECKING:
    from pathlib import Path

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]{0,127}")


def list_runs(runs_dir: Path) -> dict[str, Path]:
    """Runs directly below a directory, or the directory itself when it is a run.

    Args:
        runs_dir: what the dashboard was started with.

    Returns:
        Path by name, the most recently active run first. Links are left out, and names that are not plain.
    """
    if _is_run(runs_dir):
        return {runs_dir.name if RUN_NAME.fullmatch(runs_dir.name) else "run": runs_dir}
    try:
        entries = list(runs_dir.iterdir())
    except OSError:
        return {}
    runs = [path for path in entries if RUN_NAME.fullmatch(path.name) and not path.is_symlink() and _is_run(path)]
    return {path.name: path for path in sorted(runs, key=lambda path: (-_last_active(path), path.name))}


def _is_run(path: Path) -> bool:
    root = path / ROOT
    try:
        return not root.is_symlink() and (root / "zarr.json").is_file()
    except OSError:
        return False


def _last_active(path: Path) -> float:
    # A heartbeat is a rename, which touches its directory.
    for place in (path / "heartbeat", path):
        try:
            # Runs that beat side by side must not swap places with every look.
            return place.stat().st_mtime // 300
        except OSError:
            continue
    return 0.0
