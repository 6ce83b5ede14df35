"""From the figures of one step to a row of the metrics table. Pure."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from entropy_monitor.catalog import METRICS, RUN_PREFIX
from entropy_monitor.store import MetricsLayout, MetricsRow
from entropy_monitor.types import PHASES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from entropy_monitor.types import Measurement
    from entropy_monitor.watcher.follow import JoinedStep
    from entropy_monitor.watcher.window import WindowExtent

_METRIC_COLUMNS = tuple(name for metric in METRICS for name in (metric.name, f"{metric.name}_se"))


class RunFigure(NamedTuple):
    """One metric, averaged over layers."""

    value: float = math.nan
    std_error: float = math.nan
    num_layers: int = 0
    """Layers that were determined."""


def run_figures(measurements: Sequence[Measurement], layers: Sequence[str] | None = None) -> dict[str, RunFigure]:
    """Average every metric over the layers, each weighted by its samples.

    Args:
        measurements: figures of one step.
        layers: which layers; all when None.

    Returns:
        By metric, where any layer has it: the mean of what is determined, and as its standard error the mean of the
        layers' errors, an upper bound, since all layers share their tokens (NaN where a layer has none).
    """
    chosen: dict[str, list[Measurement]] = defaultdict(list)
    for m in measurements:
        if (layers is None or m.layer in layers) and math.isfinite(m.value):
            chosen[m.metric].append(m)
    figures: dict[str, RunFigure] = {}
    for metric, group in chosen.items():
        weights = [max(1, m.num_samples) for m in group]
        errors = [math.nan if m.std_error is None else m.std_error for m in group]
        total = sum(weights)
        figures[metric] = RunFigure(
            sum(m.value * weight for m, weight in zip(group, weights, strict=True)) / total,
            sum(error * weight for error, weight in zip(errors, weights, strict=True)) / total,
            len(group),
        )
    return figures


def step_scalars(
    joined: JoinedStep,
    measurements: Sequence[Measurement],
    figures: Mapping[str, RunFigure],
    window: WindowExtent | None,
) -> dict[str, float]:
    """What a row says of the whole step.

    Args:
        joined: the step.
        measurements: its figures.
        figures: their means over the layers.
        window: the window behind the information figures, if there is one.

    Returns:
        Values by column.
    """
    frames = joined.frames
    counts = {m.metric: m.num_samples for m in measurements if m.num_samples}
    nan = math.nan
    run_level = {metric.name: figures.get(metric.name, RunFigure()) for metric in METRICS}
    return {
        "attempt": joined.attempt,
        "step": joined.step,
        "phase": PHASES.index(frames[0].phase) if frames else nan,
        "ce": sum(frame.scalars.get("loss", nan) for frame in frames) / len(frames) if frames else nan,
        "weight": frames[0].scalars.get("weight", nan) if frames else nan,
        "wall_time_s": max((frame.wall_time_s for frame in frames), default=nan),
        "num_patches": counts.get("mbe", 0),
        "num_tokens": counts.get("s2", 0),
        "num_tokens_seen": sum(frame.num_tokens_seen for frame in frames),
        "num_ranks": len(frames),
        "num_probes": max(counts.get("alignment_exact", 0), counts.get("alignment_exact_all", 0)),
        "num_window_tokens": window.num_tokens if window else 0,
        "window_first_step": window.first_step if window else nan,
        **{RUN_PREFIX + name: figure.value for name, figure in run_level.items()},
        **{f"{RUN_PREFIX}{name}_se": figure.std_error for name, figure in run_level.items()},
    }


def metrics_row(
    joined: JoinedStep,
    measurements: Sequence[Measurement],
    scalars: Mapping[str, float],
    states: Mapping[str, float],
    layout: MetricsLayout,
) -> MetricsRow:
    """Lay one step's figures out as a row.

    Args:
        joined: the step.
        measurements: its figures; none when no frame of it could be read.
        scalars: its run scalars.
        states: the detectors' states after it.
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
    return MetricsRow(values=values, scalars=scalars, states=states, source=joined.source)


def table_layout(
    layers: Sequence[str], scalars: Mapping[str, float], states: Mapping[str, float], num_ranks: int
) -> MetricsLayout:
    """Names of the rows of one attempt.

    Args:
        layers: the model's layers, in order.
        scalars: run scalars.
        states: the detectors' states.
        num_ranks: ranks of the attempt.

    Returns:
        The layout.
    """
    return MetricsLayout(
        layers=tuple(layers),
        metrics=_METRIC_COLUMNS,
        scalars=tuple(scalars),
        states=tuple(states),
        num_ranks=num_ranks,
    )
