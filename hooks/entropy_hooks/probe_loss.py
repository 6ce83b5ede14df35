"""The loss of a probe batch, where the user gave no function for it: read off the model's output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F

from entropy_hooks.taps import first_tensor

if TYPE_CHECKING:
    from collections.abc import Iterable


def find_loss(output: Any, ids: torch.Tensor | None, num_ids: int, *, sequence_first: bool) -> torch.Tensor | None:
    """Take the loss that the model returns, else the cross-entropy of each next token.

    Args:
        output: what the model returned.
        ids: token ids that went into its embedding, ``[B, T]``.
        num_ids: rows of that embedding. Fewer scores are not those of tokens, and a target beyond them would end a
            CUDA process.
        sequence_first: ids and scores are ``[T, B]`` and ``[T, B, V]``.

    Returns:
        A 0-d tensor; None where there is no such loss.
    """
    entries = output if isinstance(output, tuple) else ()
    for candidate in (_entry(output, "loss"), output, *entries):
        if isinstance(candidate, torch.Tensor) and candidate.dim() == 0 and candidate.requires_grad:
            return candidate
    logits = _entry(output, "logits")
    scores = logits if isinstance(logits, torch.Tensor) else first_tensor(output)
    if scores is None or ids is None or scores.dim() != 3 or scores.shape[:2] != ids.shape:
        return None
    if sequence_first:
        scores, ids = scores.transpose(0, 1), ids.T
    if scores.shape[-1] < num_ids or ids.shape[1] < 2 or not scores.requires_grad:
        return None
    return F.cross_entropy(scores[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten().long())


def depends_on(loss: torch.Tensor, parameters: Iterable[torch.Tensor]) -> bool:
    """Walk the graph of a loss until it meets one of the parameters; nothing is computed.

    Args:
        loss: a tensor that requires a gradient.
        parameters: parameters; frozen ones are in no graph.

    Returns:
        Whether one of them is met.
    """
    wanted = {id(parameter) for parameter in parameters}
    waiting: list[Any] = [get_gradient_edge(loss).node]
    seen: set[Any] = set(waiting)
    while waiting:
        node = waiting.pop()
        if id(getattr(node, "variable", None)) in wanted:  # where a gradient is accumulated into a leaf
            return True
        before = {previous for previous, _ in node.next_functions if previous is not None} - seen
        seen |= before
        waiting.extend(before)
    return False


def _entry(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
