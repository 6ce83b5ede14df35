"""A bank of leaky Fourier coefficients, each with a memory of a fixed number of its own periods. Pure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

NUM_PERIODS = 64
LONGEST_PERIOD = 512.0
"""In samples."""
SHORTEST_PERIOD = 8.0
"""In samples. Of shorter ones the memory would hold too few samples for a claim."""
MEMORY_PERIODS = 4.0
"""Periods after which a sample's weight has fallen to 1/e."""


class BankPeak(NamedTuple):
    """A maximum of the bank's power."""

    place: int
    """Index of the coefficient."""
    period_samples: float
    """Its period, interpolated between the bank's periods."""
    power: float


def bank_periods() -> NDArray[np.float64]:
    """Give the periods of the coefficients.

    Returns:
        Samples, shape ``(64,)``, from the longest to the shortest in equal ratios of 1.07, a coefficient's bandwidth.
    """
    return np.geomspace(LONGEST_PERIOD, SHORTEST_PERIOD, NUM_PERIODS)


def add_to_bank(coefficients: NDArray[np.complex128], innovation: float) -> NDArray[np.complex128]:
    """Add one sample: ``c <- c e^(2 pi i / P - 1 / (4 P)) + u`` for each period P. Time turns the coefficient.

    Args:
        coefficients: shape ``(64,)``, zeros at the start.
        innovation: the sample u, white and of variance 1.

    Returns:
        The new coefficients.
    """
    periods = bank_periods()
    return coefficients * np.exp(2j * np.pi / periods - 1 / (MEMORY_PERIODS * periods)) + innovation


def bank_power(coefficients: NDArray[np.complex128], num_samples: int) -> NDArray[np.float64]:
    """Give the power of each coefficient over that which white noise of variance 1 is expected to have.

    In white noise it is exponential of mean 1.

    Args:
        coefficients: shape ``(64,)``.
        num_samples: samples added so far, at least 1.

    Returns:
        Shape ``(64,)``, no unit.
    """
    leak = np.exp(-2 / (MEMORY_PERIODS * bank_periods()))
    expected = (1 - leak**num_samples) / (1 - leak)
    return np.abs(coefficients) ** 2 / expected


def find_peak(power: NDArray[np.float64], is_eligible: NDArray[np.bool_]) -> BankPeak | None:
    """Give the highest eligible power, if it is higher than both its neighbours', eligible or not.

    Args:
        power: shape ``(64,)``.
        is_eligible: shape ``(64,)``, which periods count.

    Returns:
        The peak, its period from a parabola through the logarithms of the three powers; None where the highest stands
        at an edge of the bank or on the slope to a period that does not count, as it does in a trend.
    """
    index = int(np.argmax(np.where(is_eligible, power, -1.0)))
    if not (is_eligible[index] and 0 < index < NUM_PERIODS - 1):
        return None
    longer, top, shorter = (float(power[place]) for place in (index - 1, index, index + 1))
    if not (top > longer > 0 and top > shorter > 0):
        return None
    before, after = math.log(top / longer), math.log(top / shorter)
    offset = (before - after) / (2 * (before + after))
    periods = bank_periods()
    ratio = float(periods[1] / periods[0])
    return BankPeak(index, float(periods[index]) * ratio**offset, top)
