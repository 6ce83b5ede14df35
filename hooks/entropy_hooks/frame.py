"""From one observed pass to a frame in the writer's queue."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from entropy_hooks.weight_space import Sums, unknown_sums
from entropy_hooks.writer import FrameJob
from entropy_monitor.store import FrameData, FrameLayout, GroupLayout
from entropy_monitor.types import PATCH_LENGTH, TOKEN_OFFSETS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from entropy_hooks.capture import Capture
    from entropy_hooks.faults import Faults
    from entropy_hooks.host import HostCopy, Ring, Slot
    from entropy_hooks.weight_space import WeightSpace
    from entropy_monitor.config import MonitorOptions


@dataclass(slots=True)
class ObservedPass:
    """A captured pass with all that was computed of it on the device."""

    capture: Capture
    loss: torch.Tensor | None = None
    gradient_scale: torch.Tensor | float = 1.0
    """d(backward root)/d(loss), by which the recorded gradients are divided."""
    grad_norm: torch.Tensor | None = None
    contaminated: frozenset[str] = frozenset()
    """Layers whose loss gradient holds steering terms: their alignment is undetermined."""
    weight_space: WeightSpace | None = None
    exact_alignment: torch.Tensor | None = None
    """Cosines ``[L, 2]`` of all tapped layers; None where this step was not audited."""
    num_batch_patches: int | None = None
    """Whole patches in one micro-batch, where the sample was drawn from a part of it."""
    agrees: torch.Tensor | None = None
    """0-d: a replay computed what training did; None where training itself was observed."""
    on_disagreement: Callable[[], None] | None = None
    """Called on the writer's thread, where the answer is known."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What is known of a sampled step once the optimizer has stepped."""

    attempt: int
    step: int
    phase: str
    weight: float
    wall_time_s: float
    num_tokens_seen: int
    lr: float


@dataclass(slots=True)
class _Transfer:
    """Pairs of device tensors and host buffers."""

    slot: Slot
    pinned: bool
    sources: list[torch.Tensor] = field(default_factory=list[torch.Tensor])
    targets: list[torch.Tensor] = field(default_factory=list[torch.Tensor])

    def add(self, name: str, source: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        target = self.slot.buffer(name, source.shape, dtype, pinned=self.pinned)
        self.add_into(source, target)
        return target

    def add_layers(self, sources: Sequence[torch.Tensor | None], target: torch.Tensor, num_tokens: int) -> None:
        """Move one tensor ``[n, d]`` a layer into ``target [L, n, d]``; a missing one becomes NaN."""
        present = [source for source in sources if source is not None]
        if self.pinned and len(present) == len(sources) and num_tokens == target.shape[1]:
            self.add_into(torch.stack(present), target)  # one launch and one copy, not L of each
            return
        for source, row in zip(sources, target, strict=True):
            if source is None:
                row.fill_(float("nan"))
            else:
                self.add_into(source, row[:num_tokens])

    def add_into(self, source: torch.Tensor, target: torch.Tensor) -> None:
        self.sources.append(source)
        self.targets.append(target)


class FrameAssembler:
    """Lays frames out, starts their copies, and says how to build them from the host's buffers."""

    def __init__(self, options: MonitorOptions, layers: Sequence[str], ring: Ring, faults: Faults) -> None:
        self._options, self._ring, self._faults = options, ring, faults
        self._exact_layers = tuple(layers) if options.exact_alignment_every else ()

    def assemble(self, observed: ObservedPass, record: StepRecord, slot: Slot) -> FrameJob:
        """Start one frame on its way.

        Args:
            observed: the pass.
            record: its step.
            slot: a slot of the ring, released by the writer.

        Returns:
            The writer's job.
        """
        capture = observed.capture
        assert capture.sample is not None
        groups = _groups(capture, self._options.patches * PATCH_LENGTH)
        weight_space = observed.weight_space
        layout = FrameLayout(
            groups=groups,
            gradients=self._options.gradients,
            token_window=len(TOKEN_OFFSETS) if capture.token_ids is not None else 0,
            alignment_layers=weight_space.layers if weight_space is not None else (),
            exact_layers=self._exact_layers,
        )
        move = functools.partial(self._move, observed, record, layout, slot)
        if next(iter(capture.activations.values())).device.type == "cuda":
            return FrameJob(layout, slot, *move())

        def build() -> FrameData:  # no copy has to be started: laying the frame out is left to the writer too
            copy, build_moved = move()
            copy.finish()
            return build_moved()

        return FrameJob(layout, slot, self._ring.start_copy([], []), build)

    def _move(
        self, observed: ObservedPass, record: StepRecord, layout: FrameLayout, slot: Slot
    ) -> tuple[HostCopy, Callable[[], FrameData]]:
        """Start the copies into the slot's buffers.

        Returns:
            The copies, and what builds the frame once they are finished.
        """
        capture = observed.capture
        device = next(iter(capture.activations.values())).device
        transfer = _Transfer(slot, pinned=device.type == "cuda")
        blocks = [
            self._add_group(transfer, f"g{index}", group, observed, layout.gradients)
            for index, group in enumerate(layout.groups)
        ]
        tokens = self._add_tokens(transfer, layout.groups[0].num_tokens, capture) if layout.token_window else None
        weight_space = observed.weight_space
        host_sums = self._add_sums(transfer, weight_space) if weight_space is not None else None
        exact = self._add_exact(transfer, observed, device) if self._exact_layers else None
        audit = exact if observed.exact_alignment is not None else None
        nan = torch.full((), float("nan"), device=device)
        known = (observed.loss, observed.grad_norm, observed.agrees)
        figures = [nan if figure is None else figure.detach().float() for figure in known]
        scalars = transfer.add("scalars", torch.stack([figure.to(device) for figure in figures]), torch.float64)

        def build() -> FrameData:
            self._count_non_finite(blocks, record.step)
            loss, grad_norm, agrees = scalars.tolist()
            if agrees == 0 and observed.on_disagreement is not None:
                observed.on_disagreement()
            self._count_failed_probe(loss, audit, record.step)
            sums = host_sums() if host_sums is not None else None
            return FrameData(
                attempt=record.attempt,
                step=record.step,
                phase=record.phase,
                wall_time_s=record.wall_time_s,
                num_patches=capture.sample.num_patches if capture.sample else 0,
                num_tokens_seen=record.num_tokens_seen,
                scalars={"loss": loss, "lr": record.lr, "grad_norm": grad_norm, "weight": record.weight},
                groups=tuple(_bits(block) for block in blocks),
                tokens=None if tokens is None else tokens.numpy(),
                alignment=None if sums is None else sums.parts_LG3.numpy(),
                alignment_info=None if sums is None else sums.info_L4.numpy(),
                exact_alignment=None if exact is None else exact.numpy(),
            )

        return self._ring.start_copy(transfer.sources, transfer.targets), build

    def _add_group(
        self, transfer: _Transfer, name: str, group: GroupLayout, observed: ObservedPass, gradients: bool
    ) -> torch.Tensor:
        shape = (1 + gradients, len(group.layers), group.num_tokens, group.num_features)
        block = transfer.slot.buffer(name, shape, torch.bfloat16, pinned=transfer.pinned)
        activations, recorded = observed.capture.activations, observed.capture.gradients
        num_tokens = len(activations[group.layers[0]])
        block[:, :, num_tokens:] = 0
        transfer.add_layers([activations[layer] for layer in group.layers], block[0], num_tokens)
        if gradients:
            # A gradient that is missing, or that holds steering terms, is not the loss gradient: undetermined.
            clean = [None if layer in observed.contaminated else recorded.get(layer) for layer in group.layers]
            transfer.add_layers(
                [_unscaled(gradient, observed.gradient_scale) for gradient in clean], block[1], num_tokens
            )
        return block

    def _add_sums(self, transfer: _Transfer, weight_space: WeightSpace) -> Callable[[], Sums]:
        """Move the weight-space sums, or leave it to the writer thread to make them.

        Returns:
            What gives them on the host, once the copy is finished.
        """
        if weight_space.sums is not None:
            parts_LG3, info_L4 = weight_space.sums
            on_host = Sums(
                transfer.add("alignment", parts_LG3, torch.float32),
                transfer.add("alignment_info", info_L4, torch.float32),
            )
            return lambda: on_host

        def make() -> Sums:
            try:
                return Sums(*(part.float() for part in weight_space.make_sums()))
            except Exception as error:  # the frame without them is worth keeping
                self._faults.count("hook_error", error)
                return unknown_sums(len(weight_space.layers))

        return make

    def _add_exact(self, transfer: _Transfer, observed: ObservedPass, device: torch.device) -> torch.Tensor:
        cosines_L2 = observed.exact_alignment
        if cosines_L2 is None:  # every frame of a segment has the array
            cosines_L2 = torch.full((len(self._exact_layers), 2), float("nan"), device=device)
        return transfer.add("exact_alignment", cosines_L2.to(device), torch.float32)

    def _add_tokens(self, transfer: _Transfer, num_tokens: int, capture: Capture) -> torch.Tensor:
        target = transfer.slot.buffer("tokens", (num_tokens, len(TOKEN_OFFSETS)), torch.int32, pinned=transfer.pinned)
        target.fill_(-1)
        sample, ids = capture.sample, capture.token_ids
        assert sample is not None
        assert ids is not None
        if ids.dim() == 1:
            ids = ids[None]
        elif ids.dim() == 2 and next(iter(capture.axes.values())).token_dim == 0:
            ids = ids.T
        if tuple(ids.shape) == (sample.num_sequences, sample.sequence_length):
            windows = sample.token_windows(ids)
            transfer.add_into(windows, target[: len(windows)])
        else:
            self._faults.count("other_tokens", f"token ids {tuple(ids.shape)} do not match the first tapped layer")
        return target

    def _count_non_finite(self, blocks: list[torch.Tensor], step: int) -> None:
        # Extremes carry every NaN and infinity, and are found twenty times as fast as `isfinite` of each entry.
        if not all(bool(torch.stack(block[0].aminmax()).isfinite().all()) for block in blocks):
            self._faults.count("non_finite", f"activations at step {step} hold NaN or infinity: undetermined there")

    def _count_failed_probe(self, loss: float, audit_L2: torch.Tensor | None, step: int) -> None:
        """Looked at here, on the host: to ask for the loss where it is made would wait for the device."""
        nothing_found = audit_L2 is not None and bool(audit_L2.isnan().all())
        if nothing_found or (self._options.observe == "probe" and not math.isfinite(loss)):
            self._faults.count(
                "probe_failed",
                "expected a finite loss on the probe batch, with a finite gradient that is not zero; found at step "
                f"{step} one that is not: give attach(probe=...) another batch or loss",
            )


def _unscaled(gradient: torch.Tensor | None, scale: torch.Tensor | float) -> torch.Tensor | None:
    if gradient is None or (isinstance(scale, float) and scale == 1.0):
        return gradient
    return gradient / scale


def _groups(capture: Capture, num_tokens: int) -> tuple[GroupLayout, ...]:
    by_width: dict[int, list[str]] = {}
    for layer, activation in capture.activations.items():
        by_width.setdefault(activation.shape[1], []).append(layer)
    return tuple(
        GroupLayout(layers=tuple(layers), num_tokens=num_tokens, num_features=width, dtype="bfloat16")
        for width, layers in by_width.items()
    )


def _bits(block: torch.Tensor) -> Any:
    return block.view(torch.int16).numpy().view(np.uint16)
