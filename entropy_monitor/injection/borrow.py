"""Borrowing a process's main thread for a function call, and giving it back exactly as it was.

At every moment the borrowed thread can find its way back alone, for whoever traces it may be killed at any time:

1. stop the thread; below its stack pointer write a signal frame that holds its state (`frame`);
2. set its registers, in one step, to the function's entry with that frame as return address. From here on, if the
   tracer dies, the kernel lets the thread go, the function returns into ``rt_sigreturn`` and the thread goes on;
3. stop it again where it enters ``rt_sigreturn``, put the registers back as they were found, and let it go. The
   kernel then restarts an interrupted system call itself, with what is left of its timeout.
"""

from __future__ import annotations

import signal
import struct
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from entropy_monitor.injection.frame import FUTEX, build, interrupted
from entropy_monitor.injection.ptrace import Kind, Registers, Stop, Tracee

if TYPE_CHECKING:
    from entropy_monitor.injection.frame import Frame, Layout
    from entropy_monitor.injection.memory import Memory

_PATIENCE_S = 5.0
"""How long a thread may take to stop; one in an uninterruptible sleep takes longer."""
CALL_LIMIT_S = 1.0
"""How long a function may take: longer, and it waits for a lock that the borrowed thread holds."""
_ROOM_BYTES = 32 * 1024
_RT_SIGRETURN, _GETPID = 15, 39
_DIRECTION, _TRAP, _ALIGNMENT = 0x400, 0x100, 0x40000
_FAULTS = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP, signal.SIGSYS})
_ALL = (1 << 64) - 1


class BorrowError(Exception):
    """The thread could not be borrowed; it goes on as if nothing had been."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(slots=True)
class Borrowed:
    """The main thread of a process, standing still between `begin` and `end`."""

    tracee: Tracee
    memory: Memory
    sigreturn: int
    layout: Layout
    results: dict[int, int] = field(default_factory=dict[int, int])
    """What the system calls of the last `call` returned, by their numbers."""
    _signals: int = 0
    """Signals that were delivered during the call."""

    def begin(self) -> None:
        """Stop the thread where it may be borrowed.

        Raises:
            BorrowError: it does not stop, is stopped already, or has ended.
        """
        self.tracee.seize()
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            self.tracee.interrupt()
            stop = self._trap(deadline)
            if stop is None:
                raise BorrowError("unresponsive")  # we end, and the kernel lets it go
            if stop.kind is Kind.GROUP_STOP:
                self.tracee.detach()
                raise BorrowError("stopped")
            if not self._in_restartable_sequence():
                return
            self.tracee.resume()

    def end(self) -> None:
        """Let the thread go."""
        self.tracee.detach()

    def call(self, function: int, *arguments: int) -> None:
        """Call a function on the borrowed thread.

        Args:
            function: its address.
            *arguments: up to six integers or pointers.

        Raises:
            BorrowError: the function did not return, or the process was stopped or has ended meanwhile.
        """
        saved, xstate = self.tracee.registers(), self.tracee.xstate()
        frame = build(saved, xstate, self.tracee.signal_mask(), self.sigreturn, self.layout)
        try:
            self.memory.read(frame.address - _ROOM_BYTES, 1)
            self.memory.write(frame.address, frame.data)
        except OSError as error:
            self.tracee.detach()
            raise BorrowError("no stack", str(error)) from error
        self.results, self._signals = {}, 0
        self.tracee.set_registers(_entry(saved, frame, function, arguments))
        failure = self._run(frame)
        self.tracee.set_xstate(xstate)
        self.tracee.set_registers(interrupted(saved) if self._signals else saved)
        if failure:
            self.tracee.detach()
            raise BorrowError(failure)

    def wake(self) -> bool:
        """Interrupt the thread's wait for a lock, as a signal would.

        CPython then looks for queued calls before it waits again, and so does everybody else who waits in a futex:
        they all look whether what they wait for has come. Other waits are left alone.

        Returns:
            Whether it waited for a lock.
        """
        found = self.tracee.registers()
        if found.orig_rax != FUTEX:
            return False
        self.tracee.set_registers(interrupted(found))
        return True

    def _run(self, frame: Frame) -> str:
        """Let the function run until it returns, or say why it did not; the registers may then be put back."""
        deadline = time.monotonic() + CALL_LIMIT_S
        number = 0
        while True:
            self.tracee.resume(number, to_syscall=True)
            number = 0
            stop = self.tracee.wait(deadline)
            if stop is None:
                return self._give_up(deadline + _PATIENCE_S)
            if stop.kind is Kind.SYSCALL:
                now = self.tracee.registers()
                if now.orig_rax == _RT_SIGRETURN and now.rsp == frame.address + 8:
                    self._stop_short(now)
                    return ""
                self.results[now.orig_rax] = now.rax
            elif stop.kind is Kind.SIGNAL:
                if stop.signal in _FAULTS and not self._signals and self.tracee.is_fault():
                    return "fault"
                self._signals += 1
                number = stop.signal
            else:
                self._leave_if_over(stop)

    def _stop_short(self, now: Registers) -> None:
        """Instead of entering ``rt_sigreturn``, which would forget how to restart a system call, stop once more."""
        # If we die before that stop, the thread comes to rt_sigreturn again. A harmless call takes the place of this
        # one, as skipping it would be a call of number -1 in the eyes of a seccomp filter.
        now.orig_rax = _GETPID
        now.rip = self.sigreturn
        self.tracee.set_registers(now)
        self.tracee.interrupt()
        self.tracee.resume()
        if self._trap(time.monotonic() + _PATIENCE_S) is None:
            raise BorrowError("unresponsive")

    def _give_up(self, deadline: float) -> str:
        """Stop the thread in the middle of a function that waits in vain."""
        if self._signals:  # a handler of the process runs on top of our call: it must not be cut off
            self.tracee.interrupt()
            if self._trap(deadline) is not None:
                self.tracee.detach()
            raise BorrowError("busy")
        self.tracee.interrupt()
        if self._trap(deadline) is None:
            raise BorrowError("unresponsive")
        return "busy"

    def _trap(self, deadline: float) -> Stop | None:
        """Wait for the stop that we asked for, delivering signals on the way."""
        while (stop := self.tracee.wait(deadline)) is not None:
            if stop.kind in {Kind.TRAP, Kind.GROUP_STOP}:
                return stop
            self._leave_if_over(stop)
            if stop.kind is Kind.SIGNAL:
                self._signals += 1
            self.tracee.interrupt()  # any other stop has cancelled it
            self.tracee.resume(stop.signal)
        return None

    def _leave_if_over(self, stop: Stop) -> None:
        """End the loan where nothing is left to be given back, or the frame must do it."""
        if stop.kind is Kind.GONE:
            raise BorrowError("ended")
        if stop.kind is Kind.EXEC:
            self.tracee.detach()
            raise BorrowError("ended", "it runs another program now")
        if stop.kind is Kind.GROUP_STOP:
            self.tracee.detach()  # it stays stopped, and finds its way back when it is continued
            raise BorrowError("stopped", "just now")

    def _in_restartable_sequence(self) -> bool:
        """Whether the thread is in the middle of code that the kernel restarts after an interruption (rseq).

        The kernel looks at where a thread is when it goes on, and elsewhere it takes the sequence for finished.

        Returns:
            True if it must go on a little first.
        """
        area = self.tracee.rseq_area()
        if area is None:
            return False
        try:
            (descriptor,) = struct.unpack("<Q", self.memory.read(area + 8, 8))
            if descriptor == 0:
                return False
            _, start, size = struct.unpack("<QQQ", self.memory.read(descriptor, 24))
        except (OSError, struct.error):
            return False
        return 0 <= self.tracee.registers().rip - start < size


def _entry(saved: Registers, frame: Frame, function: int, arguments: tuple[int, ...]) -> Registers:
    """Registers as at the first instruction of a called function."""
    entry = saved.copy()
    entry.rip, entry.rsp, entry.rax = function, frame.address, 0
    entry.orig_rax = _ALL  # not in a system call: nothing to restart
    entry.eflags &= ~(_DIRECTION | _TRAP | _ALIGNMENT)
    for name, value in zip(("rdi", "rsi", "rdx", "rcx", "r8", "r9"), arguments, strict=False):
        setattr(entry, name, value & _ALL)
    return entry
