from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True, scope="module")
def runtime() -> Iterator[Path]:
    """A place for sockets of this module's processes; the path of a socket may have 107 bytes only."""
    with tempfile.TemporaryDirectory(prefix="em-") as directory:
        before = os.environ.get("XDG_RUNTIME_DIR")
        os.environ["XDG_RUNTIME_DIR"] = directory
        yield Path(directory, f"entropy-monitor-{os.getuid()}")
        if before is None:
            del os.environ["XDG_RUNTIME_DIR"]
        else:
            os.environ["XDG_RUNTIME_DIR"] = before


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"
