"""What a run's state means and what to do next, in words; pure."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from entropy_dashboard.text import age

if TYPE_CHECKING:
    from entropy_monitor.store import RunStatus

SKEW_S = 2.0
"""A heartbeat so far in the future means that the clocks disagree."""
HUNG_AFTER_S = 30.0
"""A live trainer without a step for so long is worth a word."""
HUNG_AFTER_STEPS = 20.0
"""... unless its steps are slow: then after so many usual steps."""

Color = Literal["green", "orange", "red", "blue", "gray"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Badge:
    """One small coloured label."""

    label: str
    icon: str
    color: Color


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """A state that needs a person: what is wrong, and the next step."""

    kind: str
    level: Literal["info", "warning", "error"]
    text: str
    command: str | None = None
    """What to type into a shell."""


def heartbeat_badge(status: RunStatus) -> Badge:
    """The trainer's life sign.

    Returns:
        The badge.
    """
    seconds = status.heartbeat_age_s
    if status.state == "ended":
        return Badge(label="Ended", icon=":material/flag:", color="gray")
    if seconds is None:
        return Badge(label="No heartbeat yet", icon=":material/power_off:", color="red")
    if seconds < -SKEW_S:
        return Badge(label=f"Clock skew · {age(-seconds)} ahead", icon=":material/history_toggle_off:", color="orange")
    if status.state == "live":
        return Badge(label=f"Live · heartbeat {age(max(0.0, seconds))} ago", icon=":material/sensors:", color="green")
    if status.state == "stale":
        return Badge(label=f"Stale · heartbeat {age(seconds)} ago", icon=":material/schedule:", color="orange")
    return Badge(label=f"Dead · heartbeat {age(seconds)} ago", icon=":material/power_off:", color="red")


def phase_badge(phase: str | None) -> Badge:
    """The phase that is commanded.

    Returns:
        The badge.
    """
    if phase == "compress":
        return Badge(label="Phase: compress", icon=":material/compress:", color="blue")
    if phase == "memorize":
        return Badge(label="Phase: memorize", icon=":material/school:", color="orange")
    return Badge(label="Phase unknown", icon=":material/help:", color="gray")


def regime_badge(regime: str) -> Badge:
    """The regime that is observed.

    Returns:
        The badge.
    """
    if regime == "compressing":
        return Badge(label="Regime: compressing", icon=":material/trending_down:", color="blue")
    if regime == "memorizing":
        return Badge(label="Regime: memorizing", icon=":material/trending_up:", color="orange")
    return Badge(label="Regime: undetermined", icon=":material/trending_flat:", color="gray")


def notices(status: RunStatus, run_path: str, *, num_measured: int, step_time_s: float | None) -> list[Notice]:
    """Everything a person should know about this run's state.

    Args:
        status: the state.
        run_path: the run's directory, for the commands.
        num_measured: measured steps so far.
        step_time_s: usual time of one optimizer step, None when unknown.

    Returns:
        The notices, the most important first.
    """
    found = [_trainer(status), _hung(status, step_time_s)]
    watch = f"entropy-monitor watch {shlex.quote(run_path)}"
    if status.watcher_state == "live":
        if num_measured == 0 and status.state != "ended":
            text = "Nothing is measured yet: the watcher runs and waits for the first sampled step."
            found.append(Notice(kind="empty", level="info", text=text))
    elif status.state != "ended" or num_measured == 0:
        text = "The watcher is not running: entropy and alignment stop here, training goes on. Start it with"
        if num_measured == 0:
            text = "Nothing is measured yet and no watcher is running: entropy and alignment need it. Start it with"
        found.append(Notice(kind="watcher", level="warning", text=text, command=watch))
    return [notice for notice in found if notice is not None]


def _trainer(status: RunStatus) -> Notice | None:
    seconds = status.heartbeat_age_s
    if status.state == "ended":
        return Notice(kind="ended", level="info", text="Training has ended. The charts show the whole run.")
    if seconds is None:
        text = "No trainer has sent a heartbeat in this attempt. Start the training script with its hooks attached."
        return Notice(kind="dead", level="error", text=text)
    if seconds < -SKEW_S:
        text = (
            f"The trainer's clock is {age(-seconds)} ahead of this machine's, so a silent trainer cannot be told from "
            "a live one. Synchronise both clocks (chrony, ntpd), then reload this page."
        )
        return Notice(kind="skew", level="warning", text=text)
    if status.state == "stale":
        text = f"The trainer has been silent for {age(seconds)}. What follows may be out of date."
        return Notice(kind="stale", level="warning", text=text)
    if status.state == "dead":
        text = (
            f"The trainer has been silent for {age(seconds)}: it was killed, or its machine is gone. The charts show "
            "what arrived. Look at its log, then start it again with the same run: it continues here as a new attempt."
        )
        return Notice(kind="dead", level="error", text=text)
    return None


def _hung(status: RunStatus, step_time_s: float | None) -> Notice | None:
    waited_s = status.last_step_age_s
    if status.state != "live" or waited_s is None:
        return None
    if waited_s <= max(HUNG_AFTER_S, HUNG_AFTER_STEPS * (step_time_s or 0.0)):
        return None
    text = (
        f"The trainer is alive but has made no step for {age(waited_s)}. It may be evaluating, saving, or waiting for "
        "another rank; if not, see where it stands with `py-spy dump --pid PID`."
    )
    return Notice(kind="hung", level="warning", text=text)
