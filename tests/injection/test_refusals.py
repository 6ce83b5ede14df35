"""Processes that cannot be entered: one line with the remedy, and nothing is touched or left behind."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from entropy_monitor.errors import AttachError, NoSuchProcessError
from entropy_monitor.injection import send as sending
from entropy_monitor.injection.send import choose_route, send

from .targets import ROOT, Target, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from entropy_monitor.injection.protocol import Request

NOBODY = 65534
REQUEST: Request = {"verb": "detach"}
TRACER = """
import sys
from entropy_monitor.injection.ptrace import Tracee
Tracee(int(sys.argv[1])).seize()
print("seized", flush=True)
input()
"""


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    yield
    assert not list(tmp_path.glob("entropy-monitor-answer-*"))


def refused(pid: int, error: type[AttachError] = AttachError) -> str:
    with pytest.raises(error) as caught:
        send(choose_route(pid), REQUEST, 5.0)
    return one_line(str(caught.value))


def one_line(message: str) -> str:
    assert "\n" not in message
    assert all(part in message for part in ("expected", "found", ":")), message
    return message


def in_child(function: Callable[[], object]) -> str:
    """What a function raises in a child process, which it may change the rights of."""
    read, write = os.pipe()
    if not os.fork():
        try:
            said = f"came back: {function()}"
        except BaseException as error:
            said = str(error)
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    os.wait()
    with os.fdopen(read) as pipe:
        return pipe.read()


def become(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def test_somebody_elses_process(tmp_path: Path) -> None:
    def attempt() -> object:
        choose_route(target.pid)  # imports what it needs: nobody may not read our packages
        become(NOBODY)
        return choose_route(target.pid)

    with Target(tmp_path, "sleep") as target:
        said = one_line(in_child(attempt))
        assert f"uid {os.getuid()}" in said
        assert "sudo" in said
        target.finish()


def test_root_without_the_capability(tmp_path: Path) -> None:
    # A container's root: the kernel refuses it a process that has more capabilities than it has itself.
    program = "import sys; from entropy_monitor.injection.send import choose_route; choose_route(int(sys.argv[1]))"
    without = ["setpriv", "--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace"]
    with Target(tmp_path, "sleep") as target:
        command = [*without, sys.executable, "-c", program, str(target.pid)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        target.finish()
    said = one_line(ended.stderr.splitlines()[-1])
    assert "--cap-add SYS_PTRACE" in said


def test_traced_by_another(tmp_path: Path) -> None:
    with Target(tmp_path, "sleep") as target:
        command = [sys.executable, "-c", TRACER, str(target.pid)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as tracer:
            assert tracer.stdout is not None
            assert tracer.stdout.readline() == b"seized\n"
            said = refused(target.pid)
            assert f"(pid {tracer.pid})" in said
            tracer.kill()
        send(choose_route(target.pid), REQUEST, 5.0)
        target.finish()


def test_a_zombie() -> None:
    child = subprocess.Popen([sys.executable, "-S", "-c", ""])
    wait_until(lambda: "Z" in Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2], "its end")
    assert f"zombie of process {os.getpid()}" in refused(child.pid, NoSuchProcessError)
    child.wait()
    assert "found none" in refused(child.pid, NoSuchProcessError)


def test_a_thread_is_no_process(tmp_path: Path) -> None:
    with Target(tmp_path, "threads") as target:
        thread = max(int(task.name) for task in Path(f"/proc/{target.pid}/task").iterdir())
        assert f"give {target.pid}" in refused(thread, NoSuchProcessError)
        target.finish()


def test_no_python() -> None:
    with subprocess.Popen(["sleep", "30"]) as process:
        said = refused(process.pid)
        process.kill()
    assert "expected a CPython process" in said


def test_a_stopped_target_stays_stopped(tmp_path: Path) -> None:
    with Target(tmp_path, "compute") as target:
        os.kill(target.pid, signal.SIGSTOP)
        wait_until(lambda: target.state == "T", "the stop")
        assert f"kill -CONT {target.pid}" in refused(target.pid)
        assert target.state == "T"
        os.kill(target.pid, signal.SIGCONT)
        send(choose_route(target.pid), REQUEST, 5.0)
        target.finish()


def test_stopped_while_it_is_entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "GRACE_S", 0.0)
    luck = random.Random(1)
    with Target(tmp_path, "numpy") as target:
        for _ in range(12):
            timer = threading.Timer(luck.uniform(0.02, 0.08), os.kill, (target.pid, signal.SIGSTOP))
            timer.start()
            try:
                send(choose_route(target.pid), REQUEST, 0.1)
            except AttachError as error:
                one_line(str(error))
            timer.join()
            wait_until(lambda: target.state == "T", "the stop")
            os.kill(target.pid, signal.SIGCONT)
            wait_until(lambda: target.state in "RS", "the target to go on")
        target.finish()


def test_the_target_ends_meanwhile() -> None:
    luck, said = random.Random(2), []
    for _ in range(12):
        program = f"import time; time.sleep({luck.uniform(0.02, 0.15)})"
        child = subprocess.Popen([sys.executable, "-S", "-c", program], stderr=subprocess.PIPE)
        time.sleep(0.02)
        try:
            said.append(send(choose_route(child.pid), REQUEST, 5.0)[0]["message"])
        except AttachError as error:
            said.append(one_line(str(error)))
        assert child.communicate()[1] == b""
        assert child.returncode == 0
    assert any("has ended" in line or "found it" in line for line in said), said


def test_a_request_that_was_given_up_is_not_carried_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "GRACE_S", 0.1)
    trace = tmp_path / "trace"
    (tmp_path / "entropy_hooks").mkdir()
    (tmp_path / "entropy_hooks" / "__init__.py").write_text(f"open({str(trace)!r}, 'w').close()")
    program = "import time; print(flush=True); time.sleep(1.5); [time.sleep(0.01) for _ in range(30)]"
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        said = refused_within(child.pid, 0.3)
        assert "waits in system call" in said
        assert child.communicate()[1] == b""
        assert child.returncode == 0
    assert not trace.exists()


def refused_within(pid: int, wait_s: float) -> str:
    with pytest.raises(AttachError) as caught:
        send(choose_route(pid), REQUEST, wait_s)
    return one_line(str(caught.value))


def test_a_target_of_another_user_is_answered_for() -> None:
    # As root: the answer must be writable for the target, which has given up its rights.
    loaded = (
        "__future__, ctypes, importlib, json, os, pathlib, threading, time, typing"  # nobody may not read our packages
    )
    program = f"import {loaded}; os.setuid({NOBODY}); print(flush=True)\nwhile True: time.sleep(0.01)"
    environ = {**os.environ, "TMPDIR": "/tmp"}
    with subprocess.Popen([sys.executable, "-I", "-c", program], stdout=subprocess.PIPE, cwd="/", env=environ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        try:
            reply, _ = send(choose_route(child.pid), REQUEST, 5.0)
        finally:
            child.kill()
    assert reply["ok"] is False  # it has nothing of ours; but it could say so
