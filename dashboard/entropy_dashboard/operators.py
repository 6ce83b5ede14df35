"""Who may send commands: whoever has shown the operator token in this browser session."""

from __future__ import annotations

import hashlib
import hmac

import streamlit as st

from entropy_dashboard.settings import operator_token

# Not a widget's key: Streamlit drops those as soon as the widget is not drawn.
_PROOF = "operator_proof"


def unlock(offered: str) -> bool:
    """Make this session an operator's, if the token is right.

    Args:
        offered: what was typed.

    Returns:
        Whether it was right.
    """
    token = operator_token()
    if token is None or not hmac.compare_digest(offered.encode(), token.encode()):
        return False
    st.session_state[_PROOF] = _proof(token)
    return True


def lock() -> None:
    """Make this session read-only again."""
    st.session_state.pop(_PROOF, None)


def is_operator() -> bool:
    """Whether this session may send commands; asked again at the moment of acting.

    Returns:
        False too when the server's token has changed since.
    """
    token = operator_token()
    return token is not None and hmac.compare_digest(str(st.session_state.get(_PROOF, "")), _proof(token))


def _proof(token: str) -> str:
    # What a session keeps, instead of the token.
    return hashlib.sha256(b"entropy-monitor operator\0" + token.encode()).hexdigest()
