"""What is read off the optimizer at a step boundary."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch.optim import Optimizer


def gradient_norm(optimizer: Optimizer) -> torch.Tensor | None:
    """Norm of all gradients, as the optimizer sees them.

    Returns:
        A 0-d tensor on their device; None without gradients.
    """
    gradients = [
        parameter.grad.coalesce().values() if parameter.grad.is_sparse else parameter.grad
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    ]
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
