"""The CPython inside a process: its version, its state, and the addresses that a call needs."""

from __future__ import annotations

import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from entropy_monitor.errors import AttachError, NoSuchProcessError
from entropy_monitor.injection.elf import Module, exported, find_sigreturn, read_modules
from entropy_monitor.injection.memory import Memory
from entropy_monitor.injection.process import executable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from entropy_monitor.injection.elf import Read

_PYTHON = ("Py_AddPendingCall", "PyRun_SimpleString", "PyErr_CheckSignals")
_OLDEST, _NEWEST = (3, 11), (3, 14)
_LIBC = re.compile(r"^(libc\.so|libc-\d|ld-musl-|libc\.musl-)")
_NAMED_VERSION = re.compile(r"python(\d)\.(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Interpreter:
    """A CPython that runs in another process."""

    version: tuple[int, int, int]
    module: str
    """The program or library that holds it."""
    add_pending_call: int
    run_simple_string: int
    check_signals: int
    """``PyErr_CheckSignals``, which does nothing that the interpreter does not do all the time."""
    mmap: int | None
    """The C library's ``mmap``, where it was found."""
    sigreturn: int | None
    """Instructions that return from a signal handler; x86-64 only."""

    @property
    def minor(self) -> tuple[int, int]:
        """Version without its micro part: extension modules fit this."""
        return self.version[:2]


def is_python(pid: int) -> bool:
    """Whether a process looks like Python by the names of what it has mapped, or, where we may not see, of its program.

    Returns:
        True for a program or library named after Python.
    """
    return "python" in Path(executable(pid) or "").name or any("python" in module.name for module in _modules(pid))


def maps_torch(pid: int) -> bool:
    """Whether a process has loaded PyTorch.

    Returns:
        True if its library is mapped.
    """
    return any(module.name.startswith(("libtorch_cpu", "libtorch.so", "libtorch_python")) for module in _modules(pid))


def named_version(pid: int) -> tuple[int, int] | None:
    """The Python version that file names tell, for a process whose memory we may not read.

    Returns:
        Major and minor, or None.
    """
    for path in [executable(pid) or "", *(module.path for module in _modules(pid) if "libpython" in module.name)]:
        if found := _NAMED_VERSION.search(Path(path).name):
            return int(found[1]), int(found[2])
    return None


def _modules(pid: int) -> list[Module]:
    try:
        return read_modules(pid)
    except OSError:  # gone, or not ours: the caller's next look says which
        return []


def read_interpreter(pid: int) -> Interpreter:
    """Find the CPython in a process.

    Args:
        pid: a process that we may trace.

    Returns:
        What a call needs to know.

    Raises:
        NoSuchProcessError: the process has ended.
        AttachError: there is no CPython, it is too old, or it is starting or ending.
        PermissionError: we may not read its memory.
    """
    try:
        with Memory(pid) as memory:
            return _read(pid, memory.read)
    except (FileNotFoundError, ProcessLookupError):
        raise NoSuchProcessError(
            f"expected a running process; found that {pid} has ended: start the job again"
        ) from None
    except (struct.error, OverflowError) as error:  # the process ended or replaced itself in between
        raise AttachError(f"expected to read process {pid}; found it changing ({error}): try again") from None


def _read(pid: int, read: Read) -> Interpreter:
    modules = read_modules(pid)
    program = executable(pid)
    candidates = [module for module in modules if module.path == program or "libpython" in module.name]
    for module in candidates:
        found = exported(read, module.base, [*_PYTHON, "Py_Version", "_PyRuntime"])
        if not found.keys() >= set(_PYTHON):
            continue
        version = _version(read, found, module, pid)
        _check_running(read, found["_PyRuntime"], version, pid)
        libc = [other for other in modules if _LIBC.match(other.name)]
        return Interpreter(
            version=version,
            module=module.path,
            add_pending_call=found["Py_AddPendingCall"],
            run_simple_string=found["PyRun_SimpleString"],
            check_signals=found["PyErr_CheckSignals"],
            mmap=_first_symbol(read, [*libc, module], "mmap"),
            sigreturn=find_sigreturn(read, [*libc, module]) if os.uname().machine == "x86_64" else None,
        )
    raise AttachError(
        f"expected a CPython process; found pid {pid} running {program or 'no program'}: give the pid of the training "
        "process itself"
    )


def _version(read: Read, found: dict[str, int], module: Module, pid: int) -> tuple[int, int, int]:
    """Since 3.11 CPython exports its version as a number."""
    if "Py_Version" not in found:
        named = _NAMED_VERSION.search(module.name)
        older = f"{named[1]}.{named[2]}" if named else "an older one"
        raise AttachError(
            f"expected CPython 3.11 or newer in process {pid}; found {older}: run the job with a newer Python"
        )
    (number,) = struct.unpack("<Q", read(found["Py_Version"], 8))
    version = number >> 24 & 255, number >> 16 & 255, number >> 8 & 255
    if not _OLDEST <= version[:2] <= _NEWEST or "_PyRuntime" not in found:
        raise AttachError(
            f"expected CPython 3.11 to 3.14 in process {pid}; found {'.'.join(map(str, version))}: use such a Python"
        )
    return version


def _check_running(read: Read, runtime: int, version: tuple[int, int, int], pid: int) -> None:
    """Refuse an interpreter that has not been initialised, or is being finalised.

    `Py_IsInitialized` cannot be asked without running it, so that what it reads is read: the first fields of
    ``_PyRuntime`` are five ints (the fifth is "initialized") and a pointer to the finalising thread; from 3.13 on a
    table for debuggers says where the pointers to the finalising thread and to the first interpreter are.

    Raises:
        AttachError: it cannot take a call now.
    """
    if version >= (3, 13):
        header = struct.unpack("<8sQQQQQ", read(runtime, 48))
        if header[0] != b"xdebugpy":
            raise AttachError(
                f"expected the debugger's table of CPython {version} in process {pid}; found none: report it"
            )
        finalizing_at, interpreters_at = header[4], header[5]
        (started,) = struct.unpack("<Q", read(runtime + interpreters_at, 8))
        (finalizing,) = struct.unpack("<Q", read(runtime + finalizing_at, 8))
    else:
        *_, started, finalizing = struct.unpack("<5i4xQ", read(runtime, 32))
    if not started or finalizing:
        now = "ending" if finalizing else "starting"
        raise AttachError(f"expected a running interpreter in process {pid}; found it {now}: try again in a second")


def _first_symbol(read: Read, modules: Sequence[Module], name: str) -> int | None:
    for module in modules:
        if found := exported(read, module.base, [name]):
            return found[name]
    return None
