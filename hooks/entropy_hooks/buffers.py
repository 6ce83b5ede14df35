"""Memory on the CPU for what the hooks copy in a sampled step, used again and again.

Copies that are allocated in each sampled step and freed by the writer thread upset the training's own heap: the C
library gives its end back to the system, and the steps that follow pay for the pages again, more than for the copying.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TypeAlias

    _Given: TypeAlias = tuple[torch.Tensor, torch.Tensor, weakref.ref[torch.Tensor]]
    """A piece of memory, a tensor in it, and that tensor's twin that was last given away."""

_SLAB_BYTES = 1 << 26
"""Pages of it are only taken when they are written to; so large a piece lies outside the C library's heap."""
_MAX_SLABS = 4
"""What does not fit is allocated as any tensor."""
_MIN_BYTES = 1 << 12
_LOOKS = 4
"""Tensors that are asked whether they are still held, before new memory is taken."""


class Buffers:
    """Gives tensors whose memory is taken back when nobody holds them any more."""

    def __init__(self) -> None:
        self._slabs: list[torch.Tensor] = []
        self._used = _SLAB_BYTES
        """Bytes of the newest slab."""
        self._given: dict[int, deque[_Given]] = {}
        """By size, powers of two; the longest given first."""

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Give a tensor with anything in it. A view of it must not outlive it.

        Returns:
            A contiguous tensor on the CPU.
        """
        num_bytes = math.prod(shape) * dtype.itemsize
        size = max(_MIN_BYTES, 1 << (num_bytes - 1).bit_length())
        memory, shaped, _ = self._taken_back(size) or (self._carve(size), None, None)
        if memory is None:
            return torch.empty(tuple(shape), dtype=dtype, device="cpu")
        if shaped is None or shaped.shape != shape or shaped.dtype != dtype:
            shaped = memory[:num_bytes].view(dtype).view(*shape)
        tensor = shaped.detach()
        self._given[size].append((memory, shaped, weakref.ref(tensor)))
        return tensor

    def _taken_back(self, size: int) -> _Given | None:
        """Memory that nobody holds any more; tensors come back about in the order in which they were given."""
        given = self._given.setdefault(size, deque())
        for _ in range(min(_LOOKS, len(given))):
            entry = given.popleft()
            if entry[2]() is None:
                return entry
            given.append(entry)  # held long: not looked at again before all others
        return None

    def _carve(self, size: int) -> torch.Tensor | None:
        if size > _SLAB_BYTES:
            return None
        if self._used + size > _SLAB_BYTES:
            if len(self._slabs) == _MAX_SLABS:
                return None
            with torch.inference_mode(mode=False):  # what is made in that mode cannot be written into outside it
                self._slabs.append(torch.empty(_SLAB_BYTES, dtype=torch.uint8, device="cpu"))
            self._used = 0
        first, self._used = self._used, self._used + size
        return self._slabs[-1][first : first + size]
