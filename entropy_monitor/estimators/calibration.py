"""Reference points and softmax temperature of soft entropy: the ruler, which no data touch."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float
    from torch import Tensor

CalibrationMode: TypeAlias = Literal["auto", "exact", "bounds", "leading-order"]

_SALT = 0x736F_6674_656E_7472  # "softentr": keeps our seed 0 apart from the user's torch.manual_seed(0)
_EXACT_BELOW = 100
_HALVINGS = 200


def reference_points(num_features: int, num_bins: int = 100, seed: int = 0) -> Float[Tensor, "m d"]:
    """Draw the points of the unit sphere that serve as soft bins.

    They come from a private generator on the CPU with a salted seed, so that every device sees the same points, the
    global generator stays untouched, and seed 0 does not repeat the numbers that ``torch.manual_seed(0)`` put into the
    first weights of a model: reference points equal to embedding rows would bias everything measured with them.

    Source: arXiv 2505.23960, uniform points on the sphere.

    Args:
        num_features: width of the activations.
        num_bins: how many points.
        seed: which draw.

    Returns:
        Rows of norm 1, fp32, on the CPU.

    Raises:
        ValueError: a size is not positive, or there are fewer than two bins.

    >>> reference_points(16, num_bins=3).norm(dim=1).round(decimals=6)
    tensor([1., 1., 1.])
    """
    _check_sizes(num_features, num_bins)
    return _drawn_points(num_features, num_bins, seed).clone()


@lru_cache(maxsize=8)
def _drawn_points(num_features: int, num_bins: int, seed: int) -> Tensor:
    # Seeds are 64 bits wide and signed.
    generator = torch.Generator().manual_seed((_SALT ^ seed) & (2**63 - 1))
    points_MD = torch.randn(num_bins, num_features, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(points_MD, dim=-1).float()


@lru_cache(maxsize=256)
def soft_temperature(num_features: int, num_bins: int = 100, mode: CalibrationMode = "auto") -> float:
    """Temperature at which one soft bin holds ``1 / num_bins`` of the sphere, in units of cosine.

    Solves ``KL(vMF(eps) || uniform) = log num_bins`` for the von Mises-Fisher density ``exp(cos / eps)`` on the sphere
    in ``num_features`` dimensions. With ``nu = d/2 - 1``, ``kappa = 1/eps`` and A the ratio of Bessel functions
    ``I_(nu+1) / I_nu``::

        KL = kappa A(kappa) - log Z(kappa),    d/dkappa log Z = A

    - ``exact``: Bessel functions from scipy, which underflow at several hundred features.
    - ``bounds``: the lower bound of KL by Amos' bounds of A, ``kappa / (d/2 + root(kappa^2 + d^2/4))`` from below and,
      integrated for log Z, ``kappa / (nu + root(kappa^2 + nu^2))`` from above: elementary at any width. The bins are
      slightly narrower than asked. Needs three features.
    - ``leading-order``: ``1 / root(2 d log m)``, the limit of many features: 1 % too high at 768, by half at 16.
    - ``auto``: exact below 100 features, bounds above. A single feature leaves a sphere of two points, on which no
      temperature reaches more than log 2: there it is the leading order.

    Source: arXiv 2505.23960, equation 7; Amos 1974 for the bounds.

    Args:
        num_features: width of the activations, d.
        num_bins: soft bins, m.
        mode: one of the above.

    Returns:
        The temperature; computed once for each set of arguments.

    Raises:
        ValueError: unknown mode, sizes out of range, or a mode that has no solution there.

    >>> round(soft_temperature(768, mode="leading-order"), 5)
    0.01189
    """
    _check_sizes(num_features, num_bins)
    if mode not in {"auto", "exact", "bounds", "leading-order"}:
        raise ValueError(f"mode: expected auto, exact, bounds or leading-order; found {mode!r}: choose one")
    if mode == "auto":
        mode = "bounds" if num_features >= _EXACT_BELOW else "exact" if num_features > 1 else "leading-order"
    start = math.sqrt(2 * num_features * math.log(num_bins))
    if mode == "leading-order":
        return 1 / start
    smallest = 2 if mode == "exact" else 3
    if num_features < smallest:
        raise ValueError(
            f"mode: {mode} needs at least {smallest} features, found {num_features}: use "
            f"{'exact' if num_features == 2 else 'leading-order'}"
        )
    divergence = _divergence if mode == "exact" else _divergence_bound
    return 1 / _increasing_root(lambda kappa: divergence(kappa, num_features) - math.log(num_bins), start)


def _check_sizes(num_features: int, num_bins: int) -> None:
    if num_features < 1 or num_bins < 2:
        raise ValueError(
            f"expected at least 1 feature and 2 bins; found num_features={num_features}, num_bins={num_bins}: "
            "100 bins are usual"
        )


def _divergence(kappa: float, num_features: int) -> float:
    """KL of vMF from uniform by Bessel functions.

    Returns:
        Nats.

    Raises:
        ValueError: the functions underflow.
    """
    from scipy.special import gammaln, ive

    nu = num_features / 2 - 1
    lower, upper = float(ive(nu, kappa)), float(ive(nu + 1, kappa))
    if not upper > 1e-300:  # it underflows at many features, and is NaN where kappa passes 1e9
        # The bounds cancel as well where kappa is that large.
        remedy = "ask for fewer bins" if math.isnan(upper) else "use bounds"
        raise ValueError(
            f"mode: exact has no digits left at {num_features} features and temperature {1 / kappa:.1g}: {remedy}"
        )
    # kappa, which both terms hold, is taken out of them: at two features it reaches 1e9, the result is below 10.
    log_scaled_partition = float(gammaln(nu + 1)) + nu * math.log(2 / kappa) + math.log(lower)
    return kappa * (upper - lower) / lower - log_scaled_partition


def _divergence_bound(kappa: float, num_features: int) -> float:
    """Lower bound of `_divergence`.

    Returns:
        Nats.
    """
    half, nu = num_features / 2, num_features / 2 - 1
    ratio = kappa / (half + math.hypot(kappa, half))
    root = math.hypot(kappa, nu)
    return kappa * ratio - (root - nu + nu * math.log(2 * nu / (nu + root)))


def _increasing_root(function: Callable[[float], float], start: float) -> float:
    """Bisect for the zero of an increasing function of a positive number.

    Returns:
        The zero, to the last digits.
    """
    low = high = start
    while function(low) > 0:
        low /= 2
    while function(high) < 0:
        high *= 2
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return (low + high) / 2
