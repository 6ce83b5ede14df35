"""The control panel: choose a phase, say why, confirm; then see what the trainer answers.

The panel stands outside the live fragment, whose refresh would take the keyboard away from a form. What must stay fresh
beside the buttons goes through placeholders that the fragment fills.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import streamlit as st

from entropy_dashboard import operators, session
from entropy_dashboard.settings import OPERATOR_TOKEN, operator_token, signing_key
from entropy_dashboard.text import escape
from entropy_monitor.errors import EntropyMonitorError
from entropy_monitor.store import CommandRequest, issue_command

if TYPE_CHECKING:
    from pathlib import Path

    from entropy_monitor.types import CommandPhase

_LABELS: dict[CommandPhase, tuple[str, str]] = {
    "auto": ("Auto", ":material/autorenew:"),
    "memorize": ("Memorize", ":material/school:"),
    "compress": ("Compress", ":material/compress:"),
}
_EFFECTS: dict[CommandPhase, str] = {
    "auto": "The controller decides again. Phase and weight stay as they are until it does.",
    "memorize": "Training minimises cross-entropy alone until another command. The controller is suspended until Auto.",
    "compress": "Training also minimises entropy until another command. The controller is suspended until Auto.",
}
_CONFIRMING, _OUTCOME = "confirming", "command_outcome"


def draw_panel(run_name: str, path: Path) -> None:
    """Draw buttons or lock, and the dialog when a phase waits for confirmation."""
    with st.container(border=True, key="control"):
        st.markdown("**Control**")
        allowed = operators.is_operator()
        for phase, (label, icon) in _LABELS.items():
            st.button(
                label,
                icon=icon,
                key=f"command_{phase}",
                width="stretch",
                disabled=not allowed,
                on_click=_ask,
                args=(phase,),
            )
        if allowed:
            st.button("Lock", icon=":material/lock_open:", key="lock", type="tertiary", on_click=operators.lock)
        elif operator_token() is None:
            st.caption(
                f"Read-only: no operator token is set. To allow commands, start the dashboard with {OPERATOR_TOKEN} "
                "set to a secret of your choice."
            )
        else:
            _draw_unlock()
    phase = st.session_state.get(_CONFIRMING)
    if phase in _LABELS:
        _confirm(run_name, path, phase)


def _draw_unlock() -> None:
    with st.popover("Read-only — unlock", icon=":material/lock:", width="stretch", key="unlock"):
        st.text_input("Your name", key="operator_name_field", value="operator", max_chars=60)
        st.text_input("Operator token", type="password", key="operator_token_field", on_change=_try_unlock)
        if st.session_state.pop("unlock_failed", False):
            st.error("That is not the token. It is printed where the dashboard was started.", icon=":material/key_off:")


def _try_unlock() -> None:
    offered = st.session_state.get("operator_token_field", "")
    st.session_state["operator_token_field"] = ""
    if operators.unlock(offered):
        # Copied out of the widget's key, which goes with the widget.
        st.session_state["operator_name"] = st.session_state.get("operator_name_field", "").strip() or "operator"
    else:
        st.session_state["unlock_failed"] = True


def _ask(phase: CommandPhase) -> None:
    st.session_state[_CONFIRMING] = phase
    st.session_state.pop(_OUTCOME, None)


def _dismiss() -> None:
    st.session_state.pop(_CONFIRMING, None)


# Open as long as the session says so, whatever else reruns the page meanwhile.
@st.dialog("Confirm command", icon=":material/swap_horiz:", on_dismiss=_dismiss)
def _confirm(run_name: str, path: Path, phase: CommandPhase) -> None:
    st.markdown(f"Switch **{escape(run_name)}** to **{_LABELS[phase][0].lower()}**? {_EFFECTS[phase]}")
    with st.form("command_form", border=False):
        st.text_input(
            "Reason (required)", key="reason", max_chars=300, placeholder="e.g. entropy plateau in blocks 4-7"
        )
        if phase == "compress":
            st.number_input(
                "Weight of entropy in the loss",
                key="weight",
                value=None,
                min_value=0.0,
                step=0.01,
                format="%.4f",
                placeholder="empty: the run's default",
            )
        st.form_submit_button(
            "Send command", key="send", type="primary", width="stretch", on_click=_send, args=(path, phase)
        )
    if problem := st.session_state.get(_OUTCOME):
        st.error(escape(problem), icon=":material/error:")
    if _CONFIRMING not in st.session_state:
        st.rerun()  # sent: the dialog closes with the next full run
    if st.button("Cancel", key="cancel", width="stretch"):
        _dismiss()
        st.rerun()


def _send(path: Path, phase: CommandPhase) -> None:
    try:
        _issue(path, phase)
    except (EntropyMonitorError, ValueError) as error:
        st.session_state[_OUTCOME] = str(error)
        return
    st.session_state.pop(_OUTCOME, None)
    _dismiss()


def _issue(path: Path, phase: CommandPhase) -> None:
    if not operators.is_operator():
        raise ValueError("This session is read-only: unlock it with the operator token.")
    if path not in session.available_runs().values():
        raise ValueError("This run is gone: reload the page.")
    if not st.session_state.get("reason", "").strip():
        raise ValueError("Give a reason: it is kept with the command, for whoever reads the run later.")
    request = CommandRequest(
        phase=phase,
        reason=st.session_state["reason"],
        issued_by=st.session_state.get("operator_name", "operator"),
        weight=st.session_state.get("weight") if phase == "compress" else None,
    )
    reader = session.shared_reader(str(path))
    if reader.refresh().status.state == "ended":
        raise ValueError("Training has ended: there is nobody to take the command.")
    issue_command(reader.run.objects, reader.run.run_id, request, key=signing_key())
