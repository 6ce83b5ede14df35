"""The socket, ``sys.remote_exec`` and gdb."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from entropy_monitor.errors import AttachError
from entropy_monitor.injection.protocol import (
    MAX_LINE_BYTES,
    Request,
    decode_reply,
    encode,
    socket_path,
)
from entropy_monitor.injection.send import choose_route, send

from .targets import Target, need_python

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

REQUEST: Request = {"verb": "attach", "run": "runs/nobody-reads-this", "options": {"every": 3}, "wait_s": 5.0}
LISTENER = """
import json, os, socket, sys
directory = f"{os.environ['XDG_RUNTIME_DIR']}/entropy-monitor-{os.getuid()}"
os.mkdir(directory, 0o700)
os.chdir(directory)  # a path may be longer than a socket's address
listener = socket.socket(socket.AF_UNIX)
listener.bind(f"{os.getpid()}.sock")
listener.listen()
print(flush=True)
while True:
    connection = listener.accept()[0]
    line = connection.makefile("rb").readline()
    if line:
        answer = {"ok": True, "message": "heard", "request": json.loads(line)} if sys.argv[1] == "answer" else None
        if answer:
            connection.sendall(json.dumps(answer).encode() + b"\\n")
    connection.close()
"""


@pytest.fixture
def listener(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[int]:
    runtime = tmp_path / ("long" * 30)
    runtime.mkdir()
    command = [sys.executable, "-S", "-c", LISTENER, getattr(request, "param", "answer")]
    environ = {**os.environ, "XDG_RUNTIME_DIR": str(runtime)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        process.kill()


def test_a_listening_process_is_asked_through_its_socket(listener: int) -> None:
    route = choose_route(listener)
    assert route.method == "socket"
    reply, _ = send(route, REQUEST, 5.0)
    assert reply == {"ok": True, "message": "heard", "request": REQUEST}


@pytest.mark.parametrize("listener", ["silence"], indirect=True)
def test_a_listener_that_hangs_up(listener: int) -> None:
    with pytest.raises(AttachError, match=r"expected an answer on .*; found .*: use another --method"):
        send(choose_route(listener), REQUEST, 5.0)


def test_a_socket_left_behind_is_passed_over(tmp_path: Path) -> None:
    with Target(tmp_path, "sleep", XDG_RUNTIME_DIR=str(tmp_path)) as target:
        path = socket_path(target.pid, {"XDG_RUNTIME_DIR": str(tmp_path)}, os.getuid())
        path.parent.mkdir()
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
        assert choose_route(target.pid).method == "ptrace"
        with pytest.raises(AttachError, match="no socket"):
            choose_route(target.pid, "socket")
        target.finish()


def test_somebody_else_at_the_socket(tmp_path: Path) -> None:
    with Target(tmp_path, "sleep", XDG_RUNTIME_DIR=str(tmp_path)) as target:
        path = socket_path(target.pid, {"XDG_RUNTIME_DIR": str(tmp_path)}, os.getuid())
        path.parent.mkdir()
        with socket.socket(socket.AF_UNIX) as ours:
            ours.bind(str(path))
            ours.listen()
            with pytest.raises(AttachError, match=f"found process {os.getpid()}"):
                send(choose_route(target.pid, "socket"), REQUEST, 1.0)
        target.finish()


@pytest.mark.parametrize("mode", ["sleep", "compute"])
def test_remote_exec(tmp_path: Path, mode: str) -> None:
    with Target(tmp_path, mode, need_python("3.14")) as target:
        for _ in range(10):
            route = choose_route(target.pid)
            assert route.method == "remote-exec"
            reply, _ = send(route, REQUEST, 10.0)
            assert reply["ok"]
            assert {**reply}["request"] == REQUEST
        target.finish()


def test_remote_exec_is_refused_before_3_14(tmp_path: Path) -> None:
    with Target(tmp_path, "sleep") as target:
        with pytest.raises(AttachError, match=r"needs CPython 3\.14"):
            choose_route(target.pid, "remote-exec")
        target.finish()


def test_gdb_enters_or_says_why_not_and_harms_nobody(tmp_path: Path) -> None:
    with Target(tmp_path, "nanosleep") as target:
        try:
            said = send(choose_route(target.pid, "gdb"), REQUEST, 10.0)[0]["message"]
        except AttachError as error:  # no gdb here, or one that breaks what it touches on this processor
            said = str(error)
        assert ("gdb is not installed" in said) == (shutil.which("gdb") is None)
        assert "\n" not in said
        target.finish(allowed=("returned -1, errno 4", "early") if said == "here" else ())


def test_lines_of_the_protocol() -> None:
    assert decode_reply(encode({"ok": True, "message": "é"})) == {"ok": True, "message": "é"}
    wrong = (
        b"",
        b"{}\n",
        b"[]\n",
        b"{\n",
        b'{"ok": 1, "message": "here"}\n',
        b'{"ok": true}\n',
        b"x" * (MAX_LINE_BYTES + 1),
    )
    for line in wrong:
        with pytest.raises(ValueError, match=r"expected .*; found"):
            decode_reply(line)
