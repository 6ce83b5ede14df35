"""The ptrace system call for one thread, by ctypes; x86-64 Linux."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from dataclasses import dataclass
from enum import Enum

_GETREGS, _SETREGS, _DETACH, _SYSCALL, _CONT = 12, 13, 17, 24, 7
_GETSIGINFO, _GETREGSET, _SETREGSET = 0x4202, 0x4204, 0x4205
_SEIZE, _INTERRUPT, _GETSIGMASK, _GET_RSEQ = 0x4206, 0x4207, 0x420A, 0x420F
_XSTATE = 0x202
_XSTATE_ROOM = 1 << 16
_TRACESYSGOOD, _TRACEEXEC = 1, 1 << 4
_EVENT_EXEC, _EVENT_STOP = 4, 128
_POLL_S = 0.01
_WALL = 0x40000000
_STOPPING = frozenset({signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU})
_REGISTERS = [
    "r15",
    "r14",
    "r13",
    "r12",
    "rbp",
    "rbx",
    "r11",
    "r10",
    "r9",
    "r8",
    "rax",
    "rcx",
    "rdx",
    "rsi",
    "rdi",
    "orig_rax",
    "rip",
    "cs",
    "eflags",
    "rsp",
    "ss",
    "fs_base",
    "gs_base",
    "ds",
    "es",
    "fs",
    "gs",
]


class Registers(ctypes.Structure):
    """The general registers of a thread, as the kernel lays them out."""

    _fields_ = [(name, ctypes.c_uint64) for name in _REGISTERS]

    def copy(self) -> Registers:
        """Copy them.

        Returns:
            Registers of their own.
        """
        return Registers.from_buffer_copy(self)


class _IoVec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]


class Kind(Enum):
    """Why a traced thread stands still."""

    TRAP = "we asked it to"
    GROUP_STOP = "somebody stopped the process, as Ctrl-Z does"
    SYSCALL = "it enters or leaves a system call"
    SIGNAL = "a signal is about to be delivered"
    EXEC = "it runs another program now"
    GONE = "it has ended"


@dataclass(frozen=True, slots=True)
class Stop:
    """A stop, as ``waitpid`` reports it."""

    kind: Kind
    signal: int = 0


class Tracee:
    """The main thread of a process. Every call raises `OSError` as the system call does."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        libc = ctypes.CDLL(None, use_errno=True)
        self._call = libc.ptrace
        self._call.restype = ctypes.c_long
        self._call.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
        self._room = ctypes.create_string_buffer(_XSTATE_ROOM)

    def _ptrace(self, request: int, address: int = 0, data: int = 0) -> None:
        ctypes.set_errno(0)
        if self._call(request, self.pid, address, data) == -1 and (code := ctypes.get_errno()):
            raise OSError(code, os.strerror(code))

    def seize(self) -> None:
        """Become its tracer, without stopping it."""
        # Without SYSGOOD, a tracer that dies at a system call would leave the thread a deadly SIGTRAP.
        self._ptrace(_SEIZE, 0, _TRACESYSGOOD | _TRACEEXEC)

    def interrupt(self) -> None:
        """Ask it to stop on its next way out of the kernel."""
        self._ptrace(_INTERRUPT)

    def resume(self, number: int = 0, *, to_syscall: bool = False) -> None:
        """Let it go on, delivering a signal, until the next stop."""
        self._ptrace(_SYSCALL if to_syscall else _CONT, 0, number)

    def detach(self) -> None:
        """Let it go for good; it must stand."""
        self._ptrace(_DETACH)

    def registers(self) -> Registers:
        """Read the general registers.

        Returns:
            The registers.
        """
        found = Registers()
        self._ptrace(_GETREGS, 0, ctypes.addressof(found))
        return found

    def set_registers(self, registers: Registers) -> None:
        """Write all general registers, in one step."""
        self._ptrace(_SETREGS, 0, ctypes.addressof(registers))

    def xstate(self) -> bytes:
        """Read the floating point and vector registers.

        Returns:
            The area that XSAVE writes, in its standard form.
        """
        vector = _IoVec(ctypes.addressof(self._room), _XSTATE_ROOM)
        self._ptrace(_GETREGSET, _XSTATE, ctypes.addressof(vector))
        return self._room.raw[: vector.size]

    def set_xstate(self, area: bytes) -> None:
        """Write the floating point and vector registers."""
        ctypes.memmove(self._room, area, len(area))
        vector = _IoVec(ctypes.addressof(self._room), len(area))
        self._ptrace(_SETREGSET, _XSTATE, ctypes.addressof(vector))

    def signal_mask(self) -> int:
        """Read the set of blocked signals.

        Returns:
            A bit for each signal.
        """
        found = ctypes.c_uint64()
        self._ptrace(_GETSIGMASK, 8, ctypes.addressof(found))
        return found.value

    def is_fault(self) -> bool:
        """Whether the signal about to be delivered comes from the processor, not from a sender.

        Returns:
            True for a real fault.
        """
        self._ptrace(_GETSIGINFO, 0, ctypes.addressof(self._room))
        return int.from_bytes(self._room.raw[8:12], "little", signed=True) > 0

    def rseq_area(self) -> int | None:
        """Where the thread registers its restartable sequences (rseq(2)).

        Returns:
            The address, or None where there is none or the kernel does not tell.
        """
        try:
            self._ptrace(_GET_RSEQ, 24, ctypes.addressof(self._room))
        except OSError:  # kernels before 5.13
            return None
        return int.from_bytes(self._room.raw[:8], "little") or None

    def wait(self, deadline: float) -> Stop | None:
        """Wait for the next stop. SIGCHLD must be blocked.

        Args:
            deadline: on `time.monotonic`.

        Returns:
            The stop, or None if none came in time.
        """
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG | _WALL)
            if pid:
                return _stop(status)
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            # Another thread of this process may have taken the signal: it only makes the wait short.
            signal.sigtimedwait([signal.SIGCHLD], min(left, _POLL_S))


def _stop(status: int) -> Stop:
    if not os.WIFSTOPPED(status):
        return Stop(Kind.GONE)
    number, event = os.WSTOPSIG(status), status >> 16
    if event == _EVENT_STOP:
        return Stop(Kind.GROUP_STOP if number in _STOPPING else Kind.TRAP, number)
    if event == _EVENT_EXEC:
        return Stop(Kind.EXEC)
    if number == signal.SIGTRAP | 0x80:
        return Stop(Kind.SYSCALL)
    return Stop(Kind.SIGNAL, number)
