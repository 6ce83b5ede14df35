"""Undersampling warning: signs that flip from sample to sample belong to an oscillation faster than the sampling."""

from __future__ import annotations

from dataclasses import dataclass, replace

from entropy_monitor.watcher.detectors.rules import check_options


@dataclass(frozen=True, slots=True, kw_only=True)
class FlipOptions:
    """When flips are too many.

    Raises:
        ConfigError: a value is out of range.
    """

    smoothing_samples: int = 50
    """Samples over which flips are averaged."""
    min_samples: int = 30
    """Samples before a warning."""
    enter: float = 0.3
    """Fraction of samples that flip, above which the warning is given."""
    leave: float = 0.2
    """Fraction below which it is withdrawn."""

    def __post_init__(self) -> None:
        check_options(
            self,
            {
                "smoothing_samples": (self.smoothing_samples >= 2, "at least 2"),
                "min_samples": (self.min_samples >= 2, "at least 2"),
                "enter": (0 < self.enter < 1, "a number between 0 and 1"),
                "leave": (0 <= self.leave <= self.enter, "0 to enter"),
            },
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Flips:
    """How often the sign has flipped of late."""

    num_samples: int = 0
    last_sign: int = 0
    """Sign of the last determined sample: -1 or 1, or 0 before one."""
    fraction: float = 0.0
    """EMA over samples of 1 for a flip, 0 for none."""
    is_undersampled: int = 0
    """1 while the warning holds."""


def count_flip(flips: Flips, sample_sign: int, options: FlipOptions) -> Flips:
    """Take in the sign of one sample.

    A flip is a determined sample whose sign is not that of the determined one before it. Its share is taken of all
    samples: in noise about 0 few samples are determined, but half of those few flip.

    Args:
        flips: what the last call returned, or ``Flips()``.
        sample_sign: -1 or 1, or 0 where the sample alone does not determine it.
        options: `FlipOptions`.

    Returns:
        The new state.
    """
    count = flips.num_samples + 1
    flipped = sample_sign * flips.last_sign < 0
    fraction = flips.fraction + max(1 / options.smoothing_samples, 1 / count) * (flipped - flips.fraction)
    bar = options.leave if flips.is_undersampled else options.enter
    return replace(
        flips,
        num_samples=count,
        last_sign=sample_sign or flips.last_sign,
        fraction=fraction,
        is_undersampled=int(count >= options.min_samples and fraction > bar),
    )
