"""The control channel as the watcher sees it: who commands, and what became of the controller's commands."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from entropy_monitor.store import CommandRequest, issue_command, list_commands, read_acknowledgement
from entropy_monitor.store.commands import MAX_REASON_LENGTH

if TYPE_CHECKING:
    from entropy_monitor.store import Run
    from entropy_monitor.types import Command, Phase

_CONTROLLER = "gapt"


class ControlChannel:
    """Reads commands and rank 0's answers, and issues the controller's own commands, each exactly once."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._key = os.environ.get("ENTROPY_MONITOR_KEY")
        self._next = 1
        self._issued: set[str] = set()
        self._operators: list[Command] = []
        """An operator's commands that the trainer has not refused, as far as is known; the last one stands."""
        self._newest_own: Command | None = None

    def refresh(self) -> None:
        """Read the commands that have come since the last call."""
        for command in list_commands(self._run.objects, self._next):
            self._take(command)

    def _take(self, command: Command) -> None:
        self._next = int(command.command_id) + 1
        if command.issued_by.startswith(f"{_CONTROLLER}/"):
            self._newest_own = command
            self._issued.add(command.issued_by)
        else:
            self._operators.append(command)

    @property
    def is_suspended(self) -> bool:
        """Whether an operator's memorize or compress stands: the controller is silent until ``auto``."""
        while self._operators and self._is_void(self._operators[-1]):
            self._operators.pop()  # a forged or expired command neither suspends nor frees the controller
        return bool(self._operators) and self._operators[-1].phase != "auto"

    def refusal(self, attempt: int) -> str | None:
        """Why the trainer rejected the controller's newest command in this attempt, if it did.

        Returns:
            The trainer's reason, or None; a trainer started afresh may take commands.
        """
        own = self._newest_own
        if own is None or not own.issued_by.startswith(f"{_CONTROLLER}/{attempt}/"):
            return None
        return self._refusal(own)

    def _is_void(self, command: Command) -> bool:
        ack = read_acknowledgement(self._run.objects, int(command.command_id), 0)
        if ack is not None:
            return ack.status != "applied"
        return time.time() > command.issued_at + command.expires_after_s  # nobody was there to answer

    def _refusal(self, command: Command) -> str | None:
        ack = read_acknowledgement(self._run.objects, int(command.command_id), 0)
        return ack.detail if ack is not None and ack.status == "rejected" else None

    def command(self, attempt: int, step: int, phase: Phase, weight: float, reason: str) -> None:
        """Issue the controller's command for one transition, unless an earlier watcher has done it."""
        self.refresh()
        issued_by = f"{_CONTROLLER}/{attempt}/{step}"
        if issued_by not in self._issued:
            request = CommandRequest(phase=phase, weight=weight, reason=reason[:MAX_REASON_LENGTH], issued_by=issued_by)
            self._take(issue_command(self._run.objects, self._run.run_id, request, key=self._key))
