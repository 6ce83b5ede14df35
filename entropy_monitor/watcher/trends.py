"""What a run's figures do over time: every detector, folded over the steps. Pure: no clock, no file."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from entropy_monitor.rows import state_from_row, state_to_row
from entropy_monitor.types import REGIMES, STAGES, Regime
from entropy_monitor.watcher.detectors.period import PeriodConclusion, PeriodOptions, PeriodState, update_period
from entropy_monitor.watcher.detectors.plane import (
    PlaneConclusion,
    PlaneOptions,
    PlanePoint,
    PlaneState,
    update_plane,
)
from entropy_monitor.watcher.detectors.plateau import (
    PlateauConclusion,
    PlateauOptions,
    PlateauState,
    update_plateau,
)
from entropy_monitor.watcher.detectors.sign import SignConclusion, SignOptions, SignState, update_sign
from entropy_monitor.watcher.regimes import RegimeOptions, RegimeState, update_regime
from entropy_monitor.watcher.row import RunFigure

if TYPE_CHECKING:
    from collections.abc import Mapping

_UNKNOWN = RunFigure()
_LARGEST = 1e100


@dataclass(frozen=True, slots=True, kw_only=True)
class TrendState:
    """All that the detectors remember; numbers only, saved with the row, so that a restart continues them."""

    regime: RegimeState = field(default_factory=RegimeState)
    weight_sign: SignState = field(default_factory=SignState)
    activation_sign: SignState = field(default_factory=SignState)
    cycle: PeriodState = field(default_factory=PeriodState)
    plane: PlaneState = field(default_factory=PlaneState)
    plateau: PlateauState = field(default_factory=PlateauState)
    weight_layers: int = 0
    """Most layers of which the weight-space alignment was ever determined at once."""
    activation_layers: int = 0

    def to_row(self) -> dict[str, float]:
        """Give columns for a table of float64.

        Returns:
            Each number, the detector's name before its own.
        """
        return state_to_row(self, "")

    @classmethod
    def from_row(cls, row: Mapping[str, float]) -> TrendState:
        """Restore a state from columns; others in the row are ignored.

        Returns:
            The state that gave the row.
        """
        return state_from_row(cls, row, "")


class Trends(NamedTuple):
    """What the detectors conclude after a step."""

    regime: Regime = "undetermined"
    """From the slope of row-normalised MBE."""
    weight_sign: SignConclusion = SignConclusion(0, 0, 0.0, False)
    """Of the weight-space alignment."""
    activation_sign: SignConclusion = SignConclusion(0, 0, 0.0, False)
    """Of the activation-space alignment."""
    cycle: PeriodConclusion = PeriodConclusion(False)
    """Of the weight-space alignment."""
    plane: PlaneConclusion = PlaneConclusion("undetermined")
    """Of I(X;Z) and I(Y;Z) for single tokens."""
    plateau: PlateauConclusion = PlateauConclusion()
    """Of optimality."""

    def to_row(self) -> dict[str, float]:
        """Give columns for the metrics table.

        Returns:
            Signs are -1, 0 (undetermined) and 1; stages their codes; a period is NaN unless a cycle is claimed, a step
            unless it is known.
        """
        nan, stopped = math.nan, self.plateau.is_stopped
        return {
            "regime": REGIMES.index(self.regime),
            "alignment_weight_sign": self.weight_sign.sign,
            "alignment_weight_flips": self.weight_sign.flip_fraction,
            "alignment_weight_undersampled": self.weight_sign.is_undersampled,
            "alignment_activation_sign": self.activation_sign.sign,
            "alignment_activation_flips": self.activation_sign.flip_fraction,
            "alignment_activation_undersampled": self.activation_sign.is_undersampled,
            "cycle_period_steps": self.cycle.period_steps if self.cycle.is_cycle else nan,
            "cycle_false_alarm": self.cycle.false_alarm,
            "stage": STAGES.index(self.plane.stage),
            "stage_began": _known(self.plane.began),
            "stage_began_earliest": _known(self.plane.earliest),
            "stage_began_latest": _known(self.plane.latest),
            "optimality_stopped": self.plateau.is_stopped,
            "optimality_best": self.plateau.best,
            "optimality_best_se": self.plateau.best_error,
            "optimality_stopped_at": _known(self.plateau.stopped_at if stopped else -1),
            "optimality_stopped_earliest": _known(self.plateau.earliest if stopped else -1),
            "optimality_stopped_latest": _known(self.plateau.latest if stopped else -1),
        }


def update_trends(
    state: TrendState, step: int, figures: Mapping[str, RunFigure], window_samples: int
) -> tuple[TrendState, Trends]:
    """Take in the run-level figures of one step; those that are missing are undetermined.

    Args:
        state: what the last call returned, or ``TrendState()``.
        step: the step; one not after the last one changes nothing.
        figures: by metric, see `row.run_figures`.
        window_samples: steps that the sliding window of the information figures spans, which share its tokens.

    Returns:
        The new state, and what is concluded.
    """
    mbe, weight, activation, inputs, outputs, optimality = (
        _usable(figures.get(metric, _UNKNOWN))
        for metric in (
            "mbe_normalized",
            "alignment_weight",
            "alignment_activation",
            "mi_input_1",
            "mi_output_1",
            "optimality",
        )
    )
    plane_options = PlaneOptions(correlation_samples=window_samples, min_samples=max(3, 2 * window_samples))
    plateau_options = PlateauOptions(correlation_samples=window_samples, patience=8 * window_samples)
    weight_layers = max(state.weight_layers, weight.num_layers)
    activation_layers = max(state.activation_layers, activation.num_layers)
    # While a phase is steered some layers are undetermined, and the mean of the others is another series.
    weight = weight if weight.num_layers == weight_layers else _UNKNOWN
    activation = activation if activation.num_layers == activation_layers else _UNKNOWN
    regime_state, regime = update_regime(state.regime, step, mbe.value, mbe.std_error, RegimeOptions())
    weight_state, weight_sign = update_sign(state.weight_sign, step, weight.value, weight.std_error, SignOptions())
    activation_state, activation_sign = update_sign(
        state.activation_sign, step, activation.value, activation.std_error, SignOptions()
    )
    cycle_state, cycle = update_period(state.cycle, step, weight.value, PeriodOptions())
    point = PlanePoint(inputs.value, inputs.std_error, outputs.value, outputs.std_error)
    plane_state, plane = update_plane(state.plane, step, point, plane_options)
    plateau_state, plateau = update_plateau(
        state.plateau, step, optimality.value, optimality.std_error, plateau_options
    )
    new = TrendState(
        regime=regime_state,
        weight_sign=weight_state,
        activation_sign=activation_state,
        cycle=cycle_state,
        plane=plane_state,
        plateau=plateau_state,
        weight_layers=weight_layers,
        activation_layers=activation_layers,
    )
    return new, Trends(regime, weight_sign, activation_sign, cycle, plane, plateau)


def _usable(figure: RunFigure) -> RunFigure:
    """Leave out what only a damaged frame can hold: its square would end the watcher.

    Returns:
        The figure, or an unknown one.
    """
    return figure if abs(figure.value) < _LARGEST else _UNKNOWN


def _known(step: int) -> float:
    return math.nan if step < 0 else step
