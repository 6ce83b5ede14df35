"""Measure the frames of one step: pure, pooled over ranks."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from entropy_monitor.catalog import METRICS
from entropy_monitor.estimators import (
    entropy_of_assignments,
    gradient_alignment_from_parts,
    layer_estimates,
    patch_standard_error,
)
from entropy_monitor.types import NUM_JACKKNIFE_GROUPS, PATCH_LENGTH, Measurement
from entropy_monitor.watcher.pool import as_tensor, check_frames, is_finite, pool_frames
from entropy_monitor.watcher.soft import Assignments, assign, determined_patches

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from entropy_monitor.types import Frame
    from entropy_monitor.watcher.pool import Pooled

_MAX_SPECTRUM = 2048
"""Tokens and features above which a spectrum is taken of a subsample."""
_FROM_ONE_STEP = tuple(metric for metric in METRICS if metric.samples != "window_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameMeasurements:
    """What the frames of one step say, and what in them could not be judged."""

    measurements: tuple[Measurement, ...]
    """For each layer every metric that one step tells, NaN where undetermined."""
    faults: Mapping[str, int]
    """Layers by kind: ``non_finite`` activations, ``non_finite_gradient``, ``zero_patch`` (an all-zero patch),
    ``too_few_patches`` (fewer than two), ``no_direction`` (zero tokens, whose patches are left out of soft entropy and
    information); and layers and ranks whose valid weight-space sums gave no cosine,
    ``alignment_undetermined``."""
    assignments: tuple[Assignments, ...] = ()
    """Soft assignments of the sampled tokens, from which `window` computes information."""


class _Estimate(NamedTuple):
    """One metric of one layer."""

    value: float
    std_error: float
    num_samples: int


class _Figure(NamedTuple):
    """One metric of every layer of a group."""

    metric: str
    value_L: Tensor
    std_error_L: Tensor
    num_samples: int


_UNDETERMINED = _Estimate(math.nan, math.nan, 0)


def measure_frames(frames: Sequence[Frame]) -> FrameMeasurements:
    """Measure the frames of one step, one of each rank that has committed, as one sample.

    Tokens of all ranks are concatenated, padding dropped, so that means, errors and sample sizes are those of the
    pooled sample; ``mbe_centered`` subtracts the pooled mean. ``alignment_weight`` cannot be pooled by tokens, as ranks
    stream sums over their own pairs only: it is the mean of the ranks' cosines weighted by their sampled patches, with
    the standard error of independent estimates; ranks without a valid cosine are left out. Weights of inverse variance
    would favour ranks whose error happens to be underestimated.

    ``mbe*`` and the alignments count patches, the others tokens. ``s1``, ``s2`` and ``effective_rank`` use rows of norm
    1, and patches evenly subsampled to 2048 tokens where both tokens and features are more; their ``num_samples`` says
    so. A figure that cannot be judged is NaN, with a NaN standard error, and is counted where that is a fault.

    Args:
        frames: frames with arrays, of the same run, attempt and step.

    Returns:
        Measurements, layer by layer, in the order of ``METRICS``.

    Raises:
        ValueError: no frames, frames of several steps, without arrays or of inconsistent shapes.
    """
    check_frames(frames)
    faults: Counter[str] = Counter()
    table: dict[str, dict[str, _Estimate]] = defaultdict(dict)
    assignments: list[Assignments] = []
    for pooled in pool_frames(frames):
        assigned = assign(pooled)
        if assigned is not None:
            assignments.append(assigned)
        for figure in (*_figures(pooled, faults), *_soft_entropy(assigned, faults)):
            for index, layer in enumerate(pooled.layers):
                value, std_error = figure.value_L[index].item(), figure.std_error_L[index].item()
                error = std_error if math.isfinite(value) else math.nan
                table[layer][figure.metric] = _Estimate(value, error, figure.num_samples)
        for layer in pooled.layers:
            table[layer].setdefault("mbe", _UNDETERMINED)
    for layer, estimate in _weight_alignment(frames, faults).items():
        table[layer]["alignment_weight"] = estimate
    for metric, layer, estimate in _exact_alignment(frames):
        table[layer][metric] = estimate
    if any(frame.scalars.get("weight", 0.0) > 0 for frame in frames):
        del faults["non_finite_gradient"]  # the hooks blank gradients that hold steering terms: undetermined on purpose
    return FrameMeasurements(
        measurements=tuple(
            Measurement(
                run_id=frames[0].run_id,
                step=frames[0].step,
                layer=layer,
                metric=metric.name,
                unit=metric.unit,
                **row.get(metric.name, _UNDETERMINED)._asdict(),
            )
            for layer, row in table.items()
            for metric in _FROM_ONE_STEP
        ),
        faults={kind: count for kind, count in faults.items() if count},
        assignments=tuple(assignments),
    )


def _figures(pooled: Pooled, faults: Counter[str]) -> Iterator[_Figure]:
    """Estimate everything that streamed tokens can tell, batched over the layers.

    Yields:
        Whatever the sample allows; what it does not is undetermined.
    """
    z_LND, g_LND = pooled.z_LND, pooled.g_LND
    num_tokens, num_patches = z_LND.shape[1], z_LND.shape[1] // PATCH_LENGTH
    finite_L = is_finite(z_LND)
    faults["non_finite"] += int((~finite_L).sum())
    if num_patches < 2:
        faults["too_few_patches"] += len(pooled.layers)
    if not num_patches:
        return
    if g_LND is not None:
        faults["non_finite_gradient"] += int((~is_finite(g_LND)).sum())
    subsample_B = _subsample(z_LND)
    estimates = layer_estimates(z_LND, g_LND, PATCH_LENGTH, NUM_JACKKNIFE_GROUPS, subsample_B)
    faults["zero_patch"] += int((estimates.raw.isnan().any(-1) & finite_L).sum())
    for metric, entropies_LB in (
        ("mbe", estimates.raw),
        ("mbe_normalized", estimates.normalized),
        ("mbe_centered", estimates.centered),
    ):
        yield _Figure(metric, entropies_LB.mean(-1), patch_standard_error(entropies_LB), num_patches)
    if (sample := estimates.sample) is not None:
        sampled_tokens = num_tokens if subsample_B is None else len(subsample_B) * PATCH_LENGTH
        rank_L = sample.s1.exp()
        # Patches that do not overlap at all leave the pair sum at 0 and the entropy infinite: undetermined.
        s2_L = torch.where(sample.s2.isfinite(), sample.s2, math.nan)
        yield _Figure("s1", sample.s1, sample.s1_std_error, sampled_tokens)
        yield _Figure("s2", s2_L, sample.s2_std_error, sampled_tokens)
        yield _Figure("effective_rank", rank_L, rank_L * sample.s1_std_error, sampled_tokens)
    if estimates.alignment is not None:
        yield _Figure("alignment_activation", *estimates.alignment, num_patches)


def _soft_entropy(assigned: Assignments | None, faults: Counter[str]) -> Iterator[_Figure]:
    """Estimate soft entropy of the step's own tokens, without patches that are undetermined in a layer.

    Yields:
        One figure; none where no patch is left.
    """
    if assigned is None:
        return
    determined_LB = determined_patches(assigned.p_NLM)
    some_L, all_L = determined_LB.any(-1), determined_LB.all(-1)
    faults["no_direction"] += int((some_L & ~all_L).sum())
    kept_B = determined_LB[some_L].all(0) & determined_LB.any()
    if not kept_B.any():
        return
    p_NLM = assigned.p_NLM if bool(kept_B.all()) else assigned.p_NLM[kept_B.repeat_interleave(PATCH_LENGTH)]
    estimate = entropy_of_assignments(p_NLM.transpose(0, 1), PATCH_LENGTH)
    value_L = estimate.value if int(kept_B.sum()) > 1 else estimate.plug_in
    yield _Figure("soft_entropy", value_L, estimate.std_error, len(p_NLM))


def _subsample(z_LND: Tensor) -> Tensor | None:
    """Choose the patches of which a spectrum is taken, evenly, where there are too many.

    Returns:
        Their indices; None for all.
    """
    num_tokens, num_features = z_LND.shape[1:]
    if min(num_tokens, num_features) <= _MAX_SPECTRUM:
        return None
    kept = _MAX_SPECTRUM // PATCH_LENGTH
    return torch.arange(kept) * (num_tokens // PATCH_LENGTH) // kept


def _weight_alignment(frames: Sequence[Frame], faults: Counter[str]) -> dict[str, _Estimate]:
    """Combine the ranks' weight-space estimates, weighted by sampled patches.

    Returns:
        Cosine, standard error and patches of each layer that has any.
    """
    valid: dict[str, list[_Estimate]] = {}
    for frame in frames:
        if frame.alignment is None:
            continue
        parts, info = as_tensor(frame.alignment.parts), as_tensor(frame.alignment.info)
        alignment = gradient_alignment_from_parts(parts, info[:, 0], info[:, 1])
        for index, layer in enumerate(frame.alignment.layers):
            if info[index, 3] != 0:
                continue
            cosine, std_error = alignment.cosine[index].item(), alignment.std_error[index].item()
            if math.isfinite(cosine):
                valid.setdefault(layer, []).append(_Estimate(cosine, std_error, int(info[index, 1])))
            else:
                faults["alignment_undetermined"] += 1
    return {layer: _weighted_mean(estimates) for layer, estimates in valid.items()}


def _exact_alignment(frames: Sequence[Frame]) -> Iterator[tuple[str, str, _Estimate]]:
    """Average the ranks' audits, each on a probe batch of its own.

    Yields:
        Metric, layer and estimate, where any rank has one.
    """
    audits: dict[tuple[str, str], list[float]] = defaultdict(list)
    for frame in frames:
        if frame.exact_alignment is not None:
            for layer, cosines in zip(frame.exact_alignment.layers, frame.exact_alignment.cosines, strict=True):
                for metric, cosine in zip(("alignment_exact", "alignment_exact_all"), cosines.tolist(), strict=True):
                    if math.isfinite(cosine):
                        audits[metric, layer].append(cosine)
    for (metric, layer), cosines in audits.items():
        yield metric, layer, _Estimate(sum(cosines) / len(cosines), math.nan, len(cosines))


def _weighted_mean(estimates: Sequence[_Estimate]) -> _Estimate:
    total = sum(estimate.num_samples for estimate in estimates)
    mean = sum(estimate.value * estimate.num_samples for estimate in estimates) / total
    return _Estimate(mean, math.hypot(*(e.std_error * e.num_samples for e in estimates)) / total, total)
