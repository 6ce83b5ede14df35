"""Run directories for the dashboard's tests, written by the store's own writers."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from entropy_monitor.store import (
    WATCHER,
    EventLog,
    MetricsLayout,
    MetricsRow,
    MetricsWriter,
    Run,
    ScalarsWriter,
    claim_attempt,
    create_run,
    event_id,
    write_heartbeat,
)
from entropy_monitor.store.layout import heartbeat_key
from entropy_monitor.types import PhaseEvent

if TYPE_CHECKING:
    from pathlib import Path

METRICS = ("mbe", "mbe_normalized", "mbe_centered", "s1", "effective_rank", "alignment_activation", "alignment_weight")
COLUMNS = tuple(name for metric in METRICS for name in (metric, f"{metric}_se"))
SCALARS = (
    "attempt",
    "step",
    "phase",
    "regime",
    "ce",
    "wall_time_s",
    "num_patches",
    "num_tokens",
    "num_tokens_seen",
    "num_ranks",
    "weight",
)
PERIOD = 700
"""Steps of one oscillation."""


@dataclass
class SyntheticRun:
    """A run whose curves oscillate between the phases, as the papers' do."""

    path: Path
    num_layers: int = 12
    every: int = 10
    attempt: int = 0
    phase: str = "memorize"
    steer: bool = True
    layer_names: tuple[str, ...] = ()
    beat: dict[str, Any] = field(default_factory=dict)
    watcher_beat: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.run: Run = create_run(self.path)
        self.layer_names = self.layer_names or tuple(f"transformer.h.{i}" for i in range(self.num_layers))
        self.layout = MetricsLayout(layers=self.layer_names, metrics=COLUMNS, scalars=SCALARS, num_ranks=1)
        self.metrics: MetricsWriter | None = None
        self.scalars: ScalarsWriter | None = None
        self.random = np.random.default_rng(0)
        self.step = 0
        self.start_attempt()

    def start_attempt(self, start_step: int | None = None) -> None:
        self.attempt = claim_attempt(self.run.objects, {"layers": list(self.layer_names), "options": {}})
        self.scalars = None
        if start_step is not None:
            self.step = start_step

    def train(self, num_steps: int, *, measured: bool = True, phase: str | None = None) -> None:
        """Make steps: scalars of each, a metrics row of every `every`-th."""
        self.scalars = self.scalars or ScalarsWriter(self.run.objects, 0, self.attempt)
        for step in range(self.step, self.step + num_steps):
            code = self._phase_code(step, phase)
            loss = ce_curve(step) + 0.08 * self.random.standard_normal()
            wall = time.time() - 0.02 * (self.step + num_steps - step)
            self.scalars.append({"step": step, "loss": loss, "phase": code, "wall_time_s": wall, "lr": 3e-4})
            if measured and step % self.every == 0:
                self.measure(step, code, loss, wall)
        self.step += num_steps
        self.scalars.flush()

    def _phase_code(self, step: int, phase: str | None) -> int:
        if phase is not None:
            self.phase = phase
        elif phase is None and self.phase == "auto":
            return int(step % PERIOD >= PERIOD // 2)
        return int(self.phase == "compress")

    def measure(self, step: int, code: int, ce: float, wall: float, **changes: float) -> None:
        """Append one metrics row; `changes` overwrites whole metrics."""
        self.metrics = self.metrics or MetricsWriter(self.run.objects)
        values = layer_values(step, self.num_layers, self.random)
        for name, value in changes.items():
            values[:, COLUMNS.index(name)] = value
        scalars = {"attempt": self.attempt, "step": step, "phase": code, "regime": 1 + code, "ce": ce}
        scalars |= {"wall_time_s": wall, "num_patches": 64, "num_tokens": 512, "num_ranks": 1, "weight": 0.03}
        scalars |= {"num_tokens_seen": 4096 * (step + 1)}
        self.metrics.append(self.layout, MetricsRow(values=values, scalars=scalars, source={0: step // self.every}))

    def heartbeats(self, *, age_s: float = 0.0, step_age_s: float = 0.0, watcher: bool = True, **fields: Any) -> None:
        """Write both heartbeats, as old as asked for."""
        now = time.time()
        trainer = {
            "attempt": self.attempt,
            "rank": 0,
            "pid": 4242,
            "host": "trainer",
            "step": self.step - 1,
            "phase": "compress" if self._phase_code(max(0, self.step - 1), None) else "memorize",
            "weight": 0.03,
            "steer": self.steer,
            "every": self.every,
            "frames_committed": self.step // self.every,
            "frames_dropped": 0,
            "faults": {},
            "overhead_percent": 0.42,
            "overhead_error_percent": 0.05,
            "overhead_samples": 60,
            "overhead_source": "training thread's CPU time, against bypassed steps",
            "state": "running",
            "last_step_at": now - step_age_s,
        }
        self._beat("r00000", {**trainer, **self.beat, **fields}, now - age_s)
        if watcher:
            regime = "compressing" if trainer["phase"] == "compress" else "memorizing"
            beat = {"last_measured_step": self.step - 1, "lag_s": {"p50": 0.08, "p95": 0.21}}
            beat |= {"regime": regime, "control": "auto", "state": "running", "faults": {}}
            self._beat(WATCHER, {**beat, **self.watcher_beat}, now)

    def _beat(self, who: str, fields: dict[str, Any], written_at: float) -> None:
        write_heartbeat(self.run.objects, who, fields)
        # The writer stamps the present; the tests need the past and the future.
        self.run.objects.put_json(heartbeat_key(who), {**fields, "written_at": written_at})

    def event(self, step: int, kind: str, reason: str, regime: Any = "compressing", layer: str | None = None) -> None:
        event = PhaseEvent(
            event_id=event_id(self.attempt, step, kind),
            step=step,
            layer=layer,
            kind=kind,
            regime=regime,
            score=1.0,
            evidence={"reason": reason},
        )
        EventLog(self.run.objects).append(event)


def ce_curve(step: int) -> float:
    """Cross-entropy that falls and oscillates."""
    return (
        1.9 + 5.0 * float(np.exp(-step / 1200)) + 0.35 * float(np.exp(-step / 6000) * np.sin(2 * np.pi * step / PERIOD))
    )


def layer_values(step: int, num_layers: int, random: np.random.Generator) -> np.ndarray:
    """One row's values ``(L, M)``: entropy that breathes, alignment that changes sign with it."""
    depth = np.arange(num_layers) / max(1, num_layers - 1)
    wave = 2 * np.pi * (step / PERIOD - 0.15 * depth)
    noise = random.standard_normal((num_layers, 3))
    entropy = 1.3 + 0.5 * np.exp(-step / 8000) * np.sin(wave) + 0.4 * np.sin(np.pi * depth) + 0.02 * noise[:, 0]
    weight = np.clip(0.7 * np.cos(wave) * np.cos(2.2 * depth) + 0.05 * noise[:, 1], -1, 1)
    values = np.zeros((num_layers, len(COLUMNS)), np.float32)
    table = {"mbe": entropy + 0.6, "mbe_normalized": entropy, "mbe_centered": entropy - 0.2, "s1": 2.0 * entropy}
    table |= {"effective_rank": np.exp(entropy), "alignment_weight": weight, "alignment_activation": 0.5 * weight}
    for name, column in table.items():
        values[:, COLUMNS.index(name)] = column
        values[:, COLUMNS.index(f"{name}_se")] = 0.02 if name.startswith("mbe") else 0.06
    if step < 40:  # too few patches at first: undetermined, not zero
        values[: num_layers // 3, COLUMNS.index("alignment_weight")] = np.nan
    return values
