"""Live: the run as it is now, and the controls beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import streamlit as st

from entropy_dashboard import control, figures, session, sidepanel
from entropy_dashboard.charts_panel import draw_alignment, draw_oscillation
from entropy_dashboard.health import heartbeat_badge, notices, phase_badge, regime_badge
from entropy_dashboard.readers import RunReader, Snapshot, usual_step_time
from entropy_dashboard.settings import refresh_s
from entropy_dashboard.states import draw_no_runs, draw_notice, draw_unreadable
from entropy_dashboard.text import escape
from entropy_monitor.errors import EntropyMonitorError

if TYPE_CHECKING:
    from pathlib import Path


def draw() -> None:
    """Draw the page."""
    runs = session.available_runs()
    name = session.selected_run(runs)
    if name is None:
        st.fragment(_wait_for_runs, run_every=max(1.0, refresh_s()))()
        return
    with st.container(horizontal=True, vertical_alignment="center", key="title_row"):
        st.markdown(f"## {escape(name)}", width="content", anchors=False)
        st.space("stretch")
        refreshes = st.toggle("Live", value=True, key="live", help="Off: the page stands still, to study the charts")
    left, right = st.columns([3, 1], gap="small")
    with right:
        control.draw_panel(name, runs[name])
        places = sidepanel.Places.make()
    with left:
        st.fragment(_draw_live, run_every=refresh_s() if refreshes else None)(name, runs[name], places)


def _wait_for_runs() -> None:
    if session.available_runs():
        st.rerun()
    draw_no_runs()


def _draw_live(name: str, path: Path, places: sidepanel.Places) -> None:
    """Everything that changes by itself; the one fragment of this page."""
    reader = session.shared_reader(str(path))
    try:
        snapshot = reader.refresh()
    except EntropyMonitorError as error:
        draw_unreadable(path, error)
        return
    if session.runs_have_changed():
        st.rerun()
    with reader.lock:
        _draw_badges(snapshot, reader)
        num_measured = len(reader.layers.order.steps)
        step_time_s = usual_step_time(reader)
        for notice in notices(snapshot.status, str(path), num_measured=num_measured, step_time_s=step_time_s):
            draw_notice(notice)
        for problem in snapshot.problems:
            st.warning(f"Part of this run cannot be read. {escape(problem)}", icon=":material/broken_image:")
        figures.draw(reader)
        draw_oscillation(reader, snapshot)
        draw_alignment(reader)
    places.fill(reader, snapshot)


def _draw_badges(snapshot: Snapshot, reader: RunReader) -> None:
    status = snapshot.status
    with st.container(horizontal=True, gap="small", vertical_alignment="center", key="badges"):
        for badge in (heartbeat_badge(status), phase_badge(status.phase), regime_badge(status.regime)):
            st.badge(badge.label, icon=badge.icon, color=badge.color)
        st.badge(f"Control: {escape(status.control, 20)}", icon=":material/tune:", color="gray")
        step = "no step yet" if status.step is None else f"step {status.step:,}"
        layers = f"{len(reader.layers.layers)} layers" if reader.layers.layers else "no layers yet"
        attempt = f" · attempt {status.attempt}" if status.attempt > 1 else ""
        ranks = f" · {len(status.ranks)} ranks" if len(status.ranks) > 1 else ""
        st.caption(f"{step} · {layers}{attempt}{ranks}")
