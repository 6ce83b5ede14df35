"""Soft entropy and mutual information of a stream of batches, mergeable over steps and ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from entropy_monitor.estimators.information import MutualInformation, as_information
from entropy_monitor.estimators.inputs import Array, as_samples, check_patch
from entropy_monitor.estimators.label_sums import as_labels
from entropy_monitor.estimators.rarefaction import conditional_bias
from entropy_monitor.estimators.refined_information import (
    Correction,
    OrderInformation,
    bias_of_tokens,
    bias_of_total,
    check_correction,
    covariance,
    influences,
    order_information,
)
from entropy_monitor.estimators.reservoir import NUM_ROWS, Reservoir, patch_priorities
from entropy_monitor.estimators.soft_counts import LabelTable, SoftCounts
from entropy_monitor.estimators.soft_entropy import (
    SoftBinOptions,
    SoftEntropy,
    entropy_of_shares,
    safe_log,
    soft_assign,
    soft_bins,
)

if TYPE_CHECKING:
    from typing import Unpack

    from jaxtyping import Float, Int
    from torch import Tensor

_UNDETERMINED = torch.tensor(math.nan, dtype=torch.float64)


class SoftEntropyAccumulator:
    """Accumulates soft assignments, in total and by label, so that no activations need be kept.

    Merging gives the same in any order and partition: sums are fp64 (800 bytes a label at 100 bins), counts int64.
    What needs single rows, the rarefied correction and the standard error, is taken from a reservoir of at most 16384
    tokens in whole patches, those whose activations and labels have the lowest hash: a uniform sample of the stream,
    the same on every path. Up to 16384 tokens it is all of them. Bit-identical patches are sampled together.

    Rows without direction (zero or non-finite) are left out and counted. State lives on the CPU.

    Args:
        num_features: width of the activations.
        patch: consecutive tokens drawn together; batches hold whole patches, but for a shorter last one.
        **bins: the options of `soft_assign`.

    Raises:
        ValueError: points, temperature or patch do not fit.

    >>> import torch
    >>> z, labels = torch.randn(64, 8), torch.arange(64) % 2
    >>> first, second = SoftEntropyAccumulator(8), SoftEntropyAccumulator(8)
    >>> first.update(z[:32], {"parity": labels[:32]})
    >>> second.update(z[32:], {"parity": labels[32:]})
    >>> first.merge(second)
    >>> first.num_samples, first.mutual_information("parity").num_labels
    (64, 2)
    """

    def __init__(self, num_features: int, *, patch: int = 1, **bins: Unpack[SoftBinOptions]) -> None:
        check_patch(patch)
        if patch > NUM_ROWS:
            raise ValueError(f"patch: expected at most {NUM_ROWS} tokens, those held; found {patch}: 8 are usual")
        points_MD, self._temperature = soft_bins(num_features, **bins)
        self._points_MD = points_MD.detach().cpu()
        self._patch = patch
        self._seed = bins.get("seed", 0)
        self._counts = SoftCounts.empty(len(points_MD))

    @property
    def num_samples(self) -> int:
        """Tokens accumulated."""
        return self._counts.num_samples

    @property
    def num_undetermined(self) -> int:
        """Rows left out for want of a direction."""
        return self._counts.num_undetermined

    def update(self, z: Float[Array, "n d"], labels: Mapping[str, Int[Array, " n"]] | None = None) -> None:
        """Add a batch.

        Args:
            z: consecutive tokens by features, ``[n, d]``.
            labels: integer labels by the name of their set, ``[n]`` each; the same names in every batch.

        Raises:
            ValueError: shapes or names do not fit.
        """
        z_ND = as_samples(z)
        width = self._points_MD.shape[1]
        if z_ND.ndim != 2 or z_ND.shape[1] != width:
            raise ValueError(
                f"z: expected [n, {width}], found {tuple(z_ND.shape)}: flatten batch and sequence, and pass one width"
            )
        if not isinstance(labels, Mapping | None):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f'labels: expected sets by name, found a {type(labels).__name__}: pass {{"name": labels}}')
        given = {name: as_labels(label_N, len(z_ND)).cpu() for name, label_N in (labels or {}).items()}
        with torch.no_grad():
            p_NM = soft_assign(z_ND, reference_points=self._points_MD, temperature=self._temperature).cpu()
            sound_N = p_NM.isfinite().all(-1)
            priority_N = patch_priorities(z_ND.detach(), given, self._patch)[sound_N]
            p_NM = p_NM[sound_N]
            given = {name: label_N[sound_N] for name, label_N in given.items()}
            batch = SoftCounts(
                len(p_NM),
                len(sound_N) - len(p_NM),
                p_NM.sum(0, dtype=torch.float64),
                {name: LabelTable.of(p_NM, label_N) for name, label_N in given.items()},
                Reservoir(priority_N, p_NM.float(), given).lowest(self._patch),
            )
        self._counts = self._counts.joined(batch, self._patch)

    def merge(self, other: SoftEntropyAccumulator) -> None:
        """Add all that another rank or step accumulated.

        Raises:
            ValueError: other reference points, temperature or patch, or other label sets.
        """
        self._check_same(other._points_MD, other._temperature, other._patch)
        self._counts = self._counts.joined(other._counts, self._patch)

    def entropy(self, normalize: bool = False) -> Float[Tensor, ""]:
        """`soft_entropy` of all rows, plug-in, in nats.

        Args:
            normalize: divide by ``log m``.

        Returns:
            0-d, fp64; NaN before the first row.
        """
        return entropy_of_shares(self._counts.total_M / self.num_samples) / self._unit(normalize)

    def entropy_estimate(self, normalize: bool = False) -> SoftEntropy:
        """`soft_entropy_estimate` of all rows, in nats; error and bias are taken from the reservoir.

        Args:
            normalize: divide every figure by ``log m``.

        Returns:
            `SoftEntropy`, 0-d, fp64; NaN before the first row, error and bias also for a single patch.
        """
        if not self.num_samples:
            return SoftEntropy(*[_UNDETERMINED] * 4)
        share_1M, num_rows = self._shares(), len(self._counts.reservoir.p_RM)
        surprise_R1 = -self._counts.reservoir.p_RM.double() @ safe_log(share_1M).mT
        psi_B1 = self._counts.reservoir.sum_patches(surprise_R1 - surprise_R1.mean(0))
        variance = covariance(psi_B1, psi_B1, num_rows, self.num_samples)[0]
        plug_in, bias = entropy_of_shares(share_1M)[0], -self._bias_of_total()[0]
        unit = self._unit(normalize)
        return SoftEntropy((plug_in - bias) / unit, variance.sqrt() / unit, plug_in / unit, bias / unit)

    def mutual_information(
        self, name: str, correction: Correction = "rarefied", normalize: bool = False
    ) -> MutualInformation:
        """`mutual_information` of all rows and one label set, in nats.

        The labels that the bias is learned from are those with 32 tokens in the reservoir.

        Args:
            name: of the label set.
            correction: ``rarefied`` or ``none``.
            normalize: divide every figure by ``log m``.

        Returns:
            `MutualInformation`, 0-d, fp64; NaN where no row had a direction.

        Raises:
            ValueError: no such label set, or unknown correction.
        """
        check_correction(correction)
        if name not in self._counts.tables:
            raise ValueError(
                f"name: expected one of {sorted(self._counts.tables)}, found {name!r}: update with it first"
            )
        if not self.num_samples:
            return MutualInformation(*[_UNDETERMINED] * 4, num_samples=0, num_labels=0, learned_from="none")
        order = self._information(self._counts.tables[name], self._counts.reservoir.labels[name], correction)
        return as_information(order, self.num_samples, self._unit(normalize), self._counts.total_M[0])

    def state_dict(self) -> dict[str, Any]:
        """Give everything accumulated, as tensors, numbers and dictionaries of them.

        Returns:
            What `load_state_dict` takes; tensors are shared, not copied.
        """
        counts = self._counts
        return {
            "reference_points": self._points_MD,
            "temperature": self._temperature,
            "patch": self._patch,
            "num_samples": counts.num_samples,
            "num_undetermined": counts.num_undetermined,
            "total": counts.total_M,
            "tables": {name: tuple(table) for name, table in counts.tables.items()},
            "reservoir_priority": counts.reservoir.priority_R,
            "reservoir_rows": counts.reservoir.p_RM,
            "reservoir_labels": dict(counts.reservoir.labels),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace everything accumulated.

        Args:
            state: from `state_dict` of an accumulator with the same reference points, temperature and patch.

        Raises:
            ValueError: they differ.
        """
        self._check_same(state["reference_points"], state["temperature"], state["patch"])
        self._counts = SoftCounts(
            state["num_samples"],
            state["num_undetermined"],
            state["total"],
            {name: LabelTable(*table) for name, table in state["tables"].items()},
            Reservoir(state["reservoir_priority"], state["reservoir_rows"], state["reservoir_labels"]),
        )

    def _check_same(self, points_MD: Tensor, temperature: float, patch: int) -> None:
        if not torch.equal(self._points_MD, points_MD):
            raise ValueError(
                "reference_points: expected those of this accumulator, found others: use equal num_features, num_bins "
                "and seed"
            )
        if (self._temperature, self._patch) != (temperature, patch):
            raise ValueError(
                f"expected temperature {self._temperature} and patch {self._patch}, found {temperature} and {patch}: "
                "use equal options"
            )

    def _unit(self, normalize: bool) -> float:
        return math.log(len(self._points_MD)) if normalize else 1.0

    def _shares(self) -> Tensor:
        return (self._counts.total_M / self.num_samples)[None]

    def _bias_of_total(self) -> Tensor:
        p_RM, sum_patches = self._counts.reservoir.p_RM.double(), self._counts.reservoir.sum_patches
        size_B = sum_patches(torch.ones_like(p_RM[:, :1]))[:, 0]
        return bias_of_total(sum_patches(p_RM)[:, None], size_B, self._shares(), self.num_samples)

    def _information(self, table: LabelTable, label_R: Tensor, correction: Correction) -> OrderInformation:
        num_tokens, reservoir = self.num_samples, self._counts.reservoir
        share_1M = self._shares()
        entropy_1 = entropy_of_shares(share_1M)
        entropy_U1 = entropy_of_shares(table.sums_UM / table.count_U[:, None])[:, None]
        plug_in_1 = entropy_1 - (table.count_U.double() / num_tokens) @ entropy_U1
        p_R1M = reservoir.p_RM.double()[:, None]
        place_R = torch.searchsorted(table.label_U, label_R)
        psi_R1 = influences(p_R1M, table.sums_UM[:, None], table.count_U, place_R, share_1M)
        bias = None
        if correction == "rarefied":
            generator = torch.Generator().manual_seed(self._seed)
            bias = conditional_bias(p_R1M, place_R, table.count_U, entropy_U1, entropy_1, generator)
            psi_R1 = psi_R1 - bias.added_by_one_UL[place_R]
        psi_B1 = reservoir.sum_patches(psi_R1 - psi_R1.mean(0))
        total_bias_1 = bias_of_tokens(p_R1M, share_1M, num_tokens)
        return order_information(plug_in_1, bias, total_bias_1, psi_B1, len(p_R1M), num_tokens, len(table.label_U))
