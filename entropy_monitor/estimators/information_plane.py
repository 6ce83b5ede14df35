"""The information plane of all layers at once: information about input and output n-grams, and their ratio."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from entropy_monitor.estimators.information import MutualInformation, as_information
from entropy_monitor.estimators.inputs import Array, as_tensor, check_patch
from entropy_monitor.estimators.optimality import Optimality, optimality
from entropy_monitor.estimators.refined_information import (
    Correction,
    check_correction,
    covariance,
    refined_information,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float, Int
    from torch import Tensor


class InformationPlane(NamedTuple):
    """One entry for each order, from unigrams up; tensors are ``[L]``, in nats unless normalised."""

    input: tuple[MutualInformation, ...]
    """I(X;Z), X the n-gram that ends at the position."""
    output: tuple[MutualInformation, ...]
    """I(Y;Z), Y the n-gram that starts after it."""
    optimality: tuple[Optimality, ...]
    """I(Y;Z) / I(X;Z), with the covariance of the two in its standard error."""


def information_plane(
    p: Float[Array, "n l m"],
    input_labels: Sequence[Int[Array, " n"]],
    output_labels: Sequence[Int[Array, " n"]],
    *,
    correction: Correction = "rarefied",
    patch: int = 8,
    influence: slice | None = None,
    seed: int = 0,
    normalize: bool = False,
) -> InformationPlane:
    """Give `mutual_information` and `optimality` of every layer and order from soft assignments of a window of tokens.

    The orders of one side refine one another: rows are summed once, by the finest labels, and coarser sums and
    entropies are built from those. Standard errors may be taken from some of the tokens, such as the newest frame of a
    sliding window: ``SE^2`` is then scaled to all n, and so is the small bias of H(Z).

    Source: arXiv 2604.07569.

    Args:
        p: soft assignments of consecutive tokens, ``[n, L, m]`` as from `soft_assign`, fp32 or fp64, contiguous.
        input_labels: orders 1 to k, as from `backoff_labels`.
        output_labels: as many.
        correction: see `mutual_information`.
        patch: consecutive tokens drawn together.
        influence: rows from which standard errors are taken, starting and ending with a patch; all when None.
        seed: of the private generator that chooses what the bias is learned from.
        normalize: divide information by ``log m``.

    Returns:
        `InformationPlane`, detached; NaN for a layer with an undetermined row.

    Raises:
        ValueError: shapes, labels or options are not as above.

    >>> import torch
    >>> p = torch.eye(4).repeat(64, 1)[:, None, :]
    >>> labels = torch.arange(4).repeat(64)
    >>> plane = information_plane(p, [labels], [labels // 2], patch=1)
    >>> abs(float(plane.optimality[0].value) - 0.5) < 0.01
    True
    """
    check_patch(patch)
    check_correction(correction)
    p_NLM = as_tensor(p, "p")
    input_tensors, output_tensors = (
        [as_tensor(label_N, "labels") for label_N in labels] for labels in (input_labels, output_labels)
    )
    _check(p_NLM, input_tensors, output_tensors)
    rows = slice(None) if influence is None else influence
    num_tokens = len(p_NLM)
    num_rows = len(range(*rows.indices(num_tokens)))
    if not num_rows:
        raise ValueError(f"influence: expected rows of the {num_tokens} in p, found {influence}: take the newest ones")
    with torch.no_grad():
        sides = [
            refined_information(p_NLM, labels, correction=correction, patch=patch, influence=rows, seed=seed)
            for labels in (input_tensors, output_tensors)
        ]
    unit = math.log(p_NLM.shape[-1]) if normalize else 1.0
    informations = [tuple(as_information(order, num_tokens, unit, p_NLM[0, :, 0]) for order in side) for side in sides]
    ratios: list[Optimality] = []
    for number, (x, y) in enumerate(zip(*sides, strict=True)):
        covariance_L = covariance(x.psi_BL, y.psi_BL, num_rows, num_tokens) / unit**2
        ratios.append(optimality(informations[0][number], informations[1][number], covariance_L.to(p_NLM.dtype)))
    return InformationPlane(informations[0], informations[1], tuple(ratios))


def _check(p: Tensor, input_labels: Sequence[Tensor], output_labels: Sequence[Tensor]) -> None:
    if p.ndim != 3 or 0 in p.shape or p.dtype not in {torch.float32, torch.float64}:
        raise ValueError(
            f"p: expected soft assignments [n, L, m] in fp32 or fp64, none of them 0; found {tuple(p.shape)} of "
            f"{p.dtype}: stack those of the layers"
        )
    if not input_labels or len(input_labels) != len(output_labels):
        raise ValueError(
            f"labels: expected equally many orders, at least one; found {len(input_labels)} of the input and "
            f"{len(output_labels)} of the output: pass both sides of backoff_labels"
        )
    for label_N in (*input_labels, *output_labels):
        if label_N.shape != p.shape[:1] or label_N.dtype != torch.int64:
            raise ValueError(
                f"labels: expected int64 of shape ({len(p)},), found {tuple(label_N.shape)} of {label_N.dtype}: "
                "use backoff_labels"
            )
