"""Entering processes again and again: each time an answer, and the target computes what an undisturbed twin does."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest

from entropy_monitor.injection.send import choose_route, send

from .targets import Target, need_python, wait_until

if TYPE_CHECKING:
    from pathlib import Path

    from entropy_monitor.injection.protocol import Request

INJECTIONS = {
    "compute": 10,  # where the target keeps its GIL an answer takes a tenth of a second or more
    "memory": 10,
    "numpy": 20,
    "threads": 2,  # the main thread waits for ever, and is woken after a while
    "sleep": 10,
    "nanosleep": 50,
    "poll": 20,
    "read": 50,
    "condition": 10,
    "lock": 10,
}


def enter(target: Target, times: int) -> list[float]:
    """Send a request some times; each must be answered as it was asked. The seconds that the target stood still."""
    stopped = []
    for number in range(times):
        request: Request = {"verb": "attach", "run": f"/tmp/é'\"{number}", "options": {}, "wait_s": 10.0}
        reply, route = send(choose_route(target.pid, "ptrace"), request, 10.0)
        assert reply == {"ok": True, "message": "here", "request": request, "inner_pid": target.pid}
        assert route.stopped_s is not None
        stopped.append(route.stopped_s)
    return stopped


def enter_and_compare(target: Target, times: int) -> list[float]:
    """Enter a target some times; it must have no more files, threads and mappings than before."""
    files, threads = target.files(), target.threads()
    enter(target, 1)  # imports ctypes, threading and the hooks
    mappings = target.mappings()
    stopped = enter(target, times)
    # The last request's thread ends a little after its answer.
    wait_until(lambda: (target.files(), target.threads()) == (files, threads), "the request's thread to end")
    assert target.mappings() <= mappings + 2  # the allocator's own, whatever it does
    return stopped


@pytest.mark.parametrize("mode", INJECTIONS)
def test_a_target_goes_on_as_if_nothing_had_been(tmp_path: Path, mode: str) -> None:
    with Target(tmp_path, mode) as target:
        stopped = sorted(enter_and_compare(target, INJECTIONS[mode]))
        result = target.finish()
    assert result.chains or result.waits > INJECTIONS[mode]
    assert stopped[len(stopped) // 2] < 0.2  # a few tenths of a millisecond on a quiet machine


@pytest.mark.parametrize("version", ["3.12", "3.13", "3.14"])
@pytest.mark.parametrize(("mode", "times"), [("compute", 5), ("poll", 20), ("threads", 1)])
def test_newer_pythons(tmp_path: Path, version: str, mode: str, times: int) -> None:
    with Target(tmp_path, mode, need_python(version)) as target:
        enter_and_compare(target, times)
        target.finish()


def test_no_signal_is_lost(tmp_path: Path) -> None:
    sent, over = 0, threading.Event()

    def bombard() -> None:
        nonlocal sent
        while not over.is_set():  # real-time signals queue up: each is delivered once
            os.kill(target.pid, signal.SIGRTMIN)
            sent += 1
            time.sleep(0.0003)

    with Target(tmp_path, "signals") as target:
        sender = threading.Thread(target=bombard)
        sender.start()
        enter(target, 20)
        over.set()
        sender.join()
        time.sleep(0.2)
        assert sent > 500
        assert target.state in "RS"
        result = target.finish()
    # CPython itself notes a signal once however often it came before its handler ran.
    assert 0.5 * sent < result.waits <= sent


def test_a_second_of_every_python_is_named(tmp_path: Path) -> None:
    with Target(tmp_path, "sleep") as target:
        found = choose_route(target.pid, "ptrace").interpreter
        assert found is not None
        assert found.version == sys.version_info[:3]
        target.finish()
