"""Memory on the CPU for what the hooks copy in a sampled step, used again and again.

Copies that are allocated in each sampled step and freed by the writer thread upset the training's own heap: the C
library gives its end back to the system, and the steps that follow pay for the pages again, more than for the copying.
"""

from __future__ import annotations

import math
import weakref
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

_SLAB_BYTES = 1 << 26
"""Pages of it are only taken when they are written to; so large a piece lies outside the C library's heap."""
_MAX_SLABS = 4
"""What does not fit is allocated as any tensor."""
_MIN_BYTES = 1 << 12


class Buffers:
    """Gives tensors whose memory is taken back when nobody holds them any more."""

    def __init__(self) -> None:
        self._slabs: list[torch.Tensor] = []
        self._used = _SLAB_BYTES
        """Bytes of the newest slab."""
        self._given: dict[int, list[tuple[torch.Tensor, weakref.ref[torch.Tensor]]]] = {}
        """By size, powers of two: the memory, and the tensor that was last given of it."""

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Give a tensor with anything in it. A view of it must not outlive it.

        Returns:
            A contiguous tensor on the CPU.
        """
        num_bytes = math.prod(shape) * dtype.itemsize
        size = max(_MIN_BYTES, 1 << (num_bytes - 1).bit_length())
        given = self._given.setdefault(size, [])
        for index, (memory, last) in enumerate(given):
            if last() is None:
                tensor = memory[:num_bytes].view(dtype).view(*shape)
                given[index] = memory, weakref.ref(tensor)
                return tensor
        memory = self._carve(size)
        if memory is None:
            return torch.empty(tuple(shape), dtype=dtype, device="cpu")
        tensor = memory[:num_bytes].view(dtype).view(*shape)
        given.append((memory, weakref.ref(tensor)))
        return tensor

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


_buffers: weakref.WeakKeyDictionary[torch.Generator, Buffers] = weakref.WeakKeyDictionary()


def buffers_of(generator: torch.Generator) -> Buffers:
    """The buffers of whoever draws with this generator; they live as long as it does.

    Returns:
        The buffers.
    """
    return _buffers.setdefault(generator, Buffers())
