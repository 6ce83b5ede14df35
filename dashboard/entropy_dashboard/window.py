"""Which steps the charts show: all, the last ones, or what was brushed; ``?from=&to=`` shares the last."""

from __future__ import annotations

from typing import TYPE_CHECKING

import streamlit as st

from entropy_dashboard import charts, session, tables
from entropy_dashboard.tables import Window

if TYPE_CHECKING:
    from collections.abc import Hashable

    from entropy_dashboard.readers import RunReader

BRUSH = "Brush"
WINDOWS: dict[str, int | None] = {"All": None, "Last 4k": 4000, "Last 1k": 1000, BRUSH: None}
_GRID = 16
"""Windows begin on a grid, so that they do not move with every single step."""


def choose_span() -> str:
    """The choice above the charts; keyed, so that every chart of the page can ask for it.

    Returns:
        A key of `WINDOWS`.
    """
    default = BRUSH if "from" in st.query_params else "All"
    return st.segmented_control("Steps", list(WINDOWS), default=default, required=True, key="window") or "All"


def chosen_window(reader: RunReader) -> Window:
    """The window that all charts share; the caller holds the reader's lock.

    Returns:
        The window, never empty.
    """
    full = tables.drawn_window(tables.full_window(reader))
    span = st.session_state.get("window", "All")
    if span == BRUSH:
        return _clip(_address_window(full), full)
    last = WINDOWS.get(span)
    if last is None or full.stop - full.start <= last:
        return full
    return Window(max(full.start, (full.stop - last) // _GRID * _GRID), full.stop)


def view_of(window: Window) -> Hashable:
    """What stays the same while a window follows the run, and changes when the viewer chooses another.

    Args:
        window: the chosen window.

    Returns:
        A key.
    """
    span = st.session_state.get("window", "All")
    return (span, window) if span == BRUSH else span


def draw_brush(reader: RunReader) -> None:
    """A strip of the whole run to drag over; what is brushed goes into the address."""
    full = tables.drawn_window(tables.full_window(reader))
    theme = session.theme()
    data = {
        "bands": reader.table(("bands", full), lambda: tables.bands_table(reader, full)),
        "span": tables.span_table(full),
        "ce": reader.table(("overview", full), lambda: tables.loss_table(reader, full, 160)),
    }
    with st.container(key="brush_strip"):
        chosen = st.vega_lite_chart(
            spec={**charts.overview(theme), "datasets": data},
            key="brush",
            on_select="rerun",
            alt="Cross-entropy loss of the whole run; drag to choose the steps shown below",
        )
    steps = chosen["selection"].get("window", {}).get("step")
    if steps:
        low, high = int(min(steps)) // _GRID * _GRID, (int(max(steps)) // _GRID + 1) * _GRID
        st.query_params.update({"from": str(low), "to": str(high)})
    elif "from" not in st.query_params:
        st.caption("Drag over the strip to choose the steps of all charts; the address keeps the choice.")


def _address_window(full: Window) -> Window:
    numbers = [st.query_params.get(name, "") for name in ("from", "to")]
    if not all(text.isascii() and text.isdigit() and len(text) < 16 for text in numbers):
        return full
    return Window(int(numbers[0]), int(numbers[1]))


def _clip(window: Window, full: Window) -> Window:
    start, stop = max(window.start, full.start), min(window.stop, full.stop)
    return Window(start, stop) if start < stop else full
