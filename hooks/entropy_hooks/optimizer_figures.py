"""What is read off the optimizer at a step boundary."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch.optim import Optimizer


def gradient_norm(optimizers: Sequence[Optimizer]) -> torch.Tensor | None:
    """Norm of all gradients, as the optimizers see them.

    Returns:
        A 0-d tensor on their device; None without gradients, or where this rank holds a part of them (DTensor): adding
        the parts up would take a collective.
    """
    gradients = {id(optimizer): list(_gradients(optimizer)) for optimizer in optimizers}
    everything = [gradient for some in gradients.values() for gradient in some]
    if not everything or any(hasattr(gradient, "placements") for gradient in everything):
        return None
    # GradScaler leaves it to a fused optimizer to unscale its gradients as it steps.
    scales = {id(optimizer): getattr(optimizer, "grad_scale", None) for optimizer in optimizers}
    if all(scale is None for scale in scales.values()):
        return torch.nn.utils.get_total_norm(everything)
    norms = [torch.nn.utils.get_total_norm(some) / _or_one(scales[key]) for key, some in gradients.items() if some]
    return torch.nn.utils.get_total_norm(norms)


def _or_one(scale: torch.Tensor | None) -> torch.Tensor | float:
    return 1.0 if scale is None else scale  # the truth of a tensor would wait for its device


def _gradients(optimizer: Optimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                yield parameter.grad.coalesce().values() if parameter.grad.is_sparse else parameter.grad


def learning_rate(optimizer: Optimizer) -> float:
    """Learning rate of the first parameter group.

    Returns:
        The rate; NaN where it is kept on a GPU, for reading it would wait for the device.
    """
    rate = optimizer.param_groups[0].get("lr", float("nan"))
    if isinstance(rate, torch.Tensor):
        return float(rate) if rate.device.type == "cpu" else float("nan")
    return float(rate)
