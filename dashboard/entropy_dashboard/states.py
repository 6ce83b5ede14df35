"""Empty and failing states: words, and a next step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import streamlit as st

from entropy_dashboard.settings import runs_dir
from entropy_dashboard.text import escape

if TYPE_CHECKING:
    from pathlib import Path

    from entropy_dashboard.health import Notice

_ATTACH = """\
from entropy_hooks import attach

with attach(model, optimizer, run="runs/my-run"):
    train()"""
_ICONS = {
    "empty": ":material/hourglass_top:",
    "watcher": ":material/visibility_off:",
    "ended": ":material/flag:",
    "stale": ":material/schedule:",
    "dead": ":material/power_off:",
    "skew": ":material/history_toggle_off:",
    "hung": ":material/hourglass_disabled:",
}


def draw_no_runs() -> None:
    """There is nothing to look at yet."""
    with st.container(border=True, key="no_runs"):
        st.markdown("### :material/monitoring: No runs yet", anchors=False)
        st.markdown("Attach the hooks in your training script; the first sampled step makes the run:")
        st.code(_ATTACH, language="python")
        st.markdown("and measure it, in another terminal:")
        st.code("entropy-monitor watch runs/my-run", language="bash")
        st.caption(f"Looking in {escape(runs_dir())}. This page refreshes itself: the run appears here when it starts.")


def draw_unreadable(path: Path, error: Exception) -> None:
    """The run's root cannot be read."""
    with st.container(border=True, key="unreadable"):
        st.error(f"**This run cannot be read.** {escape(error)}", icon=":material/broken_image:")
        st.markdown(
            "The run picker has the other runs. If a backup of the file exists, put it back: this page looks again by "
            "itself. What the file says now:"
        )
        st.code(f"head -c 400 {path}/store.zarr/zarr.json", language="bash")


def draw_notice(notice: Notice) -> None:
    """One state that needs a person."""
    show = {"info": st.info, "warning": st.warning, "error": st.error}[notice.level]
    with st.container(key=f"notice_{notice.kind}", gap="small"):
        show(notice.text, icon=_ICONS.get(notice.kind))
        if notice.command is not None:
            st.code(notice.command, language="bash")
