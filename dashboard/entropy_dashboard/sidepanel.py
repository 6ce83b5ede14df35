"""What stands below the controls: a command's fate, recent events, and what watching costs.

The places are made outside the live fragment and filled by it, so that the page has one fragment only.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import streamlit as st

from entropy_dashboard.fate import judge
from entropy_dashboard.text import age, escape, number

if TYPE_CHECKING:
    from streamlit.delta_generator import DeltaGenerator

    from entropy_dashboard.readers import RunReader, Snapshot
    from entropy_monitor.store import RunStatus
    from entropy_monitor.types import PhaseEvent

MAX_EVENTS = 8
_EVENT_ICONS = {
    "regime": ":blue[:material/timeline:]",
    "stage": ":blue[:material/moving:]",
    "sign": ":blue[:material/exposure:]",
    "cycle": ":blue[:material/cycle:]",
    "plateau": ":blue[:material/flag:]",
    "transition": ":violet[:material/swap_horiz:]",
    "advice": ":gray[:material/lightbulb:]",
    "alert": ":orange[:material/warning:]",
    "fault": ":red[:material/error:]",
}
_FATE_ICONS = {
    "waiting": ":orange[:material/hourglass_top:]",
    "applied": ":green[:material/check_circle:]",
    "partial": ":orange[:material/rule:]",
    "rejected": ":red[:material/block:]",
    "expired": ":red[:material/timer_off:]",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Placeholders, each replaced as a whole."""

    command: DeltaGenerator
    events: DeltaGenerator
    cost: DeltaGenerator

    @classmethod
    def make(cls) -> Places:
        """Reserve the places where the script stands.

        Returns:
            The places.
        """
        return cls(command=st.empty(), events=st.empty(), cost=st.empty())

    def fill(self, reader: RunReader, snapshot: Snapshot) -> None:
        """Show the newest state."""
        with self.command.container(border=True, key="last_command"):
            _draw_last_command(snapshot)
        with self.events.container(border=True, key="events"):
            _draw_events(snapshot)
        with self.cost.container(border=True, key="cost"):
            _draw_cost(snapshot.status, len(reader.layers.order.steps))


def _draw_last_command(snapshot: Snapshot) -> None:
    status = snapshot.status
    st.markdown("**Last command**")
    if not status.steer and status.state in {"live", "stale"}:
        st.caption(
            ":material/visibility: This trainer only observes and rejects commands. To steer it, start it with "
            "`attach(..., steer=True)`."
        )
    if not snapshot.commands:
        st.caption("None yet. The phase is what the trainer started with.")
        return
    command, now = snapshot.commands[-1], time.time()
    fate = judge(command, snapshot.acks, status.ranks, now)
    weight = "" if command.weight is None else f", weight {command.weight:g}"
    st.markdown(f"{_FATE_ICONS[fate.kind]} **{escape(command.phase)}{escape(weight)}** — {escape(fate.text)}")
    issued = age(max(0.0, now - command.issued_at))
    st.caption(
        f"No. {int(command.command_id)} by {escape(command.issued_by, 60)}, {issued} ago: {escape(command.reason)}"
    )


def _draw_events(snapshot: Snapshot) -> None:
    st.markdown("**Events**")
    if not snapshot.events:
        st.caption("None yet. Regime changes, transitions, advice, alerts and faults appear here.")
    for event in reversed(snapshot.events[-MAX_EVENTS:]):
        st.markdown(_event_words(event))


def _event_words(event: PhaseEvent) -> str:
    icon = _EVENT_ICONS.get(event.kind, ":gray[:material/circle:]")
    reason = event.evidence.get("reason") or f"{event.kind}: {event.regime}"
    layer = "" if event.layer is None else f" · {escape(event.layer, 60)}"
    return f"{icon} {escape(reason, 160)}  \n:small[step {event.step:,} · {escape(event.kind, 20)}{layer}]"


def _draw_cost(status: RunStatus, num_measured: int) -> None:
    st.markdown("**Monitoring**")
    lag = status.watcher_lag_s["p50"], status.watcher_lag_s["p95"]
    lines = [
        f"Overhead **{status.overhead_words}**",
        f"{status.frames_committed:,} frames committed",
        f"{num_measured:,} steps measured",
        f"{_count(status.frames_dropped)} frames dropped",
        f"{_count(status.frames_removed_unmeasured)} removed unmeasured",
        f"Lag {number(lag[0], 2)} s median, {number(lag[1], 2)} s p95",
    ]
    st.markdown("  \n".join(lines))
    if status.faults:
        faults = ", ".join(f"{escape(kind, 40)} × {count:,}" for kind, count in status.faults.items())
        st.markdown(f":red[:material/error:] Faults: {faults}")
    else:
        st.caption("No faults.")


def _count(number_of: int) -> str:
    return "0" if number_of == 0 else f":red[**{number_of:,}**]"
