from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """One torch thread, no settings from outside, and nothing of ours left behind."""
    for name in ("RUN", "MODE", "KEY", "STEER", "EVERY"):
        monkeypatch.delenv(f"ENTROPY_MONITOR_{name}", raising=False)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    num_threads, original = torch.get_num_threads(), torch.autograd.backward
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
    assert torch.autograd.backward is original
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("entropy-")]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"
