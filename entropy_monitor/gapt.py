"""Gated phase transition (GAPT, arXiv 2505.08727): when to memorize and when to compress.

A pure state machine, usable in any training loop without the daemon::

    gate = GatedPhaseTransition(GateOptions.for_total_steps(10_000))
    for step in range(10_000):
        loss = ce + gate.weight * mbe          # gate.weight is 0 while memorizing
        ...                                    # backward pass and optimizer step
        gate.update(step, float(ce), float(mbe))
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from entropy_monitor.errors import ConfigError
from entropy_monitor.rows import state_from_row, state_to_row
from entropy_monitor.types import PATCH_LENGTH, PHASES, Phase

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["GateOptions", "GateState", "GatedPhaseTransition", "Transition"]

_PREFIX = "gate_"


@dataclass(frozen=True, slots=True, kw_only=True)
class GateOptions:
    """The ``default`` preset: one update an optimizer step, on smoothed cross-entropy and row-normalised MBE.

    Raises:
        ConfigError: a value is out of range.
    """

    tau_ce: float = 0.01
    """Relative fall of CE that counts as a gain while memorizing."""
    tau_mbe: float = 0.01
    """Relative fall of MBE that counts as a gain while compressing."""
    memorize_patience: int = 125
    """Updates without a gain in CE before compressing."""
    compress_patience: int = 75
    """Updates without a gain in MBE before memorizing again."""
    spike: float = 0.1
    """Least relative rise of CE over its minimum that ends compression."""
    spike_sd: float = 3.0
    """The same in standard deviations of relative CE noise; the larger of the two holds."""
    duty: float = 0.5
    """Largest share of all steps spent compressing."""
    floor: float = 0.15
    """MBE over its maximum, ln patch, at or below which there is nothing left to compress."""
    weight: float = 0.03
    """Weight of MBE in the loss while compressing."""
    ema: float = 0.95
    """Smoothing of CE: the share of the past."""
    patch: int = PATCH_LENGTH
    """Tokens in a patch of the MBE that is passed in."""

    def __post_init__(self) -> None:
        rules = {
            "tau_ce": (0 <= self.tau_ce < 1, "0 <= tau_ce < 1"),
            "tau_mbe": (0 <= self.tau_mbe < 1, "0 <= tau_mbe < 1"),
            "memorize_patience": (self.memorize_patience >= 1, "at least 1 update"),
            "compress_patience": (self.compress_patience >= 1, "at least 1 update"),
            "spike": (0 < self.spike < math.inf, "a positive number"),
            "spike_sd": (0 <= self.spike_sd < math.inf, "0 or a positive number"),
            "duty": (0 <= self.duty <= 1, "0 <= duty <= 1"),
            "floor": (0 <= self.floor <= 1, "0 <= floor <= 1"),
            "weight": (0 < self.weight < math.inf, "a positive number"),
            "ema": (0 <= self.ema < 1, "0 <= ema < 1"),
            "patch": (self.patch >= 2, "at least 2 tokens"),
        }
        for name, (valid, expected) in rules.items():
            if not valid:
                raise ConfigError(
                    f"{name}: expected {expected}, found {getattr(self, name)}: leave it out for the default"
                )

    @classmethod
    def for_total_steps(cls, total_steps: int | None) -> GateOptions:
        """Scale the patience to the length of the run: 4 % and 2.4 % of its steps.

        Args:
            total_steps: optimizer steps of the run; None, where unknown, keeps 125 and 75.

        Returns:
            The ``default`` preset.

        Raises:
            ConfigError: ``total_steps`` is not positive.
        """
        if total_steps is None:
            return cls()
        if total_steps < 1:
            raise ConfigError(f"total_steps: expected at least 1, found {total_steps}: pass None where it is unknown")
        return cls(
            memorize_patience=max(1, round(0.04 * total_steps)), compress_patience=max(1, round(0.024 * total_steps))
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GateState:
    """All that the gate remembers; numbers only, so that it round-trips through a row of float64.

    Raises:
        ValueError: the code of the phase is unknown.
    """

    phase: int = 0
    """Code of the phase: 0 memorize, 1 compress."""
    last_step: int = -1
    """Step of the last update, -1 before the first."""
    phase_since: int = 0
    """Step from which the phase holds."""
    num_steps: int = 0
    """Updates so far."""
    num_compress_steps: int = 0
    """Updates made while compressing."""
    num_stale: int = 0
    """Updates since the last gain: of CE while memorizing, of MBE while compressing."""
    ce_ema: float = math.nan
    ce_best: float = math.nan
    """Minimum of ``ce_ema`` in this phase; while memorizing, as of the last gain."""
    ce_variance: float = 0.0
    """Smoothed square of the relative residual of CE about its EMA, learned while memorizing."""
    mbe: float = math.nan
    """Last MBE passed, held between measurements; nats."""
    mbe_best: float = math.nan
    """Minimum of ``mbe`` in this phase, as of the last gain."""

    def __post_init__(self) -> None:
        if self.phase not in range(len(PHASES)):
            raise ValueError(f"phase: expected 0 (memorize) or 1 (compress), found {self.phase}: start a new GateState")

    def to_row(self) -> dict[str, float]:
        """Give columns for a table of float64.

        Returns:
            Each field under its name with the prefix ``gate_``.
        """
        return state_to_row(self, _PREFIX)

    @classmethod
    def from_row(cls, row: Mapping[str, float]) -> GateState:
        """Restore a state from columns; others in the row are ignored.

        Returns:
            The state that gave the row.
        """
        return state_from_row(cls, row, _PREFIX)


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    """A change of phase, effective from the step after ``step``."""

    step: int
    phase: Phase
    """The new phase."""
    reason: str
    """In words, with figures."""
    evidence: Mapping[str, float] = field(default_factory=dict[str, float])
    """The figures: CE, MBE, counts and thresholds."""


class GatedPhaseTransition:
    """Decide, once an optimizer step, between memorizing (CE) and compressing (CE + weight x MBE).

    - memorize to compress: ``memorize_patience`` updates without a relative gain of ``tau_ce`` in the EMA of CE, unless
      MBE was never measured, has reached ``floor``, or the next step would exceed ``duty``; a transition held back so
      is made as soon as none of them holds.
    - compress to memorize: the EMA of CE exceeds its minimum by more than ``max(spike, spike_sd x noise)``; or
      ``compress_patience`` updates without a relative gain of ``tau_mbe`` in MBE; or ``floor`` or ``duty`` is reached.

    Minima and patience start afresh on a change of phase. CE noise is the root of the smoothed squared relative
    residual of CE about its EMA; it is learned while memorizing only, as a spike would otherwise raise the threshold
    that it must pass.
    """

    def __init__(self, options: GateOptions | None = None, state: GateState | None = None) -> None:
        self.options = GateOptions() if options is None else options
        self._state = GateState() if state is None else state

    @property
    def state(self) -> GateState:
        """All that the gate remembers: a gate made from it goes on exactly."""
        return self._state

    @property
    def phase(self) -> Phase:
        """The phase in force."""
        return PHASES[self._state.phase]

    @property
    def weight(self) -> float:
        """Weight of MBE in the loss: ``options.weight`` while compressing, else 0."""
        return self.options.weight if self.phase == "compress" else 0.0

    def update(self, step: int, ce: float, mbe: float | None = None) -> Transition | None:
        """Take in one optimizer step.

        A CE that is NaN or infinite says nothing: the step counts towards the duty, but neither EMA nor minimum nor
        patience moves. An MBE that is None or not finite leaves the last one in force.

        Args:
            step: larger than that of the last update; steps left out are not counted.
            ce: cross-entropy of the step, averaged over ranks; negative losses are allowed.
            mbe: row-normalised patch MBE in nats, mean of the middle layers, or None where not measured.

        Returns:
            The transition decided on this step, or None.

        Raises:
            ValueError: the step is not after the last one.
        """
        if step <= self._state.last_step:
            raise ValueError(
                f"expected a step after {self._state.last_step}, found {step}: pass steps in order, "
                "and give a new attempt a new gate"
            )
        self._state = self._observe(step, ce, mbe)
        reason = self._reason_to_leave() if self.phase == "compress" else self._reason_to_compress()
        if reason is None:
            return None
        evidence = self._evidence()
        phase: Phase = "memorize" if self.phase == "compress" else "compress"
        self._enter(phase, step + 1)
        return Transition(step=step, phase=phase, reason=reason, evidence=evidence)

    def force(self, step: int, phase: Phase) -> None:
        """Follow a phase that somebody else has set, such as an operator; no transition is reported.

        Args:
            step: first step in that phase.
            phase: the true phase; where it is already in force nothing changes.
        """
        if phase != self.phase:
            self._enter(phase, step)

    def _enter(self, phase: Phase, step: int) -> None:
        self._state = replace(
            self._state,
            phase=PHASES.index(phase),
            phase_since=step,
            num_stale=0,
            ce_best=self._state.ce_ema,
            mbe_best=self._state.mbe,
        )

    def _observe(self, step: int, ce: float, mbe: float | None) -> GateState:
        state, keep = self._state, self.options.ema
        compressing = self.phase == "compress"
        state = replace(
            state,
            last_step=step,
            num_steps=state.num_steps + 1,
            num_compress_steps=state.num_compress_steps + compressing,
            mbe=mbe if mbe is not None and math.isfinite(mbe) else state.mbe,
        )
        if not math.isfinite(ce):
            return state
        ce_ema = ce if math.isnan(state.ce_ema) else keep * state.ce_ema + (1 - keep) * ce
        ce_variance = state.ce_variance
        if not compressing and not math.isnan(state.ce_ema) and state.ce_ema != 0:
            residual = ce / state.ce_ema - 1
            ce_variance = keep * ce_variance + (1 - keep) * residual * residual
        # While compressing, the minimum is what a spike is measured from, however small the gain.
        ce_gain = _is_gain(ce_ema, state.ce_best, 0.0 if compressing else self.options.tau_ce)
        mbe_gain = _is_gain(state.mbe, state.mbe_best, self.options.tau_mbe)
        return replace(
            state,
            ce_ema=ce_ema,
            ce_variance=ce_variance,
            ce_best=ce_ema if ce_gain else state.ce_best,
            mbe_best=state.mbe if mbe_gain else state.mbe_best,
            num_stale=0 if (mbe_gain if compressing else ce_gain) else state.num_stale + 1,
        )

    def _reason_to_compress(self) -> str | None:
        state, options = self._state, self.options
        if (
            state.num_stale < options.memorize_patience
            or self._is_duty_spent()
            or not self._relative_mbe() > options.floor
        ):
            return None
        return (
            f"CE {state.ce_ema:.4g} has not fallen {options.tau_ce:.1%} below its minimum {state.ce_best:.4g} "
            f"for {state.num_stale} updates (patience {options.memorize_patience})"
        )

    def _reason_to_leave(self) -> str | None:
        state, options = self._state, self.options
        rise = (state.ce_ema - state.ce_best) / abs(state.ce_best) if state.ce_best else math.nan
        if rise > self._spike_threshold():
            return (
                f"CE {state.ce_ema:.4g} is {rise:.1%} above its minimum {state.ce_best:.4g} "
                f"(spike threshold {self._spike_threshold():.1%})"
            )
        if self._relative_mbe() <= options.floor:
            return f"MBE {state.mbe:.4g} is {self._relative_mbe():.2f} of ln {options.patch} (floor {options.floor})"
        if state.num_stale >= options.compress_patience:
            return (
                f"MBE {state.mbe:.4g} has not fallen {options.tau_mbe:.1%} below its minimum {state.mbe_best:.4g} "
                f"for {state.num_stale} updates (patience {options.compress_patience})"
            )
        if self._is_duty_spent():
            return f"{state.num_compress_steps} of {state.num_steps} steps were compression (duty {options.duty:.0%})"
        return None

    def _is_duty_spent(self) -> bool:
        return self._state.num_compress_steps + 1 > self.options.duty * (self._state.num_steps + 1)

    def _relative_mbe(self) -> float:
        return self._state.mbe / math.log(self.options.patch)

    def _spike_threshold(self) -> float:
        return max(self.options.spike, self.options.spike_sd * math.sqrt(self._state.ce_variance))

    def _evidence(self) -> dict[str, float]:
        state = self._state
        return {
            "ce_ema": state.ce_ema,
            "ce_best": state.ce_best,
            "ce_noise": math.sqrt(state.ce_variance),
            "spike_threshold": self._spike_threshold(),
            "mbe": state.mbe,
            "mbe_best": state.mbe_best,
            "mbe_relative": self._relative_mbe(),
            "num_stale": state.num_stale,
            "num_steps": state.num_steps,
            "num_compress_steps": state.num_compress_steps,
        }


def _is_gain(value: float, best: float, tau: float) -> bool:
    return not math.isnan(value) and (math.isnan(best) or value < best - tau * abs(best))
