"""What became of a command; pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from entropy_dashboard.text import age

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from entropy_monitor.types import Acknowledgement, Command

FateKind = Literal["waiting", "applied", "partial", "rejected", "expired"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fate:
    """A command's state in words."""

    kind: FateKind
    text: str
    """Plain text: parts of it come from the run."""


def judge(command: Command, acks: Iterable[Acknowledgement], ranks: Sequence[int], now: float) -> Fate:
    """Follow a command to its end.

    Args:
        command: the command.
        acks: its acknowledgements.
        ranks: ranks that should answer.
        now: Unix time.

    Returns:
        Its fate so far.
    """
    answers = {ack.rank: ack for ack in acks if ack.command_id == command.command_id}
    missing = [rank for rank in ranks if rank not in answers]
    refused = next((ack for ack in answers.values() if ack.status != "applied"), None)
    if refused is not None:
        kind = "expired" if refused.status == "expired" else "rejected"
        return Fate(kind=kind, text=f"{kind} by rank {refused.rank}: {refused.detail}")
    late = now > command.issued_at + command.expires_after_s
    if answers and not missing:
        step = max(ack.step for ack in answers.values())
        many = f"all {len(answers)} ranks" if len(answers) > 1 else f"rank {min(answers)}"
        return Fate(kind="applied", text=f"applied at step {step:,} by {many}")
    if answers:
        text = f"applied by {len(answers)} of {len(ranks)} ranks; no answer from rank {_names(missing)}"
        return Fate(kind="partial", text=text)
    if late:
        return Fate(kind="expired", text="expired unanswered: no trainer took it; send it again when one runs")
    left_s = command.issued_at + command.expires_after_s - now
    return Fate(kind="waiting", text=f"waiting for rank {_names(missing or [0])}; expires in {age(left_s)}")


def _names(ranks: Sequence[int]) -> str:
    return ", ".join(str(rank) for rank in ranks[:6]) + (", …" if len(ranks) > 6 else "")
