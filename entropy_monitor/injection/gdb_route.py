"""Entering a process by gdb, where the built-in way is not to be had: other processors.

gdb stops every thread, takes longer, and a SIGKILL of gdb itself would leave the process in the middle of a call: it is
the last resort. Addresses are given as numbers, so that it reads no symbols while the process stands still.

Some gdbs cannot write the vector registers of newer processors and leave a process broken: it is tried first on a
process of our own.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from entropy_monitor.errors import AttachError
from entropy_monitor.injection.interpreter import read_interpreter
from entropy_monitor.injection.plan import ADDRESS_MARK, SIZE_MARK
from entropy_monitor.injection.rights import check_state, refuse

if TYPE_CHECKING:
    from entropy_monitor.injection.interpreter import Interpreter
    from entropy_monitor.injection.process import Process

_LIMIT_S = 60.0
_REHEARSAL_S = 5.0
_REHEARSED = 42
_DONE = "OUTCOME 0"
_PAGE = 4096
_FIXED = 0x100022
"""MAP_PRIVATE, MAP_ANONYMOUS, MAP_FIXED_NOREPLACE: so that the code can name its own address."""
_SETTINGS = (
    "set debuginfod enabled off",
    "set auto-load no",
    "set auto-solib-add off",
    "set print thread-events off",
    "set libthread-db-search-path /nonexistent",
)
_SCRIPT = """\
attach {pid}
set unwindonsignal on
set $map = (unsigned long (*)(unsigned long, unsigned long, int, int, int, long)) {mmap}
set $at = $map({address}, {size}, 3, {flags}, -1, 0)
if $at != {address}
  printf "OUTCOME no memory\\n"
  detach
  quit
end
restore {file} binary {address}
printf "OUTCOME %d\\n", ((int (*)(void *, void *)) {add})((void *) {run}, (void *) {address})
detach
"""


def gdb_unfit(interpreter: Interpreter) -> str | None:
    """Why gdb cannot be used, whatever the rights.

    Returns:
        The reason, or None.
    """
    if shutil.which("gdb") is None:
        return "gdb is not installed"
    return "no C library that we know is mapped" if interpreter.mmap is None else None


def queue_by_gdb(process: Process, interpreter: Interpreter, code: str) -> None:
    """Make a process run code at the next bytecode boundary of its main thread.

    Args:
        process: the process.
        interpreter: its CPython.
        code: Python source, with the marks for its address and size.

    Raises:
        AttachError: it could not be entered.
    """
    if unfit := gdb_unfit(interpreter):
        raise AttachError(f"expected gdb; found that {unfit}: install gdb, or start the job with `entropy-monitor run`")
    check_state(process)
    _rehearse()
    said = _enter(process.pid, interpreter, code)
    if _DONE not in said:
        if "ptrace: Operation not permitted" in said:
            refuse(process)
        raise AttachError(f"expected gdb to enter process {process.pid}; found {_tail(said)}: use another --method")


def _rehearse() -> None:
    """Have gdb enter a process of ours, which must take it well."""
    # It tells when it is there to be entered, and ends when it has been.
    program = "import sys, time; print(flush=True)\nfor _ in range(1000): time.sleep(0.01)"
    command = [sys.executable, "-I", "-S", "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as own:
        try:
            assert own.stdout is not None
            own.stdout.readline()
            said = _enter(own.pid, read_interpreter(own.pid), "__import__('os')._exit(42)")
            ended = own.wait(_REHEARSAL_S) if _DONE in said else None
        except subprocess.TimeoutExpired:
            ended, said = None, "no answer"
        finally:
            own.kill()
    if ended != _REHEARSED:
        raise AttachError(
            f"expected a gdb that can call a function; found one that breaks the process ({_tail(said)}): install a "
            "newer gdb, or start the job with `entropy-monitor run`"
        )


def _tail(said: str) -> str:
    return " ".join(said.split())[-160:] or "silence"


def _enter(pid: int, interpreter: Interpreter, code: str) -> str:
    size = (len(code) + _PAGE) // _PAGE * _PAGE
    address = _free_address(pid, size)
    placed = code.replace(ADDRESS_MARK, f"{address:#018x}").replace(SIZE_MARK, f"{size:#018x}")
    with tempfile.TemporaryDirectory() as directory:
        file, script = Path(directory, "code"), Path(directory, "script")
        file.write_bytes(placed.encode("ascii") + b"\0")
        filled = _SCRIPT.format(
            pid=pid,
            mmap=interpreter.mmap,
            add=interpreter.add_pending_call,
            run=interpreter.run_simple_string,
            address=address,
            size=size,
            flags=_FIXED,
            file=file,
        )
        script.write_text(filled, encoding="ascii")
        return _gdb(pid, script)


def _gdb(pid: int, script: Path) -> str:
    settings = [part for setting in _SETTINGS for part in ("-iex", setting)]
    try:
        ended = subprocess.run(
            ["gdb", "-batch", "-nx", "-nw", *settings, f"/proc/{pid}/exe", "-x", str(script)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_LIMIT_S,
            check=False,
            start_new_session=True,  # Ctrl-C must not reach it
        )
    except subprocess.TimeoutExpired:
        raise AttachError(
            f"expected gdb to be done within {_LIMIT_S:.0f} s; found it running and ended it: use another --method"
        ) from None
    return ended.stdout.decode(errors="replace")


def _free_address(pid: int, size: int) -> int:
    """An unmapped address: in the widest gap, far from what the heap and the libraries grow into."""
    ranges: list[tuple[int, int]] = []
    for line in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        start, end = (int(part, 16) for part in line.split(None, 1)[0].split("-"))
        ranges.append((start, end))
    gaps = [(after[0] - before[1], before[1]) for before, after in pairwise(ranges)]
    width, start = max(gaps)
    return (start + (width - size) // 2) // _PAGE * _PAGE
