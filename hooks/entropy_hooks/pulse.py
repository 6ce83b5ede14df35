"""The pulse thread: heartbeats once a second, commands fifty times a second.

It reads and judges commands; those that may be applied wait in a `Delivery` for an optimizer-step boundary, which is
where the training thread takes them.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from entropy_hooks.delivery import Delivery
from entropy_hooks.shared_notes import share_notes
from entropy_monitor.store import (
    PERIOD_S,
    EventLog,
    acknowledge,
    acknowledged_numbers,
    event_id,
    last_command,
    list_attempts,
    parse_command,
    read_acknowledgement,
    read_command_bytes,
    refusal,
    was_deleted,
    write_heartbeat,
)
from entropy_monitor.store.layout import rank_name
from entropy_monitor.types import Acknowledgement, PhaseEvent

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from entropy_hooks.faults import Faults
    from entropy_monitor.store import Run
    from entropy_monitor.types import AckStatus

COMMAND_PERIOD_S = 0.02


class Pulse:
    """Owns the pulse thread of one rank."""

    def __init__(
        self,
        run: Run,
        place: tuple[int, int, int],
        *,
        steer: bool,
        fields: Callable[[], Mapping[str, Any]],
        is_over: Callable[[], bool],
        faults: Faults,
    ) -> None:
        self._objects, self._run_id = run.objects, run.run_id
        attempt, self._rank, self._world_size = place
        self._steer, self._fields, self._is_over, self._faults = steer, fields, is_over, faults
        self._key = os.environ.get("ENTROPY_MONITOR_KEY")
        self._stop = threading.Event()
        self._when_over: Callable[[], None] | None = None
        self._answered: set[int] | None = None
        self._next = 1
        self._superseded = self._superseded_told = False
        prefix = f"entropy_monitor/{run.objects.url}/{attempt}/commands"
        self.delivery = Delivery(lambda: share_notes(prefix), self.answer, faults)
        """Commands for the training thread."""
        self._owed: deque[tuple[int, Acknowledgement]] = deque()
        self._thread = threading.Thread(target=self._work, name="entropy-pulse", daemon=True)

    def start(self, when_over: Callable[[], None]) -> None:
        """Start the thread, whose first act is a heartbeat: the training thread never waits for the store here.

        Args:
            when_over: is called once, on this thread, when nobody can train the model any more.
        """
        self._when_over = when_over
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """End the thread and write the last heartbeat."""
        self._stop.set()
        self._thread.join(timeout_s)
        self._beat()
        self.delivery.close()

    def answer(self, number: int, status: AckStatus, step: int, detail: str) -> bool:
        """Acknowledge a command.

        Returns:
            Whether this answer counts. Else the command must not be applied: the rank has answered before, or the
            answer cannot be stored, which of several ranks that step together is tried again.
        """
        ack = Acknowledgement(command_id=f"{number:08d}", rank=self._rank, step=step, status=status, detail=detail)
        try:
            return acknowledge(self._objects, number, ack)
        except OSError as error:
            self._faults.count("acknowledgement_failed", error)
            if not self.delivery.shared:
                return False
            # All other ranks apply it at this step. It is not applied again: a later attempt finds their answers.
            self._owed.append((number, ack))
            return True

    def _pay(self) -> None:
        """Try again to store the answers that could not be."""
        while self._owed:
            acknowledge(self._objects, *self._owed[0])
            self._owed.popleft()

    def _work(self) -> None:
        self._beat()
        next_beat = time.monotonic() + PERIOD_S
        while not self._stop.wait(COMMAND_PERIOD_S):
            due = time.monotonic() >= next_beat
            if due and self._when_over is not None and self._is_over():
                self._when_over()
                return
            if due:  # first: commands that cannot be read must not make the trainer look dead
                self._beat()
                next_beat = time.monotonic() + PERIOD_S
            if self._superseded:
                continue
            try:
                self._pay()
                self._read_commands(look_for_gaps=due)
                self.delivery.look_around(int(self._fields()["step"]))
            except Exception as error:  # the next round tries again
                self._faults.count("commands_unreadable", error)
                self._stop.wait(PERIOD_S / 2)

    def _beat(self) -> None:
        try:
            if was_deleted(self._objects):
                return  # the writer counts it
            fields = self._fields()
            self._superseded = max(list_attempts(self._objects), default=0) > int(fields["attempt"])
            if self._superseded:
                self._tell_superseded(fields)
                return
            write_heartbeat(self._objects, rank_name(self._rank), fields)
        except Exception as error:  # the next beat tries again
            self._faults.count("heartbeat_failed", error)

    def _tell_superseded(self, fields: Mapping[str, Any]) -> None:
        """A newer trainer owns this rank's heartbeat and commands: say so where the run's readers look, once."""
        attempt, step = int(fields["attempt"]), int(fields["step"])
        reason = f"attempt {attempt} still trains beside a newer one on the same run: stop one, or name another run"
        self._faults.count("superseded", reason)
        if self._superseded_told:
            return
        self._superseded_told = True
        event = PhaseEvent(
            event_id=event_id(attempt, self._rank, "superseded"),
            step=step,
            layer=None,
            kind="fault",
            regime="undetermined",
            score=1.0,
            evidence={"reason": reason, "attempt": attempt, "rank": self._rank},
        )
        EventLog(self._objects).append(event)

    def _read_commands(self, *, look_for_gaps: bool) -> None:
        if self._answered is None:
            self._answered = acknowledged_numbers(self._objects, self._rank)
        while True:
            value = read_command_bytes(self._objects, self._next)
            if value is None and look_for_gaps and last_command(self._objects) > self._next:
                # Others stand behind it: it came in this instant, or somebody deleted it.
                value = read_command_bytes(self._objects, self._next)
            elif value is None:
                return
            if value is not None and self._next not in self._answered:
                self._judge(self._next, value)
            self._next += 1

    def _judge(self, number: int, value: bytes) -> None:
        step = int(self._fields()["step"])
        if (elsewhere := self._answered_elsewhere(number)) is not None:
            self.answer(number, elsewhere[0], step, elsewhere[1])
            return
        try:
            command = parse_command(value)
            refused = refusal(command, number, self._run_id, self._key, time.time())
        except Exception as error:  # anybody may have written that file: judged once, whatever it holds
            self._faults.count("malformed_command", error)
            self.answer(number, "rejected", step, str(error))
            return
        if refused is not None:
            status, detail = refused
            if status == "rejected":
                self._faults.count("rejected_command", detail)
            self._refuse(number, status, step, detail)
        elif not self._steer:
            detail = "observe-only: start the trainer with steer=True to allow commands"
            self._refuse(number, "rejected", step, detail)
        else:
            self.delivery.offer(number, command)

    def _refuse(self, number: int, status: AckStatus, step: int, detail: str) -> None:
        self.delivery.refuse(number, detail)
        self.answer(number, status, step, detail)

    def _answered_elsewhere(self, number: int) -> tuple[AckStatus, str] | None:
        """Another rank has answered before this one could: rank 0 has refused it, or all were killed in between.

        Returns:
            The answer of this rank, then.
        """
        if not self.delivery.shared:
            return None
        for rank in range(self._world_size):
            if rank != self._rank and (ack := read_acknowledgement(self._objects, number, rank)) is not None:
                if ack.status != "applied":
                    return ack.status, ack.detail
                return "expired", f"rank {rank} applied it in an attempt that ended before this rank did: send it again"
        return None
