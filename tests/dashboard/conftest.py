from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory of runs, which the dashboard is told to show."""
    directory = tmp_path / "runs"
    directory.mkdir()
    monkeypatch.setenv("ENTROPY_MONITOR_RUNS_DIR", str(directory))
    monkeypatch.setenv("ENTROPY_MONITOR_REFRESH_S", "0.2")
    monkeypatch.delenv("ENTROPY_MONITOR_OPERATOR_TOKEN", raising=False)
    monkeypatch.delenv("ENTROPY_MONITOR_KEY", raising=False)
    return directory
