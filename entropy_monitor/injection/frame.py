"""A signal frame: what a thread needs to find its way back by itself.

When the kernel runs a signal handler it lays the interrupted state on the thread's stack, and ``rt_sigreturn`` restores
all of it in one step. A frame built by us in the same form, with the address of the C library's ``rt_sigreturn``
instructions as the return address, makes any function that is entered on top of it return to the interrupted state,
with nobody's help. x86-64 Linux; ``arch/x86/include/uapi/asm/sigcontext.h`` and ``ucontext.h`` have the layout.
"""

from __future__ import annotations

import ctypes
import signal
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from entropy_monitor.injection.ptrace import Registers

_RED_ZONE = 128
_FRAME_BYTES = 8 + 304 + 128
_UC_FLAGS = 0b111
"""The frame has vector state; it has a stack segment; restore that segment exactly."""
_SOFTWARE_BYTES = slice(464, 512)
"""Where a saved FXSAVE area tells how much follows it."""
_STATE_IN_USE = 512
_MAGIC_END = struct.pack("<I", 0x46505845)
_RESTART_SYSCALL = range(-514, -511)
"""ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND: with no handler in between, the call is made again."""
_RESTART_BLOCK = -516
"""The call is made again with what is left of its timeout, which only the kernel knows."""
_EINTR = 4
FUTEX = 202
_FUTEX_ABSOLUTE = frozenset({6, 9, 11, 13})
"""Operations whose timeout is a moment, not a duration: they can be made again as they are."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How this kernel saves vector state in a signal frame."""

    software: bytes
    """The 48 bytes with which it describes the state, magic number first."""

    @property
    def features(self) -> int:
        """Bit mask of the saved components."""
        return struct.unpack_from("<Q", self.software, 8)[0]

    @property
    def size(self) -> int:
        """Bytes of the saved components."""
        return struct.unpack_from("<I", self.software, 16)[0]


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame, ready to be written."""

    address: int
    """Where it goes, and the stack pointer at the function's entry."""
    data: bytes


def kernel_layout() -> Layout:
    """Ask the kernel how it saves vector state, by a signal sent to ourselves.

    Returns:
        The layout.

    Raises:
        OSError: the kernel describes none.
    """
    libc = ctypes.PyDLL(None)
    seen: list[bytes] = []

    @ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    def handler(number: int, info: int, context: int) -> None:
        area = ctypes.c_uint64.from_address(context + 224).value
        seen.append(ctypes.string_at(area, 512)[_SOFTWARE_BYTES])

    # struct sigaction: handler, 128 bytes of mask, flags, restorer.
    action = ctypes.create_string_buffer(152)
    struct.pack_into("<Q", action, 0, ctypes.cast(handler, ctypes.c_void_p).value or 0)
    struct.pack_into("<I", action, 136, 4)  # SA_SIGINFO
    before = ctypes.create_string_buffer(152)
    libc.sigaction(int(signal.SIGUSR1), action, before)
    # Synchronous: the kernel runs the handler on the way out of this call.
    libc.__getattr__("raise")(int(signal.SIGUSR1))
    libc.sigaction(int(signal.SIGUSR1), before, None)
    if not seen or seen[0][:4] != struct.pack("<I", 0x46505853):
        raise OSError("expected signal frames with vector state; found a kernel or processor without")
    return Layout(seen[0])


def build(registers: Registers, xstate: bytes, mask: int, sigreturn: int, layout: Layout) -> Frame:
    """Build the frame that leads back to a state.

    Args:
        registers: the state's general registers, as a tracer sees them.
        xstate: its vector state, as a tracer sees it.
        mask: its blocked signals.
        sigreturn: address of instructions that call ``rt_sigreturn``.
        layout: how this kernel saves vector state.

    Returns:
        The frame; it starts with the return address.
    """
    size, software = layout.size, layout.software
    in_use = struct.unpack_from("<Q", xstate, _STATE_IN_USE)[0]
    if in_use & ~layout.features:  # AMX tiles, which only some threads have
        size = len(xstate)
        software = struct.pack("<IIQI28x", 0x46505853, size + 4, layout.features | in_use, size)
    area = bytearray(xstate[:size])
    area[_SOFTWARE_BYTES] = software
    area += _MAGIC_END
    area_at = (registers.rsp - _RED_ZONE - len(area)) & ~63
    address = ((area_at - _FRAME_BYTES) & ~15) - 8  # as after a call instruction
    # A size of zero is refused by sigaltstack and keeps the thread's alternate stack as it is.
    context = (
        struct.pack("<QQQIIQ", _UC_FLAGS, 0, 0, 0, 0, 0) + _sigcontext(registers, area_at) + struct.pack("<Q", mask)
    )
    head = struct.pack("<Q", sigreturn) + context + bytes(128)
    return Frame(address, head.ljust(area_at - address, b"\0") + bytes(area))


def _sigcontext(registers: Registers, area: int) -> bytes:
    r = resumed(registers)
    general = (r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15, r.rdi, r.rsi, r.rbp, r.rbx, r.rdx, r.rax, r.rcx)
    return struct.pack(
        "<18Q4H4QQ64x", *general, r.rsp, r.rip, r.eflags, r.cs & 0xFFFF, 0, 0, r.ss & 0xFFFF, 0, 0, 0, 0, area
    )


def resumed(registers: Registers) -> Registers:
    """The state in which an interrupted thread goes on, where the kernel is not asked to restart its system call.

    Args:
        registers: as a tracer sees them: in an interrupted call, the result is one of the kernel's own codes.

    Returns:
        The same, ready to make the call again, or with the result "interrupted" where that cannot be done exactly.
    """
    ready = registers.copy()
    result = ctypes.c_int64(registers.rax).value
    if ctypes.c_int64(registers.orig_rax).value < 0:
        return ready
    exact = result in _RESTART_SYSCALL or (
        result == _RESTART_BLOCK and registers.orig_rax == FUTEX and registers.rsi & 0x7F in _FUTEX_ABSOLUTE
    )
    if exact:
        ready.rax = registers.orig_rax
        ready.rip = registers.rip - 2
    elif result == _RESTART_BLOCK:
        ready.rax = -_EINTR & (1 << 64) - 1
    return ready


def interrupted(registers: Registers) -> Registers:
    """The state in which a thread goes on after a signal handler has run in the middle of its system call.

    Args:
        registers: as a tracer sees them.

    Returns:
        The same, with the result "interrupted" if the call would otherwise be made again.
    """
    ready = registers.copy()
    result = ctypes.c_int64(registers.rax).value
    if ctypes.c_int64(registers.orig_rax).value >= 0 and (result in _RESTART_SYSCALL or result == _RESTART_BLOCK):
        ready.orig_rax = (1 << 64) - 1
        ready.rax = -_EINTR & (1 << 64) - 1
    return ready
