"""What pages share: the run that is looked at, the shared readers, the theme."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import streamlit as st

from entropy_dashboard.listing import list_runs
from entropy_dashboard.readers import RunReader
from entropy_dashboard.settings import refresh_s, runs_dir

if TYPE_CHECKING:
    from entropy_dashboard.theme import Theme


@st.cache_resource(max_entries=16, show_spinner=False)
def shared_reader(path: str) -> RunReader:
    """The one reader of a run, for all viewers.

    Args:
        path: a path from the listing.

    Returns:
        The reader.
    """
    return RunReader(Path(path), min_age_s=0.4 * refresh_s())


def available_runs() -> dict[str, Path]:
    """Runs that may be looked at.

    Returns:
        Path by name.
    """
    return list_runs(runs_dir())


def selected_run(runs: dict[str, Path]) -> str | None:
    """The run that the address names, else the most recently active one.

    Args:
        runs: the listing.

    Returns:
        A name in the listing; None when it is empty.
    """
    asked = st.query_params.get("run")
    return asked if asked in runs else next(iter(runs), None)


def theme() -> Theme:
    """The viewer's theme.

    Returns:
        ``light`` or ``dark``.
    """
    return "dark" if st.context.theme.type == "dark" else "light"


def runs_have_changed() -> bool:
    """Whether the listing differs from the one that this viewer's page was drawn with.

    Returns:
        True once for each change.
    """
    names = sorted(available_runs())
    changed = st.session_state.get("listed_runs", names) != names
    st.session_state["listed_runs"] = names
    return changed
