"""Measure the frames of one step: pure, pooled over ranks."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from entropy_monitor.catalog import METRICS
from entropy_monitor.estimators import (
    gradient_alignment,
    gradient_alignment_from_parts,
    patch_entropies,
    patch_standard_error,
    sample_entropies,
)
from entropy_monitor.types import NUM_JACKKNIFE_GROUPS, PATCH_LENGTH, Measurement

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from entropy_monitor.types import Frame

_MAX_SPECTRUM = 2048
"""Tokens and features above which a spectrum is taken of a subsample."""
_MAX_ENTRIES = 1 << 20
"""Activations estimated at once: large models stay within memory, and small ones, a third faster, within the cache."""
_UNITS = {metric.name: metric.unit for metric in METRICS}


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameMeasurements:
    """What the frames of one step say, and what in them could not be judged."""

    measurements: tuple[Measurement, ...]
    """Eight for each layer, NaN where undetermined."""
    faults: Mapping[str, int]
    """Layers by kind: ``non_finite`` activations, ``non_finite_gradient``, ``zero_patch`` (an all-zero patch),
    ``too_few_patches`` (fewer than two); and layers and ranks whose valid weight-space sums gave no cosine,
    ``alignment_undetermined``."""


class _Pooled(NamedTuple):
    """Sampled tokens of all ranks, for layers of equal shape."""

    layers: tuple[str, ...]
    z_LND: Tensor
    g_LND: Tensor | None


class _Figure(NamedTuple):
    """One metric of every layer of a group."""

    metric: str
    value_L: Tensor
    std_error_L: Tensor
    num_samples: int


def measure_frames(frames: Sequence[Frame]) -> FrameMeasurements:
    """Measure the frames of one step, one of each rank that has committed, as one sample.

    Tokens of all ranks are concatenated, padding dropped, so that means, errors and sample sizes are those of the
    pooled sample; ``mbe_centered`` subtracts the pooled mean. ``alignment_weight`` cannot be pooled by tokens, as ranks
    stream sums over their own pairs only: it is the mean of the ranks' cosines weighted by their sampled patches, with
    the standard error of independent estimates; ranks without a valid cosine are left out. Weights of inverse variance
    would favour ranks whose error happens to be underestimated.

    ``mbe*`` and the alignments count patches, ``s1``, ``s2`` and ``effective_rank`` tokens. The last three use rows of
    norm 1, and patches evenly subsampled to 2048 tokens where both tokens and features are more; their ``num_samples``
    says so. A figure that cannot be judged is NaN, with a NaN standard error, and is counted where that is a fault.

    Args:
        frames: frames with arrays, of the same run, attempt and step.

    Returns:
        Measurements, layer by layer, in the order of ``METRICS``.

    Raises:
        ValueError: no frames, frames of several steps, without arrays or of inconsistent shapes.
    """
    _check(frames)
    faults: Counter[str] = Counter()
    steered = any(frame.scalars.get("weight", 0.0) > 0 for frame in frames)
    weight_alignment = _weight_alignment(frames, faults)
    measurements: list[Measurement] = []
    for pooled in _pool(frames):
        figures = list(_figures(pooled, faults))
        for index, layer in enumerate(pooled.layers):
            row = [(f.metric, f.value_L[index].item(), f.std_error_L[index].item(), f.num_samples) for f in figures]
            row.append(("alignment_weight", *weight_alignment.get(layer, (math.nan, math.nan, 0))))
            measurements += [
                Measurement(
                    run_id=frames[0].run_id,
                    step=frames[0].step,
                    layer=layer,
                    metric=metric,
                    value=value,
                    unit=_UNITS[metric],
                    std_error=std_error if math.isfinite(value) else math.nan,
                    num_samples=num_samples,
                )
                for metric, value, std_error, num_samples in row
            ]
    if steered:  # the hooks blank gradients that hold steering terms: undetermined on purpose
        del faults["non_finite_gradient"]
    return FrameMeasurements(
        measurements=tuple(measurements), faults={kind: count for kind, count in faults.items() if count}
    )


def _check(frames: Sequence[Frame]) -> None:
    if not frames:
        raise ValueError("expected the frames of one step, found none: pass at least one")
    steps = {(frame.run_id, frame.attempt, frame.step) for frame in frames}
    if len(steps) > 1:
        raise ValueError(f"expected frames of one run, attempt and step; found {sorted(steps)}: measure each apart")
    for frame in frames:
        if not frame.groups:
            raise ValueError(
                f"expected frames with arrays; frame {frame.seq} of rank {frame.rank} was read without them"
            )
        shortest = min(group.activations.shape[1] for group in frame.groups)
        if not 0 <= frame.num_patches * PATCH_LENGTH <= shortest:
            raise ValueError(
                f"expected {frame.num_patches} patches of {PATCH_LENGTH} tokens in frame {frame.seq} of rank "
                f"{frame.rank}; found {shortest} tokens: the frame is damaged"
            )


def _pool(frames: Sequence[Frame]) -> Iterator[_Pooled]:
    """Concatenate each layer's tokens over ranks.

    Yields:
        Few layers at a time; ranks that hold different layers (pipeline stages) give groups of their own.

    Raises:
        ValueError: ranks group the same layers differently.
    """
    sampled: dict[tuple[str, ...], list[tuple[NDArray[np.float32], NDArray[np.float32] | None]]] = {}
    for frame in frames:
        num_tokens = frame.num_patches * PATCH_LENGTH
        for group in frame.groups:
            gradients = None if group.gradients is None else group.gradients[:, :num_tokens]
            sampled.setdefault(tuple(group.layers), []).append((group.activations[:, :num_tokens], gradients))
    names = [layer for layers in sampled for layer in layers]
    if len(set(names)) < len(names):
        raise ValueError(f"expected ranks to group their layers alike, found {list(sampled)}: measure the ranks apart")
    for layers, ranks in sampled.items():
        activations = [activations for activations, _ in ranks]
        gradients = [gradients for _, gradients in ranks if gradients is not None]
        size = sum(array[0].size for array in activations)
        step = max(1, _MAX_ENTRIES // max(1, size))
        for first in range(0, len(layers), step):
            few = slice(first, first + step)
            yield _Pooled(
                layers[few],
                torch.cat([_tensor(array[few]) for array in activations], dim=1),
                torch.cat([_tensor(array[few]) for array in gradients], dim=1)
                if len(gradients) == len(ranks)
                else None,
            )


def _tensor(array: NDArray[np.float32]) -> Tensor:
    # Arrays read from a store may be read-only, which torch warns about; concatenation copies them in any case.
    return torch.as_tensor(np.require(array, requirements=["C", "W"]))


def _finite(z_LND: Tensor) -> Tensor:
    # The largest entry passes NaN on, and costs a fraction of isfinite over all of them. An empty sample is in order.
    if not z_LND.shape[1]:
        return torch.ones(z_LND.shape[0], dtype=torch.bool)
    return z_LND.abs().amax((1, 2)).isfinite()


def _figures(pooled: _Pooled, faults: Counter[str]) -> Iterator[_Figure]:
    """Estimate everything that streamed tokens can tell, batched over the layers.

    Yields:
        All metrics but ``alignment_weight``, in the order of ``METRICS``.
    """
    z_LND, g_LND = pooled.z_LND, pooled.g_LND
    num_tokens, num_patches = z_LND.shape[1], z_LND.shape[1] // PATCH_LENGTH
    nan_L = torch.full((len(pooled.layers),), math.nan)
    finite_L = _finite(z_LND)
    faults["non_finite"] += int((~finite_L).sum())
    if num_patches < 2:
        faults["too_few_patches"] += len(pooled.layers)
    for metric, normalize, center in (
        ("mbe", False, False),
        ("mbe_normalized", True, False),
        ("mbe_centered", False, True),
    ):
        if not num_patches:
            yield _Figure(metric, nan_L, nan_L, 0)
            continue
        entropies_LB = patch_entropies(z_LND, PATCH_LENGTH, normalize, center)
        if metric == "mbe":
            faults["zero_patch"] += int((entropies_LB.isnan().any(-1) & finite_L).sum())
        yield _Figure(metric, entropies_LB.mean(-1), patch_standard_error(entropies_LB), num_patches)
    yield from (
        _whole_sample(z_LND)
        if num_patches >= 2
        else (_Figure(metric, nan_L, nan_L, num_tokens) for metric in ("s1", "s2", "effective_rank"))
    )
    if g_LND is None or not num_patches:
        yield _Figure("alignment_activation", nan_L, nan_L, 0)
        return
    faults["non_finite_gradient"] += int((~_finite(g_LND)).sum())
    alignment = gradient_alignment(z_LND, g_LND, PATCH_LENGTH, NUM_JACKKNIFE_GROUPS)
    yield _Figure("alignment_activation", alignment.cosine, alignment.std_error, num_patches)


def _whole_sample(z_LND: Tensor) -> Iterator[_Figure]:
    num_patches = z_LND.shape[1] // PATCH_LENGTH
    if min(z_LND.shape[1:]) > _MAX_SPECTRUM:
        kept = _MAX_SPECTRUM // PATCH_LENGTH
        z_LBPD = z_LND.reshape(z_LND.shape[0], num_patches, PATCH_LENGTH, -1)
        z_LND = z_LBPD[:, torch.arange(kept) * num_patches // kept].flatten(1, 2)
    num_tokens = z_LND.shape[1]
    entropies = sample_entropies(z_LND, PATCH_LENGTH, normalize=True)
    rank_L = entropies.s1.exp()
    # Patches that do not overlap at all leave the pair sum at 0 and the entropy infinite: undetermined.
    s2_L = torch.where(entropies.s2.isfinite(), entropies.s2, math.nan)
    yield _Figure("s1", entropies.s1, entropies.s1_std_error, num_tokens)
    yield _Figure("s2", s2_L, entropies.s2_std_error, num_tokens)
    yield _Figure("effective_rank", rank_L, rank_L * entropies.s1_std_error, num_tokens)


def _weight_alignment(frames: Sequence[Frame], faults: Counter[str]) -> dict[str, tuple[float, float, int]]:
    """Combine the ranks' weight-space estimates, weighted by sampled patches.

    Returns:
        Cosine, standard error and patches of each layer that has any.
    """
    valid: dict[str, list[tuple[float, float, int]]] = {}
    for frame in frames:
        if frame.alignment is None:
            continue
        parts, info = _tensor(frame.alignment.parts), _tensor(frame.alignment.info)
        alignment = gradient_alignment_from_parts(parts, info[:, 0], info[:, 1])
        for index, layer in enumerate(frame.alignment.layers):
            if info[index, 3] != 0:
                continue
            cosine, std_error = alignment.cosine[index].item(), alignment.std_error[index].item()
            if math.isfinite(cosine):
                valid.setdefault(layer, []).append((cosine, std_error, int(info[index, 1])))
            else:
                faults["alignment_undetermined"] += 1
    return {layer: _weighted_mean(estimates) for layer, estimates in valid.items()}


def _weighted_mean(estimates: Sequence[tuple[float, float, int]]) -> tuple[float, float, int]:
    total = sum(count for _, _, count in estimates)
    mean = sum(cosine * count for cosine, _, count in estimates) / total
    return mean, math.sqrt(sum((std_error * count) ** 2 for _, std_error, count in estimates)) / total, total
