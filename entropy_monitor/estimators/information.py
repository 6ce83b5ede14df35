"""Mutual information between labels of tokens and the soft direction of their activations, in nats."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from entropy_monitor.estimators.inputs import Array, as_samples, check_patch
from entropy_monitor.estimators.label_sums import as_labels
from entropy_monitor.estimators.refined_information import (
    Correction,
    OrderInformation,
    check_correction,
    refined_information,
)
from entropy_monitor.estimators.soft_entropy import SoftBinOptions, soft_assign

if TYPE_CHECKING:
    from typing import Unpack

    from jaxtyping import Float, Int
    from torch import Tensor

    from entropy_monitor.estimators.rarefaction import LearnedFrom


class MutualInformation(NamedTuple):
    """Information about a label set; tensors are ``[...]``, in nats unless normalised."""

    value: Tensor
    """``plug_in - bias``; may fall below 0 by noise, and is not clamped."""
    std_error: Tensor
    """Over the drawing of patches; that of a corrected value holds the error of what the bias was learned from."""
    plug_in: Tensor
    """``H(Z) - sum_x p(x) H(Z|x)``: high, severely so where labels are rare."""
    bias: Tensor
    """What was subtracted."""
    num_samples: int
    """Tokens."""
    num_labels: int
    """Distinct labels among them."""
    learned_from: LearnedFrom
    """``labels``, or ``pooled groups`` where none had 32 tokens. ``none`` where nothing was learned: with
    ``correction="none"`` and for a constant label set; or below 32 tokens, where the corrected value is NaN."""

    def __float__(self) -> float:
        """Give the value."""
        return float(self.value)


class InformationOptions(SoftBinOptions, total=False):
    """The options of `mutual_information`."""

    correction: Correction
    patch: int
    normalize: bool


def mutual_information(
    z: Float[Array, "*batch n d"],
    labels: Int[Array, " n"],
    *,
    correction: Correction = "rarefied",
    patch: int = 1,
    normalize: bool = False,
    **bins: Unpack[SoftBinOptions],
) -> MutualInformation:
    r"""Mutual information of labels X and soft direction Z of the rows of ``z``, in nats.

    Plug-in: ``I = H(Z) - sum_x n_x/n H(Z|x)`` with `soft_entropy`. Its bias is severe: at 16k tokens of 50k Zipf labels
    a true .002 (of ``log m``) reads .25, as the mean of few rows has too low an entropy. ``correction="rarefied"``
    learns from up to 64 labels of at least 32 tokens how much too low, as a function of their number::

        b(k) = H - E H(mean of k rows), k = 1, 2, 4, 8, 16,    b(k) = a / (k + c) above
        value = plug_in - [ sum_x n_x/n b(n_x) - 1/2 sum_b Var(P_b) / P_b ]

    the last term being the bias of H(Z) itself. It supposes that rare labels spread over the bins as frequent ones do.
    Where no label has 32 tokens, b is learned from random groups of all tokens, which spread more: the value is then
    low by up to the information itself, and its error stated several times too large. Below 32 tokens in all, it is
    NaN. About a constant label set it is exactly 0, with a standard error of 0 (NaN for a single patch and, corrected,
    below 32 tokens). The standard error joins the infinitesimal jackknife over patches and the jackknife over what b
    was learned from::

        psi_i = sum_b p_ib log(P_xb / P_b) - [n_x b(n_x) - (n_x - 1) b(n_x - 1)], less its mean
        SE^2 = sum over patches of (sum_{i in patch} psi_i)^2 / n^2 + var(sum_x n_x/n b(n_x))

    the bracket and the second term with the correction only.

    Source: arXiv 2604.07569, estimator arXiv 2505.23960; correction and error are ours.

    Args:
        z: tokens by features, ``[..., n, d]``.
        labels: one integer per token, shared by all leading dimensions.
        correction: ``rarefied`` or ``none``.
        patch: consecutive tokens drawn together.
        normalize: divide every figure by ``log m``.
        **bins: the options of `soft_assign`: ``num_bins``, ``seed``, ``mode``, ``reference_points``, ``temperature``.

    Returns:
        `MutualInformation`, detached; NaN where a row has no direction.

    Raises:
        ValueError: labels, patch or correction are not as above, or as for `soft_assign`.

    >>> import torch
    >>> generator = torch.Generator().manual_seed(0)
    >>> labels = torch.randint(4, (4096,), generator=generator)
    >>> z = torch.randn(4, 32, generator=generator)[labels] + torch.randn(4096, 32, generator=generator)
    >>> noise = torch.randn(4096, 32, generator=generator)
    >>> float(mutual_information(z, labels)) > 0.2, abs(float(mutual_information(noise, labels))) < 0.01
    (True, True)
    """
    check_patch(patch)
    check_correction(correction)
    z_ND = as_samples(z)
    _, label_N = as_labels(labels, z_ND.shape[-2]).to(z_ND.device).unique(return_inverse=True)
    with torch.no_grad():
        p_NM = soft_assign(z_ND, **bins)
        p_NLM = p_NM.reshape(-1, *p_NM.shape[-2:]).transpose(0, 1).contiguous()
        (order,) = refined_information(
            p_NLM,
            [label_N],
            correction=correction,
            patch=patch,
            influence=slice(None),
            seed=bins.get("seed", 0),
        )
    unit = math.log(p_NM.shape[-1]) if normalize else 1.0
    return as_information(order, z_ND.shape[-2], unit, p_NM[..., 0, 0])


def shuffled_information(
    z: Float[Array, "*batch n d"],
    labels: Int[Array, " n"],
    *,
    shuffle_seed: int = 0,
    **options: Unpack[InformationOptions],
) -> MutualInformation:
    """`mutual_information` after permuting the labels: the level that no information at all reads.

    The permutation comes from a private generator on the CPU. Show it beside the value, and distrust a value that does
    not stand clear of it.

    Args:
        z: tokens by features, ``[..., n, d]``.
        labels: one integer per token.
        shuffle_seed: which permutation.
        **options: those of `mutual_information`.

    Returns:
        `MutualInformation`.

    >>> import torch
    >>> z, labels = torch.eye(8).repeat(64, 1), torch.arange(8).repeat(64)
    >>> float(mutual_information(z, labels)) > 1, abs(float(shuffled_information(z, labels))) < 0.1
    (True, True)
    """
    label_N = as_labels(labels, as_samples(z).shape[-2])
    shuffled_N = torch.randperm(len(label_N), generator=torch.Generator().manual_seed(shuffle_seed))
    return mutual_information(z, label_N[shuffled_N.to(label_N.device)], **options)


def as_information(order: OrderInformation, num_samples: int, unit: float, like: Tensor) -> MutualInformation:
    """Put the figures of one order into the caller's shape, precision and unit.

    Returns:
        `MutualInformation`.
    """
    value, std_error, plug_in, bias = (
        (figure_L / unit).reshape(like.shape).to(like.dtype)
        for figure_L in (order.plug_in_L - order.bias_L, order.std_error_L, order.plug_in_L, order.bias_L)
    )
    return MutualInformation(value, std_error, plug_in, bias, num_samples, order.num_labels, order.learned_from)
