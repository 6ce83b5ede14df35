"""Which sequences of a compiled batch are run again: some of them, as long as that comes to the same; else all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from entropy_hooks.structures import tensors_in
from entropy_monitor.types import PATCH_LENGTH

if TYPE_CHECKING:
    from collections.abc import Sequence

    from entropy_hooks.tokens import PatchSample, PatchSampler
    from entropy_hooks.twin import Twin

_MIN_SEQUENCES = 4
_MAX_OUTPUT_ENTRIES = 1 << 26
"""Entries of output gradients kept until the optimizer steps: 256 MB in float32."""


@dataclass(frozen=True, slots=True)
class Part:
    """Some sequences of a batch."""

    rows: list[int]
    batch: int
    """Sequences in all of it."""

    def of(self, structure: Any) -> Any:
        """Take them out of each tensor that has a row a sequence.

        Returns:
            The structure with their rows; what is no such tensor, as it is.
        """
        return pytree.tree_map(self._of_leaf, structure)

    def _of_leaf(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or not leaf.dim() or leaf.shape[0] != self.batch:
            return leaf
        rows = torch.tensor(self.rows)
        if leaf.device.type == "cuda":
            rows = rows.pin_memory().to(leaf.device, non_blocking=True)  # from pageable memory the copy would wait
        return leaf.index_select(0, rows)

    def patches_of_batch(self, sample: PatchSample) -> int:
        """How many whole patches the batch has, where these sequences have those that were drawn from.

        Returns:
            The number, whether a layer sees them as sequences or as the tokens of one.
        """
        return sample.num_batch_patches * self.batch // len(self.rows)


class Parts:
    """Chooses them."""

    def __init__(self, sampler: PatchSampler, token_dim: int | None) -> None:
        self._sampler, self._token_dim = sampler, token_dim
        self.possible = True
        """Sequences of a batch are taken to be independent, until it came out otherwise."""
        self.proven = False
        """A part has been run."""
        self._patches_each: float | None = None
        """Whole patches that a sequence gives, once it has been seen."""

    def learn(self, sample: PatchSample, part: Part | None, batch: int) -> None:
        """A pass has been run again: as many sequences as its patches show to be needed are chosen from now on."""
        self.proven |= part is not None
        if num_sequences := batch if part is None else len(part.rows):
            self._patches_each = sample.num_batch_patches / num_sequences

    def draw(self, twin: Twin, outputs: Sequence[torch.Tensor], returned: Sequence[torch.Tensor]) -> Part | None:
        """Choose sequences of a pass.

        Args:
            twin: has its arguments.
            outputs: tensors with a gradient.
            returned: those of them that the model has returned.

        Returns:
            Some sequences; None where the whole batch is to be run.
        """
        tensors, reached = tensors_in((twin.args, twin.kwargs))
        batch = batch_of(twin)
        alike = batch and all(leaf.dim() and leaf.shape[0] == batch for leaf in outputs) and outputs
        if not self.possible or not reached or not alike or _is_ambiguous(tensors, batch) or self._time_first(twin):
            return None
        length = next((leaf.shape[1] for leaf in returned if leaf.dim() > 2), None)
        each = self._patches_each or max(1, (length or PATCH_LENGTH) // PATCH_LENGTH)
        at_least = PATCH_LENGTH if length is None else _MIN_SEQUENCES  # rows that are tokens make a patch together
        fit = _MAX_OUTPUT_ENTRIES // max(1, sum(leaf[0].numel() for leaf in returned))
        rows = self._sampler.draw_sequences(batch, at_least, max(1, fit), each)
        return Part(rows, batch) if len(rows) < batch else None

    def _time_first(self, twin: Twin) -> bool:
        return self._token_dim == 0 or any(
            getattr(module, "batch_first", True) is False for module in twin.model.modules()
        )


def batch_of(twin: Twin) -> int:
    """Length of the first argument that has one.

    Returns:
        The sequences in the batch, if it is the first dimension all along.
    """
    tensors, _ = tensors_in((twin.args, twin.kwargs))
    return next((tensor.shape[0] for tensor in tensors if tensor.dim()), 0)


def _is_ambiguous(tensors: Sequence[torch.Tensor], batch: int) -> bool:
    """Which tensors have a row a sequence cannot be told from lengths alone: a mask, positions, a state ``[1, B, d]``.

    Returns:
        True or False.
    """
    first = next(tensor for tensor in tensors if tensor.dim())
    as_long = first.dim() > 1 and first.shape[1] == batch
    return as_long or any(batch in tensor.shape and tensor.shape[0] != batch for tensor in tensors)
