"""What a token is in an activation, and which tokens a step samples.

============================  ==========================================================
activation                    tokens
============================  ==========================================================
``[B, T, d]``                 T positions of B sequences (``[T, B, d]`` with token_dim 0)
``[N, d]``                    N rows, taken as one sequence
``[B, C, H, W]``, ``[B,C,L]`` spatial positions of a convolution, row-major, C features
============================  ==========================================================
"""

from __future__ import annotations

import math
import os
import weakref
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from entropy_hooks.buffers import Buffers
from entropy_monitor.types import PATCH_LENGTH, TOKEN_OFFSETS

_MAX_REMEMBERED = 1024
"""Tensors of one sample whose copies are looked up; a pass meets about four a layer."""

_declared: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
"""Of each tapped module, whether it takes batches first: looking through all that is in it takes long."""


@dataclass(frozen=True, slots=True)
class TokenAxes:
    """Where an activation has its sequences, tokens and features."""

    token_dim: int = 1
    channels_first: bool = False

    def sequences(self, z: torch.Tensor) -> torch.Tensor:
        """View an activation as sequences.

        Returns:
            A tensor ``[B, T, d]``.
        """
        if self.channels_first:
            return z.flatten(2).transpose(1, 2)
        if z.dim() == 2:
            return z.unsqueeze(0)
        return z.transpose(0, 1) if self.token_dim == 0 else z

    def restore(self, sequences: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """The inverse of `sequences`.

        Returns:
            A tensor of the shape of `like`.
        """
        if self.channels_first:
            return sequences.transpose(1, 2).reshape(like.shape)
        if like.dim() == 2:
            return sequences.squeeze(0)
        return sequences.transpose(0, 1) if self.token_dim == 0 else sequences


def axes_of(module: nn.Module, z: torch.Tensor, token_dim: int | None) -> TokenAxes | None:
    """Find the axes of a module's output.

    Args:
        module: the tapped module.
        z: its output.
        token_dim: the user's choice, or None.

    Returns:
        The axes, or None when the output has no tokens that we know of.
    """
    convolution = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) or z.dim() in (4, 5)
    if convolution and z.dim() >= 3:
        return TokenAxes(channels_first=True)
    if z.dim() not in (2, 3):
        return None
    if token_dim is None:
        token_dim = 1 if _batch_first(module) else 0
    return TokenAxes(token_dim=token_dim)


def too_short(layer: str, num_sequences: int, length: int) -> str:
    """What is said of sequences that hold no patch.

    Returns:
        One line.
    """
    return (
        f"expected sequences of 8 tokens or more; found {(num_sequences, length)} in {layer}: give longer ones (the "
        "probe's, too), or attach(token_dim=...) if tokens lie along another axis"
    )


def _batch_first(module: nn.Module) -> bool:
    """The module's own ``batch_first``, or that of a layer in it: a transformer layer keeps it in its attention."""
    if module not in _declared:
        declared = (getattr(inner, "batch_first", None) for inner in module.modules())
        _declared[module] = next((value for value in declared if isinstance(value, bool)), True)
    return _declared[module]


@dataclass(frozen=True, slots=True)
class PatchSample:
    """The tokens that one frame holds, the same in every layer."""

    num_sequences: int
    sequence_length: int
    sequence: torch.Tensor
    """Shape ``[n]``, on the device: which sequence."""
    position: torch.Tensor
    """Shape ``[n]``: where in it."""
    flat: torch.Tensor
    """Shape ``[n]``: row of the batch seen as ``[B * T, d]``."""
    num_patches: int
    buffers: Buffers
    """Memory for what is gathered on the CPU."""
    _selected: dict[tuple[object, ...], tuple[StorageWeakRef, weakref.ref[torch.Tensor]]] = field(
        default_factory=dict[tuple[object, ...], tuple[StorageWeakRef, "weakref.ref[torch.Tensor]"]],
        repr=False,
        compare=False,
    )
    """What has been gathered, by the identity of what it was gathered from; neither is kept alive."""

    @property
    def num_batch_patches(self) -> int:
        """Whole patches in the batch."""
        return self.num_sequences * (self.sequence_length // PATCH_LENGTH)

    def fits(self, sequences: torch.Tensor) -> bool:
        """Whether an activation seen as sequences has the tokens that were drawn from.

        Returns:
            True or False.
        """
        return sequences.dim() == 3 and sequences.shape[:2] == (self.num_sequences, self.sequence_length)

    def select(self, sequences: torch.Tensor) -> torch.Tensor:
        """Gather the sampled tokens.

        One tensor is often met twice: an activation as the next linear layer's input, a gradient at both ends of a
        residual connection. The second time, the first copy is given.

        Args:
            sequences: shape ``[B, T, d]``.

        Returns:
            A tensor ``[n, d]``, not to be written into.
        """
        identity = _identity(sequences)
        if identity is None:
            return self._gather(sequences)
        source, gathered = self._selected.get(identity, (None, None))
        # The weak reference tells a tensor that is still there from another one that took its place in memory.
        if source is not None and gathered is not None and not source.expired():
            selected = gathered()
            if selected is not None:
                return selected
        if len(self._selected) >= _MAX_REMEMBERED:  # a probe's sample serves every step
            self._selected.clear()
        selected = self._gather(sequences)
        self._selected[identity] = StorageWeakRef(sequences.untyped_storage()), weakref.ref(selected)
        return selected

    def again(self) -> PatchSample:
        """The same tokens, for another pass: what was gathered in this one is let go.

        Returns:
            A new sample.
        """
        return replace(self, _selected={})

    def _gather(self, sequences: torch.Tensor) -> torch.Tensor:
        if not sequences.is_contiguous():
            return sequences[self.sequence, self.position]
        rows = sequences.view(-1, sequences.shape[-1])
        if rows.device.type != "cpu" or type(rows) is not torch.Tensor:
            return rows.index_select(0, self.flat)
        buffer = self.buffers.take((len(self.flat), rows.shape[1]), rows.dtype)
        return torch.index_select(rows, 0, self.flat, out=buffer)

    def token_windows(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids around each position; -1 beyond the sequence.

        Args:
            ids: shape ``[B, T]``, integers.

        Returns:
            A tensor ``[n, 6]``, int32, for the offsets of `TOKEN_OFFSETS`.
        """
        offsets = torch.arange(TOKEN_OFFSETS[0], TOKEN_OFFSETS[-1] + 1, device=ids.device)
        positions = self.position[:, None] + offsets
        inside = (positions >= 0) & (positions < self.sequence_length)
        windows = ids[self.sequence[:, None], positions.clamp(0, self.sequence_length - 1)]
        return torch.where(inside, windows, -1).to(torch.int32)


def _identity(tensor: torch.Tensor) -> tuple[object, ...] | None:
    """What tells a tensor's contents from all others while its storage lives.

    Returns:
        None where that cannot be said: subclasses may have no storage, inference tensors count no changes.
    """
    if type(tensor) is not torch.Tensor or tensor.is_inference():
        return None
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor._version


class PatchSampler:
    """Draws whole patches, with a generator of its own: the training job's randomness is never touched."""

    def __init__(self, patches: int, seed: int | None = None) -> None:
        """Begin.

        Args:
            patches: how many to draw; all of them when a batch has fewer.
            seed: of the generator; drawn from the system when None.
        """
        self._patches, self._buffers = patches, Buffers()
        seed = int.from_bytes(os.urandom(7), "little") if seed is None else seed
        self._generator = torch.Generator().manual_seed(seed)

    def draw(self, num_sequences: int, sequence_length: int, device: torch.device) -> PatchSample | None:
        """Draw without replacement, from different sequences as far as there are enough.

        Args:
            num_sequences: sequences in the batch.
            sequence_length: tokens in each.
            device: where the activations are; the indices are copied there once.

        Returns:
            The sample, or None when the sequences are shorter than a patch.
        """
        per_sequence = sequence_length // PATCH_LENGTH
        if per_sequence == 0 or num_sequences == 0:
            return None
        # Column k holds each sequence's k-th patch in its own random order: reading column by column takes one patch of
        # every sequence before any sequence gives a second one.
        order = torch.rand(num_sequences, per_sequence, generator=self._generator).argsort(dim=1)
        shuffled = torch.randperm(num_sequences, generator=self._generator)
        starts = order[shuffled].T.reshape(-1)[: self._patches] * PATCH_LENGTH
        sequence = shuffled.repeat(per_sequence)[: len(starts)]
        position = (starts[:, None] + torch.arange(PATCH_LENGTH)).reshape(-1)
        sequence = sequence.repeat_interleave(PATCH_LENGTH)
        indices = torch.stack([sequence, position, sequence * sequence_length + position])
        if device.type == "cuda":
            indices = indices.pin_memory()  # from pageable memory the copy would wait for the device
        indices = indices.to(device, non_blocking=True)
        return PatchSample(
            num_sequences, sequence_length, indices[0], indices[1], indices[2], len(starts), self._buffers
        )

    def draw_sequences(self, num_sequences: int, at_least: int, at_most: int, patches_each: float) -> list[int]:
        """Draw as many sequences as have all the patches, in order.

        Args:
            num_sequences: sequences in the batch.
            at_least: not fewer than these.
            at_most: nor more than these, which goes before.
            patches_each: whole patches that a sequence has; below 1 where it is a part of one.

        Returns:
            Their numbers; all of them where the batch has no more.
        """
        wanted = min(max(at_least, math.ceil(self._patches / patches_each)), at_most)
        return torch.randperm(num_sequences, generator=self._generator)[:wanted].sort().values.tolist()
