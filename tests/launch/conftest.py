from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

sys.path.insert(0, str(Path(__file__).parent / "jobs"))  # as the jobs themselves have it


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
