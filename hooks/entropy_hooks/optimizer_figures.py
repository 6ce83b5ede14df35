"""What is read off the optimizer at a step boundary."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.optim import Optimizer


def gradient_norm(optimizers: Sequence[Optimizer]) -> torch.Tensor | None:
    """Norm of all gradients, as the optimizers see them.

    Returns:
        A 0-d tensor on their device; None without gradients, or where this rank holds a part of them (DTensor): adding
        the parts up would take a collective.
    """
    gradients = [
        parameter.grad.coalesce().values() if parameter.grad.is_sparse else parameter.grad
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    ]
    if any(hasattr(gradient, "placements") for gradient in gradients):
        return None
    return torch.nn.utils.get_total_norm(gradients) if gradients else None


def learning_rate(optimizer: Optimizer) -> float:
    """Learning rate of the first parameter group.

    Returns:
        The rate; NaN where it is kept on a GPU, for reading it would wait for the device.
    """
    rate = optimizer.param_groups[0].get("lr", float("nan"))
    if isinstance(rate, torch.Tensor):
        return float(rate) if rate.device.type == "cpu" else float("nan")
    return float(rate)
