"""Does a replay compute what training computed? A few entries of the outputs tell."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

_COMPARED_ENTRIES = 4096
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Relative difference of outputs that fusion and summation order explain; 5 % for shorter types."""


def few(output: torch.Tensor, rows: Sequence[int] | None) -> torch.Tensor:
    """A few entries of each row that is run again: all of them would be as large as the model's output.

    Args:
        output: of a model.
        rows: None for all.

    Returns:
        A copy, at most some thousand entries.
    """
    output = output.detach()
    parts = [output] if rows is None else [output[row] for row in rows]
    stride = max(1, sum(part.numel() for part in parts) // _COMPARED_ENTRIES)
    return torch.cat([part.reshape(-1)[::stride] for part in parts])


def agreement(
    found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor | None], num_rows: int | None
) -> torch.Tensor:
    """Compare all outputs, as far as fusion lets them agree.

    Args:
        found: what the replay gave.
        expected: `few` of what training gave; None for an output that is not compared.
        num_rows: rows of the batch in the replay, where it is a part.

    Returns:
        A 0-d boolean, on the device: to ask for it here would wait.
    """
    rows = None if num_rows is None else range(num_rows)
    compared = [(index, entries) for index, entries in enumerate(expected) if entries is not None]
    again = [few(found[index], rows) for index, _ in compared] if len(found) == len(expected) else []
    if [one.shape for one in again] != [entries.shape for _, entries in compared]:
        return torch.zeros((), dtype=torch.bool, device=compared[0][1].device)
    return torch.stack([_is_close(one, entries) for one, (_, entries) in zip(again, compared, strict=True)]).all()


def _is_close(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    tolerance = _TOLERANCE.get(expected.dtype, 5e-2)
    return (found.float() - expected.float()).norm() <= tolerance * expected.float().norm()
