"""From the figures of one step to a row of the metrics table. Pure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from entropy_monitor.store import MetricsLayout, MetricsRow
from entropy_monitor.types import PHASES, REGIMES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from entropy_monitor.types import Measurement, Regime
    from entropy_monitor.watcher.follow import JoinedStep

MEASURED = (
    "mbe",
    "mbe_normalized",
    "mbe_centered",
    "s1",
    "s2",
    "effective_rank",
    "alignment_activation",
    "alignment_weight",
)
"""What `measure.measure_frames` gives for each layer."""
RUN_METRIC = "mbe_normalized"
"""The primary figure, from which regime and controller judge the run."""


def mean_over_layers(measurements: Sequence[Measurement], layers: Sequence[str] | None = None) -> tuple[float, float]:
    """Mean of the primary figure over layers.

    Args:
        measurements: figures of one step.
        layers: which layers; all when None.

    Returns:
        The mean in nats and its standard error: the mean of the layers' errors, an upper bound, since all layers share
        their tokens. NaN when nothing was measured.
    """
    chosen = [
        (m.value, m.std_error if m.std_error is not None else math.nan)
        for m in measurements
        if m.metric == RUN_METRIC and (layers is None or m.layer in layers) and math.isfinite(m.value)
    ]
    if not chosen:
        return math.nan, math.nan
    return sum(value for value, _ in chosen) / len(chosen), sum(error for _, error in chosen) / len(chosen)


def middle_layers(layers: Sequence[str]) -> tuple[str, ...]:
    """The middle half: indices ``L//4 .. L-1-L//4``.

    Returns:
        Their names.
    """
    quarter = len(layers) // 4
    return tuple(layers[quarter : len(layers) - quarter])


def step_scalars(joined: JoinedStep, measurements: Sequence[Measurement], regime: Regime) -> dict[str, float]:
    """What a row says of the whole step.

    Returns:
        Values by column.
    """
    frames = joined.frames
    counts = {m.metric: m.num_samples for m in measurements}
    nan = math.nan
    return {
        "attempt": joined.attempt,
        "step": joined.step,
        "phase": PHASES.index(frames[0].phase) if frames else nan,
        "regime": REGIMES.index(regime),
        "ce": sum(frame.scalars.get("loss", nan) for frame in frames) / len(frames) if frames else nan,
        "weight": frames[0].scalars.get("weight", nan) if frames else nan,
        "wall_time_s": max((frame.wall_time_s for frame in frames), default=nan),
        "num_patches": counts.get("mbe", 0),
        "num_tokens": counts.get("s2", 0),
        "num_tokens_seen": sum(frame.num_tokens_seen for frame in frames),
        "num_ranks": len(frames),
    }


def metrics_row(
    joined: JoinedStep, measurements: Sequence[Measurement], scalars: Mapping[str, float], layout: MetricsLayout
) -> MetricsRow:
    """Lay one step's figures out as a row.

    Args:
        joined: the step.
        measurements: its figures; none when no frame of it could be read.
        scalars: its run scalars and the detectors' states.
        layout: the names.

    Returns:
        The row; what was not measured is NaN.
    """
    values = np.full((len(layout.layers), len(layout.metrics)), np.nan, np.float32)
    row_of = {layer: index for index, layer in enumerate(layout.layers)}
    column_of = {name: index for index, name in enumerate(layout.metrics)}
    for m in measurements:
        values[row_of[m.layer], column_of[m.metric]] = m.value
        values[row_of[m.layer], column_of[f"{m.metric}_se"]] = math.nan if m.std_error is None else m.std_error
    return MetricsRow(values=values, scalars=scalars, source=joined.source)


def table_layout(layers: Sequence[str], scalars: Mapping[str, float], num_ranks: int) -> MetricsLayout:
    """Names of the rows of one attempt.

    Args:
        layers: the model's layers, in order.
        scalars: run scalars and the detectors' states.
        num_ranks: ranks of the attempt.

    Returns:
        The layout.
    """
    names = tuple(name for metric in MEASURED for name in (metric, f"{metric}_se"))
    return MetricsLayout(layers=tuple(layers), metrics=names, scalars=tuple(scalars), num_ranks=num_ranks)
