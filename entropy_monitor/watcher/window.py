"""Mutual information over a sliding window of sampled tokens: one step alone holds too few."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch

from entropy_monitor.catalog import METRICS
from entropy_monitor.estimators import backoff_labels, information_plane
from entropy_monitor.types import PATCH_LENGTH, TOKEN_OFFSETS, Measurement
from entropy_monitor.watcher.soft import join_layers

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

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


@dataclass(slots=True)
class _Ring:
    """The newest tokens of layers that share them: a buffer that is written from the start again once it is full."""

    p_NLM: Tensor
    tokens_NW: Tensor
    step_N: Tensor
    num_tokens: int = 0
    """Tokens held."""
    newest: slice = field(default_factory=lambda: slice(0, 0))
    """Where the tokens of the last call are."""
    seen: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    """Steps and ranks whose tokens were taken last, so that a correction adds the late rank's alone."""

    @classmethod
    def for_layers(cls, num_layers: int, num_bins: int) -> _Ring:
        tokens_NW = torch.empty(0, len(TOKEN_OFFSETS), dtype=torch.int64)
        return cls(torch.empty(0, num_layers, num_bins), tokens_NW, torch.empty(0, dtype=torch.int64))

    def reserve(self, num_rows: int) -> None:
        """Make room for a step behind a full window; what is held stays where it is."""
        missing = MIN_TOKENS + num_rows - len(self.step_N)
        if missing > 0:
            self.p_NLM, self.tokens_NW, self.step_N = (
                torch.cat([tensor, tensor.new_empty(missing, *tensor.shape[1:])])
                for tensor in (self.p_NLM, self.tokens_NW, self.step_N)
            )

    def append(self, p_NLM: Tensor, tokens_NW: Tensor, step: int) -> None:
        """Take in rows, over the oldest ones once the window is full."""
        start = self.newest.stop if self.newest.stop < MIN_TOKENS else 0
        stop = start + len(p_NLM)
        self.newest = slice(start, stop)
        # What lies behind the end of a full buffer has been there for a whole round: it is let go.
        self.num_tokens = stop if stop >= MIN_TOKENS else max(self.num_tokens, stop)
        self.p_NLM[self.newest], self.tokens_NW[self.newest], self.step_N[self.newest] = p_NLM, tokens_NW, step


@dataclass(slots=True)
class InformationWindow:
    """Keeps the soft assignments of at least `MIN_TOKENS` tokens of an attempt, and measures them."""

    attempt: int = 0
    rings: dict[tuple[str, ...], _Ring] = field(default_factory=dict[tuple[str, ...], _Ring])
    """By the layers that share their tokens."""

    def advance(self, frames: Sequence[Frame], assignments: Sequence[Assignments]) -> list[Measurement]:
        """Take in one step, and measure the window that ends with it.

        Patches whose next tokens lie beyond their sequence are left out, as are all tokens of a step with an activation
        that is not finite. An input that begins before its sequence does is told apart by the missing tokens.

        Args:
            frames: the step's frames; a step of a new attempt empties the window.
            assignments: of their tokens.

        Returns:
            Information and optimality of each layer; nothing while the window holds fewer than `MIN_TOKENS` tokens, or
            where the step's own tokens could not be used.
        """
        added = self.add(frames, assignments)
        return [
            measurement
            for layers in added
            if self.rings[layers].num_tokens >= MIN_TOKENS
            for measurement in self._measure(frames[0], layers)
        ]

    def add(self, frames: Sequence[Frame], assignments: Sequence[Assignments]) -> list[tuple[str, ...]]:
        """Take in one step without measuring.

        Args:
            frames: the step's frames.
            assignments: of their tokens.

        Returns:
            The sets of layers that have taken tokens from it.
        """
        if frames and frames[0].attempt != self.attempt:
            self.attempt, self.rings = frames[0].attempt, {}
        added: list[tuple[str, ...]] = []
        for assigned in join_layers(assignments):
            if assigned.tokens_NW is None or not bool(assigned.p_NLM.isfinite().all()):
                continue
            ring = self.rings.get(assigned.layers)
            seen = ring.seen if ring else ()
            is_new = [(frames[0].step, rank) not in seen for rank in assigned.ranks]
            rows_N = _usable_rows(assigned.tokens_NW, is_new, assigned.num_tokens)
            if not len(rows_N):
                continue
            if ring is None:
                ring = self.rings[assigned.layers] = _Ring.for_layers(*assigned.p_NLM.shape[1:])
            ring.reserve(len(assigned.p_NLM))
            ring.append(assigned.p_NLM[rows_N], assigned.tokens_NW[rows_N], frames[0].step)
            ring.seen.extend((frames[0].step, rank) for rank in assigned.ranks)
            added.append(assigned.layers)
        return added

    @property
    def extent(self) -> WindowExtent | None:
        """What the newest figures were computed from: of layers with windows of their own, the smallest."""
        full = [ring for ring in self.rings.values() if ring.num_tokens >= MIN_TOKENS]
        if not full:
            return None
        ring = min(full, key=lambda ring: ring.num_tokens)
        newest = ring.newest.stop - ring.newest.start
        first_step = int(ring.step_N[: ring.num_tokens].min())
        return WindowExtent(first_step, ring.num_tokens, max(2, -(-ring.num_tokens // newest)))

    def _measure(self, frame: Frame, layers: tuple[str, ...]) -> Iterator[Measurement]:
        ring = self.rings[layers]
        held = slice(ring.num_tokens)
        tokens_NW = ring.tokens_NW[held]
        plane = information_plane(
            ring.p_NLM[held],
            backoff_labels(tokens_NW[:, _INPUTS]),
            backoff_labels(tokens_NW[:, _OUTPUTS]),
            patch=PATCH_LENGTH,
            influence=ring.newest,
        )
        for metric, value_L, std_error_L in _figures(plane):
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


def _usable_rows(tokens_NW: Tensor, is_new: Sequence[bool], num_tokens: Sequence[int]) -> Tensor:
    """Choose whole patches, of ranks that have not been taken before, whose next three tokens are known.

    Returns:
        Indices of rows, ascending.
    """
    is_new_N = torch.tensor(is_new).repeat_interleave(torch.tensor(num_tokens))
    usable_N = is_new_N & (tokens_NW[:, _OUTPUTS] >= 0).all(-1) & (tokens_NW[:, _INPUTS[0]] >= 0)
    usable_B = usable_N.view(-1, PATCH_LENGTH).all(-1)
    return usable_B.repeat_interleave(PATCH_LENGTH).nonzero()[:, 0]


def _figures(plane: InformationPlane) -> Iterator[tuple[str, Tensor, Tensor]]:
    for side, informations in (("input", plane.input), ("output", plane.output)):
        for order, information in enumerate(informations, 1):
            yield f"mi_{side}_{order}", information.value, information.std_error
    optimality = plane.optimality[0]
    yield "optimality", optimality.value, optimality.std_error
