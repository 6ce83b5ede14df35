"""Scalars of every optimizer step, batched so that a GPU's losses are fetched about once a second."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from entropy_hooks.writer import ScalarsJob

if TYPE_CHECKING:
    from entropy_hooks.host import Ring

_PERIOD_S = 1.0
_MAX_ROWS = 256


class ScalarsBatch:
    """Collects rows; what was computed on the device stays there until a job takes it."""

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._rows: list[dict[str, float]] = []
        self._figures: list[tuple[torch.Tensor | None, torch.Tensor | None]] = []
        self._last_job = time.monotonic()

    def add(self, row: dict[str, float], loss: torch.Tensor | None, grad_norm: torch.Tensor | None) -> None:
        """Take one step's scalars; `loss` and `grad_norm` are 0-d, on any device."""
        self._rows.append(row)
        self._figures.append((loss, grad_norm))

    @property
    def due(self) -> bool:
        """Whether a job should be made now."""
        return len(self._rows) >= _MAX_ROWS or time.monotonic() - self._last_job >= _PERIOD_S

    def take_job(self) -> ScalarsJob | None:
        """Start the copy of what has been collected.

        Returns:
            A job, or None when there is nothing.
        """
        self._last_job = time.monotonic()
        if not self._rows:
            return None
        rows, figures, self._rows, self._figures = self._rows, self._figures, [], []
        flat = [figure for pair in figures for figure in pair]
        device = next((figure.device for figure in flat if figure is not None), torch.device("cpu"))
        nan = torch.full((), float("nan"), device=device)
        stacked = torch.stack([nan if figure is None else figure.float().to(device) for figure in flat])
        on_host = torch.empty(len(flat), dtype=torch.float32, pin_memory=stacked.is_cuda)
        return ScalarsJob(rows, on_host, self._ring.start_copy([stacked], [on_host]))
