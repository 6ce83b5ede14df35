"""The command is the user's: its exit code, its signals, its streams. None of these jobs needs torch."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from .launching import end, launcher, start

WAITING = """
import signal, sys, time
def on_signal(number, frame):
    print("had", signal.Signals(number).name, flush=True)
    sys.exit(7)
signal.signal(signal.Signals[sys.argv[1]], on_signal)
print("ready", flush=True)
time.sleep(60)
"""
NEVER_TRAINED = "entropy-monitor: no optimizer step was seen in: "


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def child_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def wait_for_state(pid: int, states: str) -> None:
    deadline = time.monotonic() + 20
    while state_of(pid) not in states:
        assert time.monotonic() < deadline, f"{pid} is {state_of(pid)}, expected one of {states}"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (("sh", "-c", "exit 0"), 0),
        (("sh", "-c", "exit 3"), 3),
        (("sh", "-c", "kill -TERM $$"), 128 + signal.SIGTERM),
        (("sh", "-c", "kill -KILL $$"), 128 + signal.SIGKILL),
        (("no-such-command",), 127),
        (("/",), 126),
    ],
)
def test_exit_codes(run: Path, command: tuple[str, ...], code: int) -> None:
    ended = end(start(*launcher(run), *command))
    assert ended.code == code
    (line,) = ended.err.splitlines()
    if code in (126, 127):
        assert line.startswith(f"error: expected a command; '{command[0]}'")
    else:
        assert line.startswith(NEVER_TRAINED)
    assert not run.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--run", "there"), "Missing argument 'CMD...'"),
        (("--", "true"), "Missing option '--run'"),
        (("--run", "there", "--every", "0", "--", "true"), "'--every'"),
    ],
)
def test_wrong_usage_starts_nothing(arguments: tuple[str, ...], message: str) -> None:
    ended = end(start(sys.executable, "-m", "entropy_monitor", "run", *arguments))
    assert ended.code == 2
    (line,) = ended.err.splitlines()
    assert message in line


def test_wrong_settings_are_said_before_anything_starts(run: Path) -> None:
    ended = end(start(*launcher(run), "sh", "-c", "echo started", ENTROPY_MONITOR_EVERY="often"))
    assert (ended.code, ended.out) == (2, "")
    assert "ENTROPY_MONITOR_EVERY" in ended.err


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_signals_reach_the_command(run: Path, name: str) -> None:
    process = start(*launcher(run), sys.executable, "-c", WAITING, name)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.Signals[name])
    ended = end(process)
    assert (ended.code, ended.out) == (7, f"had {name}\n")


def test_a_stopped_command_stops_the_launcher_and_both_go_on(run: Path) -> None:
    process = start(*launcher(run), "sh", "-c", "echo ready; exec sleep 60")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    command = child_of(process.pid)
    os.kill(command, signal.SIGSTOP)  # as Ctrl-Z: a group that no shell waits for ignores SIGTSTP
    wait_for_state(process.pid, "T")
    os.kill(process.pid, signal.SIGCONT)
    wait_for_state(command, "S")
    wait_for_state(process.pid, "S")
    process.terminate()
    assert end(process).code == 128 + signal.SIGTERM


def test_ctrl_c_on_a_terminal_is_given_once(run: Path) -> None:
    """The terminal gives it to the whole foreground group; the launcher must not add a second one."""
    script = """
import signal, sys, time
count = 0
def on_signal(number, frame):
    global count
    count += 1
signal.signal(signal.SIGINT, on_signal)
print("ready", sys.stdin.isatty(), sys.stdout.isatty(), flush=True)
deadline = time.monotonic() + 20
while not count and time.monotonic() < deadline:
    time.sleep(0.01)
time.sleep(0.3)
print("count", count, flush=True)
"""
    import pty

    from .launching import environment

    pid, terminal = pty.fork()
    if pid == 0:
        os.execvpe(sys.executable, list(map(str, [*launcher(run), sys.executable, "-c", script])), environment())
    seen = b""
    while b"ready" not in seen:
        seen += os.read(terminal, 1024)
    os.write(terminal, b"\x03")
    while b"count" not in seen:
        seen += os.read(terminal, 1024)
    os.waitpid(pid, 0)
    os.close(terminal)
    assert b"ready True True" in seen
    assert b"count 1" in seen


def test_the_command_does_not_outlive_a_killed_launcher(run: Path) -> None:
    process = start(*launcher(run), sys.executable, "-c", WAITING, "SIGUSR1")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    command = child_of(process.pid)
    process.kill()
    assert end(process).code == -signal.SIGKILL, "its end of the pipe is closed, too"
    with contextlib.suppress(FileNotFoundError):
        wait_for_state(command, "ZX")


@pytest.mark.parametrize("flag", ["-I", "-S"])
def test_a_python_that_keeps_us_out_is_said(run: Path, flag: str) -> None:
    ended = end(start(*launcher(run), sys.executable, flag, "-c", "print('done')"))
    assert (ended.code, ended.out) == (0, "done\n")
    (line,) = ended.err.splitlines()
    assert line.startswith(NEVER_TRAINED)
    assert "-I, -S and -E keep it out" in line


def test_a_python_that_never_trains_is_said(run: Path) -> None:
    ended = end(start(*launcher(run), sys.executable, "-c", "import sys; print('torch' in sys.modules)"))
    assert (ended.code, ended.out) == (0, "False\n")
    (line,) = ended.err.splitlines()
    assert line.startswith(NEVER_TRAINED)
    assert "keep it out" not in line
    assert not run.exists()


def test_a_broken_installation_costs_one_line(run: Path, tmp_path: Path) -> None:
    """The hooks of this Python cannot be imported: the command runs."""
    broken = tmp_path / "torch"
    broken.mkdir()
    (broken / "__init__.py").write_text("")
    (broken / "optim.py").write_text("")  # without what a hook is registered with
    script = "import torch.optim; print('done')"
    ended = end(start(*launcher(run), sys.executable, "-c", script, paths=(tmp_path,)))
    assert (ended.code, ended.out) == (0, "done\n")
    first, last = ended.err.splitlines()
    assert first.startswith("entropy-monitor: not observing this process: ")
    assert last.startswith(NEVER_TRAINED)
