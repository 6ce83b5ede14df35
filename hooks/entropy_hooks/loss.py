"""The loss and its scale, read off the graph below the backward root before the pass frees it.

GradScaler and gradient accumulation multiply the loss by constants; what is recorded is the loss before them, and what
steering adds is multiplied by them. A sum that is divided is a mean, not a scaled loss: masked losses divide by the sum
of the mask, the Hugging Face Trainer each micro-batch's summed cross-entropy by the tokens of all micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

_SUM = 2  # `at::Reduction::Sum`
_MAX_DEPTH = 16  # scalar operations between a loss and its root; a longer chain is a model, not a scale


@dataclass(frozen=True, slots=True)
class LossReading:
    """What one backward root says."""

    loss: torch.Tensor | None
    """The loss before its constant factors, 0-d and detached, on its device; None when the root is no scalar."""
    scale: torch.Tensor | float
    """d(root)/d(loss), times the gradient passed to ``backward``."""
    ambiguous: bool
    """Several loss terms are added: their common scale may differ from any one term's."""

    def plus(self, later: LossReading) -> LossReading:
        """Of two backward passes through one forward pass, whose gradients add up.

        Args:
            later: of the second one.

        Returns:
            The sum as the first one's scale has it: ``loss.backward()`` and ``(0.1 * other).backward()`` are the
            loss ``loss + 0.1 * other``.
        """
        if self.loss is None or later.loss is None:  # so also where it was multiplied away
            return LossReading(None, self.scale, ambiguous=True)
        return LossReading(self.loss + later.loss * (later.scale / self.scale), self.scale, ambiguous=True)


def read_loss(roots: tuple[Any, ...], gradients: Any) -> LossReading:
    """Walk from the root through multiplications and divisions by constants.

    Args:
        roots: tensors (or graph edges) that ``backward`` was called with.
        gradients: its ``grad_tensors``.

    Returns:
        The loss and its scale. Nothing is synchronised: both may live on the device.
    """
    root = roots[0]
    if len(roots) != 1 or not isinstance(root, torch.Tensor) or root.numel() != 1:
        return LossReading(None, 1.0, ambiguous=True)
    factor, ambiguous = _constant_factor(root)
    if isinstance(factor, float) and factor == 0.0:
        return LossReading(None, 0.0, ambiguous=ambiguous)  # multiplied away: it cannot be recovered
    value = root.detach().reshape(())
    loss = value.clone() if isinstance(factor, float) and factor == 1.0 else value / factor
    given = gradients[0] if isinstance(gradients, list | tuple) and gradients else gradients
    scale = factor * given.detach().reshape(()) if isinstance(given, torch.Tensor) else factor
    return LossReading(loss, scale, ambiguous)


def _constant_factor(root: torch.Tensor) -> tuple[torch.Tensor | float, bool]:
    factor: torch.Tensor | float = 1.0
    node, index = root.grad_fn, root.output_nr
    for _ in range(_MAX_DEPTH):
        name = "" if node is None else node.name()
        if name == "_DDPSinkBackward":  # DistributedDataParallel passes what the model returns through it unchanged
            node, index = _parents(node)[index]
            continue
        if node is None or name not in {"MulBackward0", "DivBackward0", "AddBackward0", "SubBackward0"}:
            break
        branches = [parent for parent in _parents(node) if parent[0] is not None]
        if len(branches) != 1:
            return factor, name in {"AddBackward0", "SubBackward0"}
        parent: Any = branches[0][0]
        if name == "MulBackward0":
            constant = _constant(node, "_saved_other", "_saved_self")
            if constant is None:
                return factor, True
            if parent.name() == "SumBackward0" and isinstance(constant, float) and constant < 1:
                break  # a mean again, by 1 / number; a scaler multiplies by more
            factor = factor * constant
        elif name == "DivBackward0":
            if _parents(node)[0][0] is None or parent.name() == "SumBackward0":
                break  # constant / loss is no scaling; sum / constant is the loss itself
            constant = _constant(node, "_saved_other")
            if constant is None:
                return factor, True
            factor = factor / constant
            if _is_summed_cross_entropy(parent):
                number = _constant(parent, "_saved_total_weight")
                return (factor, True) if number is None else (factor * number, False)
        node, index = branches[0]
    return factor, False


def _parents(node: Any) -> tuple[tuple[Any, int], ...]:
    return node.next_functions


def _is_summed_cross_entropy(node: Any) -> bool:
    """Such a node keeps the number of its targets, from which the mean is known whatever it was divided by.

    Returns:
        True or False.
    """
    return node.name() in {"NllLossBackward0", "NllLoss2DBackward0"} and node._saved_reduction == _SUM


def _constant(node: Any, *names: str) -> torch.Tensor | float | None:
    """Read a factor off a node.

    Returns:
        Its size: a sign is no scale, ``-1 * log_likelihood`` is the loss itself. None where the user's own hooks have
        packed it (offloading, checkpointing): to unpack it would run their code, and perhaps the model, once more.
    """
    for name in names:
        if getattr(getattr(node, f"_raw{name}", None), "unpack_hook", None) is not None:
            return None
        saved = getattr(node, name, None)
        if isinstance(saved, torch.Tensor):
            return saved.detach().reshape(()).abs() if saved.device.type != "cpu" else abs(float(saved))
        if isinstance(saved, int | float):
            return abs(float(saved))
    return 1.0
