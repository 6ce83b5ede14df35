"""From a command that may be applied to the step at which it is, the same on every rank.

Rank 0 decides. It waits until every rank has seen the command, then names a step: the one after the next boundary. A
rank reaches that boundary only after a backward pass that rank 0 took part in, which is after rank 0 has written the
note. The other ranks look for the note at their boundaries while they know of a command, and not otherwise.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from entropy_hooks.faults import Faults
    from entropy_hooks.shared_notes import SharedNotes
    from entropy_monitor.types import AckStatus, Command

SEEN_TIMEOUT_S = 30.0
"""How long rank 0 waits for the others to see a command."""


@dataclass(slots=True)
class Pending:
    """A command that may be applied."""

    number: int
    command: Command
    offered_at: float
    """Monotonic."""
    seen_by_all: bool = False
    step: int | None = None
    """The step that it governs first, once that is decided."""


class Answer(Protocol):
    """Acknowledges a command, see `Pulse.answer`."""

    def __call__(self, number: int, status: AckStatus, step: int, detail: str) -> bool:
        """Whether this answer counts."""
        ...


class Delivery:
    """Commands on their way to the training thread, oldest first."""

    def __init__(self, open_notes: Callable[[], SharedNotes | None], answer: Answer, faults: Faults) -> None:
        self._open_notes, self._answer, self._faults = open_notes, answer, faults
        self._notes: SharedNotes | None = None
        self._pending: deque[Pending] = deque()

    def close(self) -> None:
        """Let go of the process group's store, which the job may destroy from now on."""
        self._notes, self._open_notes = None, _no_notes

    # ---- the pulse thread --------------------------------------------------------------------------------------------

    @property
    def shared(self) -> bool:
        """The job's ranks apply a command at one step; else each answers for itself."""
        self._notes = self._notes or self._open_notes()
        return self._notes is not None

    def offer(self, number: int, command: Command) -> None:
        """A command has been judged and may be applied."""
        notes = self._notes if self.shared else None
        if notes is not None:
            notes.write(f"{number}/seen/{notes.rank}", {})
        self._pending.append(Pending(number, command, time.monotonic(), seen_by_all=notes is None))

    def refuse(self, number: int, detail: str) -> None:
        """This rank cannot apply a command: then no rank may."""
        if self.shared and self._notes is not None:
            self._notes.write(f"{number}/seen/{self._notes.rank}", {"refused": detail})

    def look_around(self, step: int) -> None:
        """On rank 0: have all ranks seen the oldest command? On the others: has rank 0 called it off?"""
        notes = self._notes
        if notes is None or not self._pending:
            return
        pending = self._pending[0]
        if notes.rank != 0:
            called_off = notes.read(f"{pending.number}/called off")
            if called_off is not None:
                self._drop(pending, called_off["status"], step, called_off["detail"])
            return
        if pending.seen_by_all:
            return
        names = [f"{pending.number}/seen/{rank}" for rank in range(notes.world_size)]
        if notes.has_all(names):
            refusals = [(rank, (notes.read(name) or {}).get("refused")) for rank, name in enumerate(names)]
            refused = next(((rank, detail) for rank, detail in refusals if detail), None)
            if refused is not None:
                self._call_off(pending, "rejected", step, f"rank {refused[0]}: {refused[1]}")
                return
            pending.seen_by_all = True
        elif time.monotonic() - pending.offered_at > SEEN_TIMEOUT_S:
            missing = [rank for rank, name in enumerate(names) if notes.read(name) is None]
            self._call_off(
                pending,
                "rejected",
                step,
                f"expected every rank to see the command within {SEEN_TIMEOUT_S:.0f} s; rank "
                f"{', '.join(map(str, missing))} did not: attach on every rank, with one run directory",
            )

    def _call_off(self, pending: Pending, status: AckStatus, step: int, detail: str) -> None:
        if self._notes is not None:
            self._notes.write(f"{pending.number}/called off", {"status": status, "detail": detail})
        self._drop(pending, status, step, detail)

    def _drop(self, pending: Pending, status: AckStatus, step: int, detail: str) -> None:
        if self._pending and self._pending[0] is pending:  # else the training thread has taken it in this moment
            self._pending.popleft()
            self._answer(pending.number, status, step, detail)

    # ---- the training thread -----------------------------------------------------------------------------------------

    def due(self, step: int) -> Iterator[Pending]:
        """Commands to be applied before a step begins.

        Args:
            step: the step.

        Yields:
            The commands, oldest first; each is gone once it has been given.
        """
        while self._pending:
            pending = self._pending[0]
            if pending.step is None:
                self._decide(pending, step)
            if pending.step is not None and self._is_due(pending, step):
                yield self._pending.popleft()
            elif self._pending and self._pending[0] is pending:  # else it has been called off, and another is first
                return

    def _decide(self, pending: Pending, step: int) -> None:
        """Name the step, or learn from rank 0 which it is."""
        notes = self._notes
        if notes is not None and notes.rank != 0:
            decided = notes.read(f"{pending.number}/step")
            pending.step = None if decided is None else int(decided["step"])
        elif pending.seen_by_all:
            if time.time() > pending.command.issued_at + pending.command.expires_after_s:
                self._call_off(pending, "expired", step, "expired while waiting for a step boundary: send it again")
                return
            pending.step = step if notes is None else step + 1
            if notes is not None:
                notes.write(f"{pending.number}/step", {"step": pending.step})

    def _is_due(self, pending: Pending, step: int) -> bool:
        assert pending.step is not None
        if pending.step > step:
            return False
        if pending.step < step:
            self._faults.count(
                "late_command",
                f"expected command {pending.number} at step {pending.step}; found this rank at step {step} already: "
                "its ranks do not step together",
            )
        return True


def _no_notes() -> None:
    """What is opened once the delivery is closed."""
