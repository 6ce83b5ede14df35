"""The dashboard's frame: theme, navigation and run picker. Pages stand in `pages/`, one file each."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from entropy_dashboard import session
from entropy_dashboard.pages import PAGES
from entropy_dashboard.text import escape

_STATIC = Path(__file__).with_name("static")


def main() -> None:
    """Draw the page that the address names; Streamlit calls this with every full run of the script."""
    st.set_page_config(page_title="Entropy Monitor", page_icon=str(_STATIC / "favicon.svg"), layout="wide")
    st.html(_STATIC / "style.css")
    st.logo(str(_STATIC / f"logo_{session.theme()}.svg"), size="large")
    pages = [
        st.Page(page.draw, title=page.title, icon=page.icon, url_path=page.url_path, default=page.default)
        for page in PAGES
    ]
    chosen = st.navigation(pages, position="hidden")  # Streamlit's own list hides itself while there is one page only
    with st.sidebar:
        st.caption("Monitor")
        for page, entry in zip(pages, PAGES, strict=True):
            with st.container(key=f"page_{entry.url_path}"):
                st.page_link(page, label=entry.title, icon=entry.icon, width="stretch", query_params=_address())
        _pick_run()
    chosen.run()


def _address() -> dict[str, str]:  # what stays when the page changes
    return {name: st.query_params[name] for name in ("run", "from", "to") if name in st.query_params}


def _pick_run() -> None:
    runs = session.available_runs()
    if not runs:
        return
    asked, names = st.query_params.get("run"), list(runs)
    current = session.selected_run(runs)
    assert current is not None
    st.divider()
    with st.container(key="run_picker"):
        # Without a key: the address leads, and a widget's own memory would win over a link that was followed.
        picked = st.selectbox("Run", names, index=names.index(current))
    if asked is not None and asked not in runs:
        st.warning(f"There is no run {escape(asked, 80)} here. Pick one above.", icon=":material/search_off:")
    if picked != current:
        _open(picked)


def _open(name: str) -> None:
    for parameter in ("from", "to", "layer"):
        st.query_params.pop(parameter, None)
    st.query_params["run"] = name
    st.session_state.pop("confirming", None)
    st.rerun()
