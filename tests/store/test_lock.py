"""One watcher a run, also when the one before was killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from entropy_monitor.errors import StoreError, WatcherRunningError
from entropy_monitor.store import Objects, WatcherLock, create_run

if TYPE_CHECKING:
    from pathlib import Path

HOLDER = """
import sys, time
from entropy_monitor.store import WatcherLock, open_run
with WatcherLock(open_run(sys.argv[1]).objects):
    print("held", flush=True)
    sys.stdin.readline()
"""


def holder(run_dir: Path) -> subprocess.Popen[str]:
    """A process that holds the lock until a line comes."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def close(process: subprocess.Popen[str]) -> None:
    """Let a holder go, and its pipes with it."""
    process.communicate("go\n" if process.poll() is None else None, timeout=30)


def test_a_second_watcher_is_told_who_holds_the_run(tmp_path: Path) -> None:
    run = create_run(tmp_path)
    process = holder(tmp_path)
    try:
        for _ in range(2):
            with pytest.raises(WatcherRunningError) as caught, WatcherLock(run.objects):
                pass
            assert str(process.pid) in str(caught.value)
            assert socket.gethostname() in str(caught.value)
    finally:
        close(process)
    with WatcherLock(run.objects):
        pass


def test_the_kernel_frees_the_lock_of_a_killed_holder(tmp_path: Path) -> None:
    run = create_run(tmp_path)
    process = holder(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    with WatcherLock(run.objects), pytest.raises(WatcherRunningError, match=f'"pid": {os.getpid()}'):
        WatcherLock(run.objects).__enter__()
    close(process)


def test_the_lock_is_freed_when_its_block_is_left_by_an_exception(tmp_path: Path) -> None:
    run = create_run(tmp_path)
    with pytest.raises(KeyError), WatcherLock(run.objects):
        raise KeyError
    with WatcherLock(run.objects):
        pass


def test_runs_do_not_lock_one_another(tmp_path: Path) -> None:
    with WatcherLock(create_run(tmp_path / "a").objects), WatcherLock(create_run(tmp_path / "b").objects):
        pass


def test_an_object_store_has_no_lock() -> None:
    with pytest.raises(StoreError, match="watch it where its disk is mounted"):
        WatcherLock(Objects("memory://bucket"))
