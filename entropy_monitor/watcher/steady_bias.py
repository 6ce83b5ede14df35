"""The learned bias of information, averaged over measurements.

The rows it is learned from are drawn anew for each window, which moves the values of one window and the next by several
times what their tokens do; the bias itself hardly changes from one step to the next.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from entropy_monitor.estimators import InformationPlane

if TYPE_CHECKING:
    from collections.abc import Sequence

    from entropy_monitor.estimators import MutualInformation

_MEASUREMENTS = 16
"""Measurements that the average spans: half of those that a full window of 512 tokens a step does."""


@dataclass(slots=True)
class SteadyBias:
    """Running means, one for each side, order and layer."""

    known: dict[tuple[str, int, str], tuple[float, int]] = field(
        default_factory=dict[tuple[str, int, str], tuple[float, int]]
    )
    """Mean, and the measurements behind it, up to `_MEASUREMENTS`."""

    def apply(self, plane: InformationPlane, layers: Sequence[str]) -> InformationPlane:
        """Take the averaged bias from each plug-in, in place of the one just learned.

        Args:
            plane: figures of one window.
            layers: their names.

        Returns:
            The plane with other values; standard errors, which count the noise of a single draw, stay.
        """
        inputs = tuple(self._steady("input", order, found, layers) for order, found in enumerate(plane.input))
        outputs = tuple(self._steady("output", order, found, layers) for order, found in enumerate(plane.output))
        ratios = tuple(
            found._replace(value=torch.where(found.value.isnan(), math.nan, y.value / x.value))
            for x, y, found in zip(inputs, outputs, plane.optimality, strict=True)
        )
        return InformationPlane(inputs, outputs, ratios)

    def _steady(self, side: str, order: int, found: MutualInformation, layers: Sequence[str]) -> MutualInformation:
        means: list[float] = []
        for layer, learned in zip(layers, found.bias.tolist(), strict=True):
            mean, count = self.known.get((side, order, layer), (0.0, 0))
            count = min(count + 1, _MEASUREMENTS)
            means.append(mean + (learned - mean) / count)
            if math.isfinite(learned):
                self.known[side, order, layer] = (means[-1], count)
        mean_L = torch.tensor(means, dtype=found.bias.dtype)
        return found._replace(value=found.plug_in - mean_L, bias=mean_L)
