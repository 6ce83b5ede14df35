"""Where a representation stands in the information plane: optimality, and the bound of data processing."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from entropy_monitor.estimators.information import MutualInformation


class Optimality(NamedTuple):
    """Share of the information kept about the input that is about the output, each ``[...]``."""

    value: Tensor
    """``I(Y;Z) / I(X;Z)``; NaN where the denominator is not above 2 standard errors, or either error is unknown."""
    std_error: Tensor


class InformationBound(NamedTuple):
    """Upper bound of I(Y;Z), each ``[...]``."""

    value: Tensor
    distance: Tensor | None
    """``value - I(Y;Z)``, where I(Y;Z) was given; negative by noise or bias, or where X is not all of the input."""


def optimality(
    input_information: MutualInformation, output_information: MutualInformation, covariance: Tensor | float = 0.0
) -> Optimality:
    """Optimality ``R = I(Y;Z) / I(X;Z)`` with its standard error by the delta method, without unit.

    ``SE^2 = (var_Y - 2 R cov + R^2 var_X) / I(X;Z)^2``. Both are measured on the same tokens and so are correlated;
    `information_plane` knows how much and passes the covariance.

    Source: arXiv 2604.07569.

    Args:
        input_information: about the input n-gram X.
        output_information: about the output n-gram Y, in the same unit.
        covariance: of the two values, in their unit squared.

    Returns:
        `Optimality`.

    >>> import torch
    >>> from entropy_monitor.estimators import MutualInformation
    >>> figures = [torch.tensor(x) for x in (0.0, 0.0)]
    >>> x = MutualInformation(torch.tensor(1.0), torch.tensor(0.3), *figures, 99, 9, "none")
    >>> optimality(x, x._replace(value=torch.tensor(0.5), std_error=torch.tensor(0.2)))
    Optimality(value=tensor(0.5000), std_error=tensor(0.2500))
    """
    ratio = output_information.value / input_information.value
    variance = (
        output_information.std_error.square() - 2 * ratio * covariance + (ratio * input_information.std_error).square()
    )
    variance = variance.clamp_min(0)  # where both are the same figure, rounding leaves a little on either side of 0
    # An unknown error of the input fails the comparison; one of the output would leave a ratio of unknown error.
    known = output_information.std_error.isfinite()
    clear = (input_information.value > 2 * input_information.std_error) & known
    undetermined = torch.full_like(ratio, torch.nan)
    return Optimality(
        torch.where(clear, ratio, undetermined),
        torch.where(clear, variance.sqrt() / input_information.value, undetermined),
    )


def information_bottleneck_bound(
    input_information: MutualInformation,
    label_information: Tensor | float | None = None,
    *,
    output_information: MutualInformation | None = None,
) -> InformationBound:
    """Most that Z can hold about the output Y: ``min(I(X;Z), I(X;Y))`` by data processing, and the distance to it.

    Z is computed from the input, so that ``I(Y;Z) <= I(X;Z)`` and ``I(Y;Z) <= I(X;Y)`` where X is the whole input. An
    n-gram X is not, so that a later layer may lie above the bound.

    Source: arXiv 2604.07569.

    Args:
        input_information: about the input n-gram X.
        label_information: I(X;Y), in the same unit; without it the bound is I(X;Z).
        output_information: about the output n-gram Y, in the same unit, to measure the distance of.

    Returns:
        `InformationBound`, in the unit of the arguments.

    >>> import torch
    >>> from entropy_monitor.estimators import MutualInformation
    >>> figures = [torch.tensor(x) for x in (0.3, 0.0, 0.0)]
    >>> x = MutualInformation(torch.tensor(1.0), *figures, 99, 9, "none")
    >>> information_bottleneck_bound(x, 0.75, output_information=x._replace(value=torch.tensor(0.5)))
    InformationBound(value=tensor(0.7500), distance=tensor(0.2500))
    """
    bound = input_information.value
    if label_information is not None:
        bound = torch.minimum(bound, torch.as_tensor(label_information).to(bound))
    return InformationBound(bound, None if output_information is None else bound - output_information.value)
