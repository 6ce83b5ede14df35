"""The cooperative socket: who may speak, what it understands, and what is left of it."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from entropy_hooks import listen
from entropy_hooks.listen import MAX_REQUEST_BYTES, close
from entropy_monitor.runtime_dir import runtime_dir, socket_path

from .launching import end, launcher, start, steps
from .loops import Loop, hook_dictionaries, until

if TYPE_CHECKING:
    from collections.abc import Iterator

TRAINER = """
import sys, time
from pathlib import Path
import torch
from net import Net, batch, loss_of, report
from entropy_hooks.monitor import live_monitors
torch.manual_seed(0)
model, losses = Net(), []
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
while not Path(sys.argv[1]).exists():
    optimizer.zero_grad()
    loss = loss_of(model, batch())
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
    time.sleep(0.005)
report(losses=losses, hooks=sum(len(module._forward_hooks) for module in model.modules()))
"""


def ask(path: Path, line: bytes) -> dict[str, Any]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        connection.connect(str(path))
        connection.sendall(line)
        with connection.makefile("rb") as answers:
            (answer,) = answers.readlines()
    return json.loads(answer)


def request(path: Path, verb: str, **fields: Any) -> dict[str, Any]:
    return ask(path, json.dumps({"verb": verb, **fields}).encode() + b"\n")


@pytest.fixture
def here() -> Iterator[Path]:
    """This process listens."""
    path = listen()
    assert path is not None
    yield path
    close()
    assert not path.exists()


def test_attach_ping_detach(here: Path, run: Path) -> None:
    assert here == socket_path(os.getpid())
    with Loop() as loop:
        before = hook_dictionaries(loop.model, loop.optimizer)
        assert request(here, "ping")["message"] == "here, not observed"
        answer = request(here, "attach", run=str(run), options={"every": 2}, wait_s=20)
        assert (answer["ok"], answer["pid"], answer["model"]) == (True, os.getpid(), "Net")
        until(lambda: len(steps(run)) > 1, "frames")
        assert request(here, "detach")["ok"]
        assert hook_dictionaries(loop.model, loop.optimizer) == before


def test_only_its_owner_may_enter(here: Path) -> None:
    assert stat.S_IMODE(here.stat().st_mode) == 0o600
    assert stat.S_IMODE(here.parent.stat().st_mode) == 0o700
    assert here.parent.stat().st_uid == os.getuid()


def test_another_user_is_refused(here: Path) -> None:
    """Root may enter every directory, and becomes somebody else on the way."""
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    here.parent.parent.chmod(0o755)
    here.parent.chmod(0o755)
    here.chmod(0o666)  # for this test alone: the kernel's word must be enough
    script = """
import os, socket, sys
os.setgroups([])
os.setuid(65534)
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect(sys.argv[1])
    connection.sendall(b'{"verb": "ping"}')
    print(connection.recv(4096).decode())
"""
    found = subprocess.run([sys.executable, "-I", "-c", script, here], capture_output=True, text=True, check=True)
    answer = json.loads(found.stdout)
    assert not answer["ok"]
    assert "one of user 65534" in answer["message"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"import os\n", "Expecting value"),
        (b"[1, 2]\n", "expected a JSON object"),
        (b'{"verb": "exec", "code": "1"}\n', "expected a verb among"),
        (b"x" * (MAX_REQUEST_BYTES + 1), f"at most {MAX_REQUEST_BYTES} bytes"),
        (b"[" * 60000 + b"\n", "recursion"),
    ],
)
def test_what_is_no_request_is_refused(here: Path, line: bytes, words: str) -> None:
    answer = ask(here, line)
    assert not answer["ok"]
    assert words in answer["message"]
    assert request(here, "ping")["ok"], "it goes on listening"


def test_listening_twice_is_listening_once(here: Path) -> None:
    assert listen() == here


def test_what_a_dead_process_of_our_number_has_left_is_replaced() -> None:
    path = socket_path(os.getpid())
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    try:
        assert listen() == path
        assert request(path, "ping")["ok"]
    finally:
        close()


def test_a_directory_of_somebody_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    place = tmp_path / f"entropy-monitor-{os.getuid()}"
    (tmp_path / "elsewhere").mkdir()
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError, match="expected a directory of user"):
        runtime_dir()
    assert listen() is None
    assert "training goes on" in caplog.text
    if os.getuid() == 0:
        place.unlink()
        place.mkdir()
        os.chown(place, 65534, 65534)
        with pytest.raises(PermissionError, match="one of user 65534"):
            runtime_dir()


def test_a_directory_that_others_could_enter_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / f"entropy-monitor-{os.getuid()}").mkdir(mode=0o755)
    assert stat.S_IMODE(runtime_dir().stat().st_mode) == 0o700


def test_a_forked_child_has_no_socket_until_it_asks_for_one(here: Path) -> None:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        own = listen()
        os.write(writing, json.dumps([str(own), here.exists()]).encode())
        close()
        os._exit(0)
    os.waitpid(pid, 0)
    own, parents_stood = json.loads(os.read(reading, 4096))
    os.close(reading)
    os.close(writing)
    assert own == str(socket_path(pid))
    assert parents_stood
    assert not Path(own).exists()
    assert request(here, "ping")["pid"] == os.getpid()


def test_a_launched_job_can_be_detached_and_attached_again(run: Path, tmp_path: Path, runtime: Path) -> None:
    stop = tmp_path / "stop"
    process = start(*launcher(run, "--every", "2"), sys.executable, "-c", TRAINER, stop)
    try:
        (path,) = until(lambda: list(runtime.glob("*.sock")), "the socket")
        observed = until(lambda: (found := request(path, "ping")).get("run") and found, "the first attempt")
        assert (observed["attempt"], path.name) == (1, f"{observed['pid']}.sock")
        until(lambda: len(steps(run)) > 1, "frames of the first attempt")
        assert request(path, "detach", wait_s=20)["ok"]
        again = request(path, "attach", run=str(run), options={"every": 3}, wait_s=20)
        assert (again["attempt"], again["every"]) == (2, 3)
        until(lambda: len([a for a, _ in steps(run) if a == 2]) > 1, "frames of the second attempt")
        assert request(path, "detach", wait_s=20)["ok"]
    finally:
        stop.touch()
        ended = end(process)
    assert ended.code == 0, ended.err
    assert ended.report["hooks"] == 0
    assert list(runtime.glob("*.sock")) == []
    assert ended.report["losses"] == plain_losses(len(ended.report["losses"]))
    for attempt, every in ((1, 2), (2, 3)):
        numbers = [step for a, step in steps(run) if a == attempt]
        assert numbers == list(range(numbers[0], numbers[-1] + 1, every))
        assert numbers[0] % every == 0


def plain_losses(steps: int) -> list[float]:
    loop = Loop()
    for group in loop.optimizer.param_groups:
        group["lr"] = 1e-2
    for _ in range(steps):
        loop.step()
    return loop.losses
