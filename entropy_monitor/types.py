"""The data that flow through entropy-monitor.

``Frame -> Measurement -> PhaseEvent -> Command -> Acknowledgement``, one way. Every record is frozen; functions return
new ones. A *regime* is what is observed, a *phase* is what is commanded: the two words are never mixed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

Phase = Literal["memorize", "compress"]
CommandPhase = Literal["memorize", "compress", "auto"]
Regime = Literal["undetermined", "memorizing", "compressing"]
Stage = Literal["undetermined", "fitting", "compression"]
"""Where a run stands on the information plane: neither regime nor phase."""
AckStatus = Literal["applied", "rejected", "expired"]

PHASES: tuple[Phase, ...] = ("memorize", "compress")
"""Phases in the order of their stored codes."""
REGIMES: tuple[Regime, ...] = ("undetermined", "memorizing", "compressing")
"""Regimes in the order of their stored codes."""
STAGES: tuple[Stage, ...] = ("undetermined", "fitting", "compression")
"""Stages in the order of their stored codes."""

PATCH_LENGTH = 8
"""Consecutive tokens in one patch, the window of matrix-based entropy in arXiv 2505.08727."""
TOKEN_OFFSETS = (-2, -1, 0, 1, 2, 3)
"""Token ids kept around each sampled position: the input 3-gram that ends there, the output 3-gram that follows."""
NUM_JACKKNIFE_GROUPS = 16
"""Groups into which the sampled patches are dealt for standard errors of the weight-space alignment."""


class LayerGroup(NamedTuple):
    """Layers of one frame that share tokens, width and dtype; arrays are float32."""

    layers: tuple[str, ...]
    """Module names, in model order."""
    activations: NDArray[np.float32]
    """Shape ``(L, n, d)``: L layers, n sampled tokens in patches of 8, d features."""
    gradients: NDArray[np.float32] | None
    """Shape ``(L, n, d)``: gradient of the loss with respect to ``activations``, or None."""


class AlignmentParts(NamedTuple):
    """Partial sums of the weight-space CE-MBE alignment of one frame (arXiv 2505.08727; see `estimators.alignment`)."""

    layers: tuple[str, ...]
    """Module names, in model order."""
    parts: NDArray[np.float32]
    """Shape ``(L, 16, 3)``: per layer and jackknife group the sums (a), (r) and (w)."""
    info: NDArray[np.float32]
    """Shape ``(L, 4)``: gradient norm, sampled patches, patches in the batch, status (0 valid, 1 no linear layer,
    2 identity-path check failed, 3 sharded gradient, 4 the gradient holds steering terms)."""


class ExactAlignment(NamedTuple):
    """CE-MBE alignment of one frame's step by autograd on the probe batch (arXiv 2505.08727; no standard error)."""

    layers: tuple[str, ...]
    """Every tapped layer, in model order."""
    cosines: NDArray[np.float32]
    """Shape ``(L, 2)``: over the weight of the last linear layer that writes into the layer's output, and over all
    trained parameters; NaN where undetermined or where this step was not audited."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """What one rank's hooks saw of the forward and backward pass that led to one optimizer step."""

    run_id: str
    attempt: int
    """Start of the trainer this frame belongs to, from 1."""
    rank: int
    seq: int
    """``64 * segment + slot``: never reused within a run; gaps are allowed."""
    step: int
    """Optimizer step of the attempt, from 0 (or ``start_step``)."""
    phase: Phase
    """Phase in force during this step."""
    wall_time_s: float
    """Unix time at which the optimizer step ended."""
    scalars: Mapping[str, float] = field(default_factory=dict[str, float])
    """``loss``, ``lr``, ``weight`` and ``grad_norm`` (as the optimizer saw it: after clipping); NaN where unknown."""
    groups: tuple[LayerGroup, ...] = ()
    """Sampled arrays; empty when the frame was read without them."""
    alignment: AlignmentParts | None = None
    exact_alignment: ExactAlignment | None = None
    """None where the trainer does not audit at all."""
    token_windows: NDArray[np.int32] | None = None
    """Shape ``(n, w)``: token ids around each sampled position, -1 where there is none."""
    num_patches: int = 0
    """Patches really sampled; the arrays are padded beyond ``8 * num_patches`` tokens."""
    num_tokens_seen: int = 0
    """Tokens this rank has trained on in this attempt, this step included."""

    @property
    def activations(self) -> NDArray[np.float32]:
        """Activations of the only layer group, ``(L, n, d)``.

        Raises:
            ValueError: the frame has no arrays or several groups.
        """
        return self._only_group().activations

    @property
    def gradients(self) -> NDArray[np.float32] | None:
        """Gradients of the only layer group, ``(L, n, d)`` or None.

        Raises:
            ValueError: the frame has no arrays or several groups.
        """
        return self._only_group().gradients

    def _only_group(self) -> LayerGroup:
        if len(self.groups) != 1:
            found = "was read without arrays" if not self.groups else f"has {len(self.groups)} groups of layers"
            raise ValueError(f"expected one group of layers; frame {self.seq} {found}: use Frame.groups")
        return self.groups[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One figure of one layer at one step, with its error and its sample size."""

    run_id: str
    step: int
    layer: str
    metric: str
    value: float
    """NaN when undetermined."""
    unit: str
    """``nats``, ``cosine``, ``dimensions``, ..."""
    std_error: float | None
    """None when no standard error is known, NaN when it is undetermined."""
    num_samples: int
    """Tokens (or patches, as the metric's documentation says) behind the value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseEvent:
    """Something worth a mark on the time axis: a regime change, a transition, advice, an alert, a fault."""

    event_id: str
    """Hash of attempt, step and kind, so that a restarted watcher repeats nothing."""
    step: int
    layer: str | None
    kind: str
    """``regime``, ``stage``, ``sign``, ``cycle``, ``plateau``, ``transition``, ``advice``, ``alert`` or ``fault``."""
    regime: Regime
    score: float
    evidence: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What the event was concluded from, always with a ``reason`` in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """An absolute order to the trainer: be in this phase, with this weight."""

    command_id: str
    """Eight digits, the command's number in the run; part of what is signed."""
    phase: CommandPhase
    weight: float | None
    """Weight of the matrix-based entropy in the loss; None is the default, 0.03."""
    reason: str
    issued_by: str
    issued_at: float
    """Unix time, seconds."""
    expires_after_s: float
    """Limits delivery, not how long the phase lasts."""
    signature: str | None = None
    """HMAC-SHA256 in hex over the canonical JSON of every other field and the run id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Acknowledgement:
    """A rank's answer to one command; created before the first step that the command governs."""

    command_id: str
    rank: int
    step: int
    """First optimizer step governed by the command when applied, else the step of the answer."""
    status: AckStatus
    detail: str
