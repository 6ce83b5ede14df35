"""What a stream of soft assignments adds up to: sums in total and by label, and a sample of its rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from entropy_monitor.estimators.reservoir import Reservoir

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jaxtyping import Float, Int
    from torch import Tensor


class LabelTable(NamedTuple):
    """Sums by label; U labels, sorted."""

    label_U: Tensor
    count_U: Tensor
    sums_UM: Tensor
    """fp64."""

    @classmethod
    def of(cls, p_NM: Float[Tensor, "n m"], label_N: Int[Tensor, " n"]) -> LabelTable:
        """Sum a batch by its labels.

        Returns:
            The table.
        """
        label_U, place_N, count_U = torch.unique(label_N, return_inverse=True, return_counts=True)
        sums_UM = torch.zeros(len(label_U), p_NM.shape[1], dtype=torch.float64)
        return cls(label_U, count_U, sums_UM.index_add_(0, place_N, p_NM.double()))

    def joined(self, other: LabelTable) -> LabelTable:
        """Add two tables.

        Returns:
            A new table, of the labels of both.
        """
        label_U, place_V = torch.unique(torch.cat([self.label_U, other.label_U]), return_inverse=True)
        count_U = torch.zeros_like(label_U).index_add_(0, place_V, torch.cat([self.count_U, other.count_U]))
        sums_UM = self.sums_UM.new_zeros(len(label_U), self.sums_UM.shape[1])
        for table, place_T in zip((self, other), place_V.split([len(self.label_U), len(other.label_U)]), strict=True):
            sums_UM.index_add_(0, place_T, table.sums_UM)
        return LabelTable(label_U, count_U, sums_UM)


@dataclass(frozen=True, slots=True)
class SoftCounts:
    """A stream, or a part of it; parts are joined in any order."""

    num_samples: int
    num_undetermined: int
    total_M: Tensor
    """Summed assignments, fp64."""
    tables: Mapping[str, LabelTable]
    """By the name of the label set."""
    reservoir: Reservoir

    @classmethod
    def empty(cls, num_bins: int) -> SoftCounts:
        """Begin, before any label set is known.

        Returns:
            Counts of nothing.
        """
        nothing = Reservoir(torch.empty(0, dtype=torch.int64), torch.empty(0, num_bins), {})
        return cls(0, 0, torch.zeros(num_bins, dtype=torch.float64), {}, nothing)

    def joined(self, other: SoftCounts, patch: int) -> SoftCounts:
        """Add two parts of a stream.

        Returns:
            New counts.

        Raises:
            ValueError: their label sets differ.
        """
        num_undetermined = self.num_undetermined + other.num_undetermined
        for nothing, something in ((self, other), (other, self)):
            if not nothing.num_samples:
                return replace(something, num_undetermined=num_undetermined)
        if self.tables.keys() != other.tables.keys():
            raise ValueError(
                f"labels: expected the sets {sorted(self.tables)}, found {sorted(other.tables)}: pass all of them"
            )
        return SoftCounts(
            self.num_samples + other.num_samples,
            num_undetermined,
            self.total_M + other.total_M,
            {name: table.joined(other.tables[name]) for name, table in self.tables.items()},
            self.reservoir.joined(other.reservoir, patch),
        )
