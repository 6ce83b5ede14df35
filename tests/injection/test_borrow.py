"""The borrowed thread itself: calls that do not return, and what importing all this costs."""

from __future__ import annotations

import ctypes
import json
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from entropy_monitor.injection import borrow
from entropy_monitor.injection.borrow import Borrowed, BorrowError
from entropy_monitor.injection.elf import exported, read_modules
from entropy_monitor.injection.frame import Layout, build, kernel_layout, resumed
from entropy_monitor.injection.interpreter import read_interpreter
from entropy_monitor.injection.memory import Memory
from entropy_monitor.injection.ptrace import Registers, Tracee
from entropy_monitor.injection.stub import stub

from .targets import Target

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def sigchld_blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


@pytest.mark.usefixtures("sigchld_blocked")
@pytest.mark.parametrize("mode", ["numpy", "nanosleep", "read"])
@pytest.mark.parametrize(("function", "reason"), [("pause", "busy"), (None, "fault")])
def test_a_call_that_does_not_return_is_undone(
    tmp_path: Path, mode: str, function: str | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(borrow, "CALL_LIMIT_S", 0.1)
    with Target(tmp_path, mode) as target:
        sigreturn = read_interpreter(target.pid).sigreturn
        assert sigreturn is not None
        for _ in range(5):
            with Memory(target.pid, write=True) as memory:
                libc = next(
                    module for module in read_modules(target.pid) if module.name.startswith(("libc.so", "ld-musl"))
                )
                address = exported(memory.read, libc.base, [function])[function] if function else 0x10
                borrowed = Borrowed(Tracee(target.pid), memory, sigreturn, kernel_layout())
                borrowed.begin()
                with pytest.raises(BorrowError) as caught:
                    borrowed.call(address)
            assert caught.value.reason == reason
        target.finish()


def test_interrupted_calls_are_made_again_where_that_is_exact() -> None:
    def found(orig_rax: int, rax: int, rsi: int = 0) -> Registers:
        unsigned = (1 << 64) - 1
        return Registers(orig_rax=orig_rax & unsigned, rax=rax & unsigned, rip=1000, rsi=rsi)

    def after(registers: Registers) -> tuple[int, int]:
        ready = resumed(registers)
        return ctypes.c_int64(ready.rax).value, ready.rip

    for code in (-512, -513, -514):
        assert after(found(0, code)) == (0, 998)
        assert after(found(230, code)) == (230, 998)
    assert after(found(35, -516)) == (-4, 1000)  # nanosleep: only the kernel knows what is left
    assert after(found(202, -516, rsi=0x189)) == (202, 998)  # a futex with an absolute timeout
    assert after(found(202, -516, rsi=0x80)) == (-4, 1000)
    assert after(found(0, 17)) == (17, 1000)  # a call that is over
    assert after(found(-1, -512)) == (-512, 1000)  # not in a call: a number like any other


def test_a_frame_leaves_the_red_zone_alone_and_is_aligned() -> None:
    layout: Layout = kernel_layout()
    for stack in range(0x7FFF_0000_1000, 0x7FFF_0000_1000 + 64, 8):
        frame = build(Registers(rsp=stack, orig_rax=1), bytes(layout.size + 4096), 0, 0x1234, layout)
        assert frame.address % 16 == 8  # as after a call
        assert frame.address + len(frame.data) <= stack - 128
        assert frame.data[:8] == (0x1234).to_bytes(8, "little")
        (area,) = (int.from_bytes(frame.data[232:240], "little"),)
        assert area % 64 == 0
        assert frame.data[area - frame.address + 464 :][:48] == layout.software


INTERRUPTED_STUB = """
import _thread, ctypes, sys, time
real, calls = _thread.start_new_thread, []

def interrupted(*arguments):
    # As if Ctrl-C had come while the main thread ran our code.
    calls.append(arguments)
    if len(calls) == 1:
        raise KeyboardInterrupt
    return real(*arguments)

_thread.start_new_thread = interrupted
before = set(globals())
try:
    assert ctypes.pythonapi.PyRun_SimpleString(sys.stdin.buffer.read()) == 0
    for _ in range(500):
        time.sleep(0.01)
except KeyboardInterrupt:
    print(sorted(set(globals()) - before - {"_"}))
"""


def test_an_interrupt_that_hits_our_code_is_passed_on() -> None:
    code = stub({"verb": "ping"}, "/nowhere", [], mapped=False)
    command = [sys.executable, "-c", INTERRUPTED_STUB]
    ended = subprocess.run(command, input=code, capture_output=True, text=True, check=True)
    assert (ended.stdout.splitlines()[-1], ended.stderr) == ("['before']", "")


def test_the_package_needs_nothing_but_the_standard_library() -> None:
    program = """
import json, sys
before = set(sys.modules)
import entropy_monitor.injection.send, entropy_monitor.injection.shield, entropy_monitor.injection.ranks
names = {name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names
ours = {name for name in sys.modules if name.startswith("entropy_")}
print(json.dumps([sorted(names), sorted(ours)]))
"""
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    names, ours = json.loads(out)
    assert names == ["entropy_monitor"]
    assert all(
        name in {"entropy_monitor", "entropy_monitor.errors"} or name.startswith("entropy_monitor.injection")
        for name in ours
    )
