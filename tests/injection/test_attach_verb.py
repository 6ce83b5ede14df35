"""``entropy-monitor attach`` and ``detach`` as users run them."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from entropy_monitor.injection.send import choose_route, send

from .targets import ROOT, Target, wait_until

if TYPE_CHECKING:
    from entropy_monitor.injection.protocol import Request

ASKING = """
import sys
from entropy_monitor.injection.send import choose_route, send
send(choose_route(int(sys.argv[1])), {"verb": "detach"}, 10.0)
"""


def start(*arguments: object, cwd: Path | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "entropy_monitor", *map(str, arguments)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environ, cwd=cwd, start_new_session=True)


def run(*arguments: object, code: int = 0, cwd: Path | None = None) -> str:
    """What a command prints; where it fails, its one line of error."""
    process = start(*arguments, cwd=cwd)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, (out, err)
    if code:
        assert len(err.splitlines()) == 1
        assert err.startswith("error: ")
        return err
    assert err == ""
    return out


def as_json(*arguments: object, code: int = 0) -> dict[str, Any]:
    process = start(*arguments, "--json")
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, (out, err)
    return json.loads(out)


def test_attach_and_detach(tmp_path: Path) -> None:
    with Target(tmp_path, "sleep") as target:
        found = as_json("attach", target.pid, "--run", "runs/x", "--every", 7, "--wait-s", 9)
        assert found["ok"] is True
        (rank,) = found["ranks"]
        assert rank["method"] == "ptrace"
        assert rank["python"] == ".".join(map(str, sys.version_info[:3]))
        assert 0 < rank["stopped_ms"] < 1000
        assert rank["request"] == {
            "verb": "attach",
            "run": str(Path.cwd() / "runs/x"),
            "options": {"steer": False, "every": 7},
            "wait_s": 9.0,
        }
        assert run("detach", target.pid) == f"pid {target.pid}: here\n"
        steered = as_json("attach", target.pid, "--run", "s3://bucket/run", "--steer")
        assert steered["ranks"][0]["request"]["options"] == {"steer": True}
        assert steered["ranks"][0]["request"]["run"] == "s3://bucket/run"
        target.finish()


def test_a_dry_run_touches_nothing(tmp_path: Path) -> None:
    with Target(tmp_path, "sleep") as target:
        before = sorted(tmp_path.rglob("*")), target.resources()
        said = run("attach", target.pid, "--run", tmp_path / "run", "--dry-run")
        assert "would enter by ptrace" in said
        assert (sorted(tmp_path.rglob("*")), target.resources()) == before
        assert not (tmp_path / "stand_in" / "entropy_hooks" / "__pycache__").exists(), "the hooks were imported"
        target.finish()


def test_exit_codes(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert "found none" in run("attach", gone.pid, "--run", tmp_path / "run", code=3)
    assert "found none" in run("detach", gone.pid, code=3)
    assert "--method" in run("attach", os.getpid(), "--run", tmp_path / "run", "--method", "magic", code=2)
    assert "--wait-s" in run("attach", os.getpid(), "--run", tmp_path / "run", "--wait-s", 0, code=2)
    assert "--every" in run("attach", os.getpid(), "--run", tmp_path / "run", "--every", 0, code=2)
    assert "no socket" in run("detach", os.getpid(), "--method", "socket", code=1)
    assert not (tmp_path / "run").exists()


def test_all_ranks(tmp_path: Path) -> None:
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555", "TORCHELASTIC_RUN_ID": tmp_path.name}
    with (
        Target(tmp_path, "sleep", RANK="0", **job) as first,
        Target(tmp_path, "sleep", RANK="1", **job) as second,
        Target(tmp_path, "sleep", RANK="1", **{**job, "TORCHELASTIC_RUN_ID": "another"}) as stranger,
    ):
        found = as_json("attach", second.pid, "--run", tmp_path / "run", "--all-ranks")
        assert [(rank["rank"], rank["pid"], rank["ok"]) for rank in found["ranks"]] == [
            (0, first.pid, True),
            (1, second.pid, True),
        ]
        alone = run("attach", second.pid, "--run", tmp_path / "run", "--dry-run")
        assert f"other ranks of its job here: {first.pid} (add --all-ranks)" in alone
        os.kill(first.pid, signal.SIGSTOP)
        wait_until(lambda: first.state == "T", "the stop")
        refused = as_json("attach", second.pid, "--run", tmp_path / "run", "--all-ranks", code=1)
        assert "stopped" in refused["ranks"][0]["message"]
        assert "was left alone" in refused["ranks"][1]["message"]
        os.kill(first.pid, signal.SIGCONT)
        for target in (first, second, stranger):
            target.finish()


def test_children_of_a_rank_are_no_ranks(tmp_path: Path) -> None:
    program = f"import os, sys; os.fork(); exec(open({str(Path(__file__).with_name('workload.py'))!r}).read())"
    environ = {**os.environ, "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29556"}
    command = [sys.executable, "-c", program, "sleep", str(tmp_path / "stop")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environ, cwd=ROOT) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        assert parent.stdout.readline() == b"ready\n"
        found = as_json("attach", parent.pid, "--run", tmp_path / "run", "--all-ranks", "--dry-run")
        (tmp_path / "stop").touch()
    assert [rank["pid"] for rank in found["ranks"]] == [parent.pid]


def blow(process: subprocess.Popen[str], number: int) -> None:
    """Strike, and wait for the end, which Ctrl-C and SIGTERM must bring about as well."""
    process.send_signal(number)
    process.communicate(timeout=30)


@pytest.mark.parametrize("mode", ["numpy", "nanosleep"])
def test_the_asking_side_is_killed_at_any_moment(tmp_path: Path, mode: str) -> None:
    luck = random.Random(7)
    numbers = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    with Target(tmp_path, mode) as target:
        for turn in range(30):
            if turn % 5 == 0:
                process = start("attach", target.pid, "--run", tmp_path / "run")
                time.sleep(luck.uniform(0.2, 0.8))
            else:
                command = [sys.executable, "-c", ASKING, str(target.pid)]
                process = subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ
                )
                time.sleep(luck.uniform(0.05, 0.25))
            blow(process, numbers[turn % 3])
            assert target.process.poll() is None
            wait_until(lambda: target.state in "RS", "the target to go on")
        request: Request = {"verb": "ping"}
        # A shield of a killed one may still be at work, which makes the target look traced for a moment.
        wait_until(lambda: "TracerPid:\t0" in Path(f"/proc/{target.pid}/status").read_text(), "the last shield")
        assert send(choose_route(target.pid), request, 10.0)[0]["ok"]
        target.finish()
    left = list(tmp_path.glob("entropy-monitor-answer-*"))
    assert len(left) <= 10, "only those that were killed by SIGKILL cannot clean up"


def test_doctor_traces_a_child() -> None:
    found = as_json("doctor")
    check = next(check for check in found["checks"] if check["name"] == "ptrace")
    assert check["state"] == "ok"
    assert all(part in check["found"] for part in ("Yama", "CAP_SYS_PTRACE effective", "gdb", "a child was traced"))
