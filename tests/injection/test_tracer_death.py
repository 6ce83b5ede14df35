"""Whatever kills the one that holds a target, at whatever moment: the target goes on and computes the same."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from entropy_monitor.injection.interpreter import read_interpreter
from entropy_monitor.injection.plan import Plan

from .targets import Target, need_python, wait_until

TRACER = Path(__file__).with_name("dying_tracer.py")

INTERRUPTED = ("returned -1, errno 4", "early")


def strike(target: Target, how: str, number: int, marks: Path) -> bool:
    """Enter a target, and die on the way. Whether the tracer survived; then the injected code leaves a mark."""
    interpreter = read_interpreter(target.pid)
    assert interpreter.mmap is not None
    assert interpreter.sigreturn is not None
    plan = Plan(
        pid=target.pid,
        mmap=interpreter.mmap,
        add_pending_call=interpreter.add_pending_call,
        run_simple_string=interpreter.run_simple_string,
        sigreturn=interpreter.sigreturn,
        code=f"__import__('os').mkdir({str(marks)!r} + str(__import__('time').monotonic_ns()))",
    )
    command = [sys.executable, "-S", str(TRACER), how, str(number)]
    ended = subprocess.run(command, input=json.dumps(asdict(plan)), capture_output=True, text=True, check=False)
    assert ended.returncode in {0, -9, -14}, ended.stderr
    if ended.returncode == 0:
        assert json.loads(ended.stdout)["reason"] == ""
    assert target.process.poll() is None, f"dead after {how} {number}"
    assert wait_until(lambda: target.state in "RS", f"the target to go on after {how} {number}")
    return ended.returncode == 0


@pytest.mark.parametrize("mode", ["numpy", "nanosleep", "read"])
def test_death_before_each_single_step(tmp_path: Path, mode: str) -> None:
    marks = tmp_path / "marks"
    died = survived = 0
    with Target(tmp_path, mode) as target:
        while not (survived := strike(target, "operation", died + 1, marks)):
            died += 1
        wait_until(lambda: list(tmp_path.glob("marks*")), "the injected code to run")
        # After a death in an interrupted nanosleep the call comes back as if a signal had been handled, as documented.
        result = target.finish(allowed=INTERRUPTED if mode == "nanosleep" else ())
    assert survived
    assert died >= 25, "an injection has about thirty steps"
    assert result.chains or result.waits > 10


@pytest.mark.parametrize("version", ["3.12", "3.13"])
def test_death_before_each_single_step_of_newer_pythons(tmp_path: Path, version: str) -> None:
    died = 0
    with Target(tmp_path, "sleep", need_python(version)) as target:
        while not strike(target, "operation", died + 1, tmp_path / "marks"):
            died += 1
        target.finish()
    assert died >= 25


def test_death_at_any_moment(tmp_path: Path) -> None:
    luck, blows = random.Random(4), 25
    with Target(tmp_path, "numpy") as target:
        for _ in range(blows):
            strike(target, "time", luck.randrange(1, 1500), tmp_path / "marks")
        result = target.finish()
    assert result.chains
    assert 0 < len(list(tmp_path.glob("marks*"))) < blows, "the blows should fall before and after the commit"
