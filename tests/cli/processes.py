"""The command line as users run it: processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 60.0

TRAINER = """
import sys, time, torch
from pathlib import Path
from entropy_hooks import attach
from entropy_monitor.demo.model import ByteGPT, GPTOptions

# A small trainer that steps until its stop file appears, and says when its first step is done.
torch.set_num_threads(1)
run, stop = sys.argv[1], Path(sys.argv[2])
torch.manual_seed(0)
model = ByteGPT(GPTOptions(num_layers=2, width=16, num_heads=2, context=16))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
with attach(model, optimizer, run=run, every=10, steer=sys.argv[3] == "steer") as monitor:
    tokens = torch.randint(0, 256, (2, 16))
    while not stop.exists():
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(tokens).view(-1, 256), tokens.view(-1)).backward()
        optimizer.step()
        if monitor.stats().step == 1:
            print("stepping", flush=True)
        time.sleep(0.005)
print(monitor.stats().step, flush=True)
"""


def environment(**variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ENTROPY_MONITOR_")}
    paths = [ROOT, ROOT / "hooks", ROOT / "dashboard"]
    return {**kept, "PYTHONPATH": os.pathsep.join(map(str, paths)), "NO_COLOR": "1", "COLUMNS": "200", **variables}


def start(*arguments: object, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**variables),
    )


def entropy_monitor(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    process = start("-m", "entropy_monitor", *arguments, **variables)
    out, err = process.communicate(timeout=90)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def one_line(text: str) -> str:
    """The only line of an error message."""
    lines = text.splitlines()
    assert len(lines) == 1, text
    assert lines[0].startswith("error: "), text
    return lines[0]


def status_of(run: Path) -> dict[str, Any]:
    found = entropy_monitor("status", run, "--json")
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


def wait_until(condition: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> Any:
    deadline = time.monotonic() + deadline_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {deadline_s} s in vain for {what}"
        time.sleep(0.05)
    return found


def processes_naming(path: Path) -> list[str]:
    """Command lines of all running processes that name a path."""
    found: list[str] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:  # it has just ended
                continue
            if str(path) in line:
                found.append(line)
    return found


class Trainer:
    """The small trainer, live until `stop`."""

    def __init__(self, directory: Path, *, steer: bool = True, **variables: str) -> None:
        self.run, self._stop = directory / "run", directory / "stop"
        mode = "steer" if steer else "observe"
        self.process = start("-c", TRAINER, self.run, self._stop, mode, **variables)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "stepping\n"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Whatever the test has come to, nothing goes on running."""
        if self.process.poll() is None:
            self.kill()

    def stop(self) -> int:
        """Let it end; the steps it made."""
        self._stop.touch()
        out, err = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, err
        return int(out)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate(timeout=60)
