"""What the asking process and its shield tell each other."""

from __future__ import annotations

from dataclasses import dataclass

ADDRESS_MARK, SIZE_MARK = "0xfedcba9876543210", "0xfedcba9876543211"
"""Stand in the code for the address at which it comes to lie, and the size of its mapping."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to do to a target."""

    pid: int
    mmap: int
    add_pending_call: int
    run_simple_string: int
    sigreturn: int
    code: str
    """Empty: queue nothing, only have the main thread look again for queued calls."""
    check_signals: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What was done."""

    reason: str = ""
    """Empty if the code is queued in the target; else one word, see `entropy_monitor.injection.borrow`."""
    detail: str = ""
    stopped_s: float = 0.0
    """How long the target's main thread stood still."""
