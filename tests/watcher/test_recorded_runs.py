"""Recorded runs of the demo on cross-entropy alone: nothing is claimed of them that noise would show as well."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.signal import lombscargle

from entropy_monitor.watcher.detectors.period import PeriodOptions, PeriodState, update_period
from entropy_monitor.watcher.row import RunFigure
from entropy_monitor.watcher.trends import TrendState, update_trends

DATA = Path(__file__).parents[1] / "data"
FIGURES = ("mbe_normalized", "alignment_weight", "alignment_activation", "mi_input_1", "mi_output_1", "optimality")
PERIODS = np.geomspace(20, 200, 120)
"""Samples; a series holds 600."""


def recorded(seed: int) -> list[tuple[int, dict[str, RunFigure]]]:
    def number(text: str) -> float:
        return float(text) if text else math.nan

    with (DATA / f"ce_only_seed{seed}.csv").open(encoding="utf-8") as file:
        return [
            (
                int(row["step"]),
                {name: RunFigure(number(row[name]), number(row[f"{name}_se"])) for name in FIGURES},
            )
            for row in csv.DictReader(file)
        ]


def peak_power(values: np.ndarray) -> float:
    """Highest power of the whitened series, over its mean."""
    values = values - values.mean()
    correlation = float(values[1:] @ values[:-1] / (values @ values))
    white = values[1:] - correlation * values[:-1]
    power = lombscargle(np.arange(len(white), dtype=float), white - white.mean(), 2 * math.pi / PERIODS)
    return float(power.max() / white.var())


def chance(values: np.ndarray, num_series: int = 300) -> float:
    """Share of AR(1) series like this one whose highest peak is as high: the null hypothesis of a cycle, offline."""
    values = values - values.mean()
    correlation = float(values[1:] @ values[:-1] / (values @ values))
    found, rng, higher = peak_power(values), np.random.default_rng(0), 0
    for _ in range(num_series):
        noise = rng.standard_normal(len(values) + 100)
        for index in range(1, len(noise)):
            noise[index] += correlation * noise[index - 1]
        higher += peak_power(noise[100:]) >= found
    return (higher + 1) / (num_series + 1)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("figure", ["alignment_weight", "alignment_activation"])
def test_a_cycle_is_claimed_only_where_the_null_is_rejected(seed: int, figure: str) -> None:
    state, claimed, series = PeriodState(), False, []
    for step, figures in recorded(seed):
        state, found = update_period(state, step, figures[figure].value, PeriodOptions())
        claimed = claimed or found.is_cycle
        series.append(figures[figure].value)
    values = np.array(series)
    assert len(values) == 600
    assert np.isfinite(values).mean() > 0.95
    is_rejected = chance(values[np.isfinite(values)]) < 0.01
    assert is_rejected or not claimed


def test_the_offline_null_tells_a_cycle_from_noise() -> None:
    """So that the test above could fail."""
    noise = np.random.default_rng(1).standard_normal(600)
    assert chance(noise) > 0.01
    assert chance(noise + 0.7 * np.sin(2 * math.pi * np.arange(600) / 80)) < 0.01


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_recorded_runs_as_a_whole(seed: int) -> None:
    """What the detectors say of them, all three alike: fitting, then compression; alignments that oscillate fast."""
    state, stages, undersampled, told_to_stop = TrendState(), [], False, []
    for step, figures in recorded(seed):
        state, trends = update_trends(state, step, figures, window_samples=37)
        undersampled = undersampled or trends.weight_sign.is_undersampled
        assert not trends.cycle.is_cycle
        if trends.plateau.is_stopped:
            told_to_stop.append(step)
        if not stages or trends.plane.stage != stages[-1]:
            stages.append(trends.plane.stage)
    assert [stage for stage in stages if stage != "undetermined"] == ["fitting", "compression"]
    assert undersampled
    # Eight windows of 37 samples after the first: and two runs improve later, which takes the advice back.
    assert 724 <= told_to_stop[0] <= 734
    assert trends.plateau.is_stopped == (seed == 1)
