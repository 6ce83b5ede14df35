"""From the device to the writer: a small ring of host buffers, and copies that nobody waits for in the training step.

On CUDA the buffers are pinned, the copies run on a side stream and an event marks their end; on the CPU the same copies
are made by the writer thread. A full ring drops the frame.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

RING_SLOTS = 4


@dataclass(slots=True)
class HostCopy:
    """Device tensors on their way to host buffers."""

    sources: list[torch.Tensor]
    targets: list[torch.Tensor]
    event: torch.cuda.Event | None = None

    def finish(self) -> None:
        """Make the targets valid; called by the writer thread, and may wait there."""
        if self.event is not None:
            self.event.synchronize()
        else:
            for target, source in zip(self.targets, self.sources, strict=True):
                target.copy_(source)
        self.sources = []


@dataclass(slots=True)
class Slot:
    """Host buffers of one frame in flight, reused as long as the shapes stay."""

    buffers: dict[str, torch.Tensor] = field(default_factory=dict)

    def buffer(self, name: str, shape: Sequence[int], dtype: torch.dtype, *, pinned: bool) -> torch.Tensor:
        """A host buffer of the wanted shape.

        Returns:
            The slot's buffer of that name, its old contents still in it.
        """
        found = self.buffers.get(name)
        if found is None or tuple(found.shape) != tuple(shape) or found.dtype != dtype:
            found = self.buffers[name] = torch.empty(tuple(shape), dtype=dtype, pin_memory=pinned)
        return found


class Ring:
    """Bounds the frames in flight."""

    def __init__(self, slots: int = RING_SLOTS) -> None:
        self._lock = threading.Lock()
        self._free = [Slot() for _ in range(slots)]
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def acquire(self) -> Slot | None:
        """Take a slot.

        Returns:
            The slot, or None when every one is in flight: then the frame is dropped.
        """
        with self._lock:
            return self._free.pop() if self._free else None

    def release(self, slot: Slot) -> None:
        """Give a slot back."""
        with self._lock:
            self._free.append(slot)

    def start_copy(self, sources: list[torch.Tensor], targets: list[torch.Tensor]) -> HostCopy:
        """Begin to copy tensors to host buffers.

        Args:
            sources: tensors on one device; the copy keeps them alive until it is finished.
            targets: host buffers of the same shapes; a smaller dtype converts on the device.

        Returns:
            The copy.
        """
        copy = HostCopy(sources, targets)
        device = next((source.device for source in sources if source.is_cuda), None)
        if device is None:
            return copy
        stream = self._streams.get(device) or self._streams.setdefault(device, torch.cuda.Stream(device))
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            converted = [source.to(target.dtype) for source, target in zip(sources, targets, strict=True)]
            for source, target in zip(converted, targets, strict=True):
                target.copy_(source, non_blocking=True)
            copy.event = torch.cuda.Event()
            copy.event.record(stream)
        copy.sources = sources + converted
        return copy
