"""Mutual information over a sliding window of sampled tokens: one step alone holds too few."""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch

from entropy_monitor.catalog import METRICS
from entropy_monitor.estimators import backoff_labels, information_plane
from entropy_monitor.types import PATCH_LENGTH, TOKEN_OFFSETS, Measurement
from entropy_monitor.watcher.soft import determined_patches, join_layers
from entropy_monitor.watcher.steady_bias import SteadyBias

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from entropy_monitor.estimators import InformationPlane
    from entropy_monitor.types import Frame
    from entropy_monitor.watcher.soft import Assignments

MIN_TOKENS = 16384
"""Tokens below which no information is stated; with 512 a step, 32 steps."""
_INPUTS = [TOKEN_OFFSETS.index(offset) for offset in (0, -1, -2)]
_OUTPUTS = [TOKEN_OFFSETS.index(offset) for offset in (1, 2, 3)]
"""Columns of a token window, nearest first."""
_REMEMBERED = 4096
"""Ranks of steps: a late rank's frame comes within seconds of the others', or its tokens are taken as new."""
_UNITS = {metric.name: metric.unit for metric in METRICS}


class WindowExtent(NamedTuple):
    """What the information figures of a row were computed from."""

    first_step: int
    num_tokens: int
    num_samples: int
    """Steps that it takes to replace its tokens, at least 2."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowMeasurements:
    """What the window says after a step."""

    measurements: tuple[Measurement, ...] = ()
    faults: Mapping[str, int] = field(default_factory=dict[str, int])
    """Layers by what left them undetermined: ``layers_vary``, the layer was skipped, or had no usable token, in a step
    that the window holds; ``repeated_tokens``, the window holds the same text again and again, which feigns both
    information and its certainty."""


@dataclass(slots=True)
class _Ring:
    """The newest tokens of layers that share them: a buffer that is written from the start again once it is full."""

    layers: list[str]
    p_NLM: Tensor
    """NaN for a layer that had no usable token in the row's step."""
    tokens_NW: Tensor
    step_N: Tensor
    num_tokens: int = 0
    """Tokens held."""
    newest: slice = field(default_factory=lambda: slice(0, 0))
    """Where the tokens of the last call are."""
    bias: SteadyBias = field(default_factory=SteadyBias)
    seen: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    """Steps and ranks whose tokens were taken last, so that a correction adds the late rank's alone."""

    @classmethod
    def empty(cls, num_bins: int) -> _Ring:
        tokens_NW = torch.empty(0, len(TOKEN_OFFSETS), dtype=torch.int64)
        return cls([], torch.empty(0, 0, num_bins), tokens_NW, torch.empty(0, dtype=torch.int64))

    def add_layers(self, layers: Sequence[str]) -> None:
        """Make room for layers that have not been seen before."""
        missing = [layer for layer in layers if layer not in self.layers]
        if missing:
            shape = (len(self.p_NLM), len(missing), self.p_NLM.shape[2])
            self.p_NLM = torch.cat([self.p_NLM, self.p_NLM.new_full(shape, math.nan)], dim=1)
            self.layers += missing

    def append(self, layers: Sequence[str], p_NLM: Tensor, tokens_NW: Tensor, step: int) -> None:
        """Take in rows, over the oldest ones once the window is full."""
        start = self.newest.stop if self.newest.stop < MIN_TOKENS else 0
        stop = start + len(p_NLM)
        self._reserve(stop)
        self.newest = slice(start, stop)
        # What lies behind the end of a full buffer has been there for a whole round: it is let go.
        self.num_tokens = stop if stop >= MIN_TOKENS else max(self.num_tokens, stop)
        if list(layers) != self.layers:
            whole_NLM = p_NLM.new_full((len(p_NLM), *self.p_NLM.shape[1:]), math.nan)
            whole_NLM[:, [self.layers.index(layer) for layer in layers]] = p_NLM
            p_NLM = whole_NLM
        self.p_NLM[self.newest], self.tokens_NW[self.newest], self.step_N[self.newest] = p_NLM, tokens_NW, step

    def _reserve(self, num_rows: int) -> None:
        """Grow the buffer; what is held stays where it is."""
        if num_rows > len(self.step_N):
            grown = max(num_rows, min(2 * num_rows, MIN_TOKENS))
            self.p_NLM, self.tokens_NW, self.step_N = (
                torch.cat([tensor, tensor.new_empty(grown - len(tensor), *tensor.shape[1:])])
                for tensor in (self.p_NLM, self.tokens_NW, self.step_N)
            )


@dataclass(slots=True)
class InformationWindow:
    """Keeps the soft assignments of at least `MIN_TOKENS` tokens of an attempt, and measures them."""

    attempt: int = 0
    rings: list[_Ring] = field(default_factory=list[_Ring])
    """One for each set of layers that share tokens: several only where ranks hold different layers."""

    def advance(self, frames: Sequence[Frame], assignments: Sequence[Assignments]) -> WindowMeasurements:
        """Take in one step, and measure the window that ends with it.

        Patches whose next tokens lie beyond their sequence are left out, and those with a token that has no direction
        (zero, or not finite) in a layer where others have. An input that begins before its sequence does is told apart
        by the missing tokens.

        Args:
            frames: the step's frames; a step of a new attempt empties the window.
            assignments: of their tokens.

        Returns:
            Information and optimality of each layer; nothing while the window holds fewer than `MIN_TOKENS` tokens, or
            where the step's own tokens could not be used.
        """
        faults: Counter[str] = Counter()
        measurements: list[Measurement] = []
        for ring in self.add(frames, assignments):
            if ring.num_tokens < MIN_TOKENS:
                continue
            if _is_repetition(ring.tokens_NW[: ring.num_tokens]):
                faults["repeated_tokens"] += len(ring.layers)
                continue
            sound_L = ~ring.p_NLM[: ring.num_tokens, :, 0].isnan().any(0)
            faults["layers_vary"] += int((~sound_L).sum())
            if sound_L.any():
                measurements += _measure(ring, sound_L, frames[0])
        return WindowMeasurements(
            measurements=tuple(measurements), faults={kind: count for kind, count in faults.items() if count}
        )

    def add(self, frames: Sequence[Frame], assignments: Sequence[Assignments]) -> list[_Ring]:
        """Take in one step without measuring.

        Args:
            frames: the step's frames.
            assignments: of their tokens.

        Returns:
            Where tokens have been added.
        """
        if frames and frames[0].attempt != self.attempt:
            self.attempt, self.rings = frames[0].attempt, []
        added: list[_Ring] = []
        for assigned in join_layers(assignments):
            if assigned.tokens_NW is None:
                continue
            ring = next((ring for ring in self.rings if set(ring.layers) & set(assigned.layers)), None)
            seen = ring.seen if ring else ()
            is_new = [(frames[0].step, rank) not in seen for rank in assigned.ranks]
            rows_N = _usable_rows(assigned.p_NLM, assigned.tokens_NW, is_new, assigned.num_tokens)
            if not len(rows_N):
                continue
            if ring is None:
                ring = _Ring.empty(assigned.p_NLM.shape[2])
                self.rings.append(ring)
            ring.add_layers(assigned.layers)
            p_NLM = assigned.p_NLM if len(rows_N) == len(assigned.p_NLM) else assigned.p_NLM[rows_N]
            ring.append(assigned.layers, p_NLM, assigned.tokens_NW[rows_N], frames[0].step)
            ring.seen.extend((frames[0].step, rank) for rank in assigned.ranks)
            added.append(ring)
        return added

    @property
    def extent(self) -> WindowExtent | None:
        """What the newest figures were computed from: of layers with windows of their own, the smallest."""
        full = [ring for ring in self.rings if ring.num_tokens >= MIN_TOKENS]
        if not full:
            return None
        ring = min(full, key=lambda ring: ring.num_tokens)
        newest = ring.newest.stop - ring.newest.start
        first_step = int(ring.step_N[: ring.num_tokens].min())
        return WindowExtent(first_step, ring.num_tokens, max(2, -(-ring.num_tokens // newest)))


def _measure(ring: _Ring, sound_L: Tensor, frame: Frame) -> Iterator[Measurement]:
    held = slice(ring.num_tokens)
    p_NLM, tokens_NW = ring.p_NLM[held], ring.tokens_NW[held]
    plane = information_plane(
        p_NLM if bool(sound_L.all()) else p_NLM[:, sound_L].contiguous(),
        backoff_labels(tokens_NW[:, _INPUTS]),
        backoff_labels(tokens_NW[:, _OUTPUTS]),
        patch=PATCH_LENGTH,
        influence=ring.newest,
    )
    layers = [layer for layer, sound in zip(ring.layers, sound_L.tolist(), strict=True) if sound]
    for metric, value_L, std_error_L in _figures(ring.bias.apply(plane, layers)):
        for layer, value, std_error in zip(layers, value_L.tolist(), std_error_L.tolist(), strict=True):
            yield Measurement(
                run_id=frame.run_id,
                step=frame.step,
                layer=layer,
                metric=metric,
                value=value,
                unit=_UNITS[metric],
                std_error=std_error if math.isfinite(value) else math.nan,
                num_samples=ring.num_tokens,
            )


def _usable_rows(p_NLM: Tensor, tokens_NW: Tensor, is_new: Sequence[bool], num_tokens: Sequence[int]) -> Tensor:
    """Choose whole patches of new ranks, with known next tokens, that every layer can use that can use any.

    Returns:
        Indices of rows, ascending.
    """
    is_new_N = torch.tensor(is_new).repeat_interleave(torch.tensor(num_tokens))
    known_N = is_new_N & (tokens_NW[:, _OUTPUTS] >= 0).all(-1) & (tokens_NW[:, _INPUTS[0]] >= 0)
    determined_LB = determined_patches(p_NLM)
    # A layer without any is left out of the step by itself; the others need not suffer for it.
    usable_B = known_N.view(-1, PATCH_LENGTH).all(-1) & determined_LB[determined_LB.any(-1)].all(0)
    usable_B &= determined_LB.any()
    return usable_B.repeat_interleave(PATCH_LENGTH).nonzero()[:, 0]


def _is_repetition(tokens_NW: Tensor) -> bool:
    """Whether many patches of the window are the same text: a fixed batch, or a small data set seen again and again.

    Returns:
        True where fewer than three quarters of the patches are distinct.
    """
    patches_BT = tokens_NW.reshape(-1, PATCH_LENGTH * tokens_NW.shape[1])
    return len(torch.unique(patches_BT, dim=0)) < 0.75 * len(patches_BT)


def _figures(plane: InformationPlane) -> Iterator[tuple[str, Tensor, Tensor]]:
    for side, informations in (("input", plane.input), ("output", plane.output)):
        for order, information in enumerate(informations, 1):
            yield f"mi_{side}_{order}", information.value, information.std_error
    optimality = plane.optimality[0]
    yield "optimality", optimality.value, optimality.std_error
