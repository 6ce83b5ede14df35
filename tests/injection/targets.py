"""Real processes to enter: which Pythons there are, and a workload that proves that it was not disturbed."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

WORKLOAD = Path(__file__).with_name("workload.py")
ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 30.0

STAND_IN = """
import os

def submit(request, reply):
    reply({"ok": True, "message": "here", "request": request, "inner_pid": os.getpid()})
"""


@functools.cache
def find_python(version: str) -> str | None:
    """A working interpreter of this version, itself and not a wrapper."""
    own = ".".join(map(str, sys.version_info[:2]))
    candidates = [sys.executable] if version == own else []
    candidates += [found for found in [shutil.which(f"python{version}")] if found]
    candidates += map(str, sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}")))
    for candidate in candidates:
        code = "import sys; print(sys.executable, *sys.version_info[:2])"
        with contextlib.suppress(OSError):
            found = subprocess.run([candidate, "-c", code], capture_output=True, text=True, check=False).stdout.split()
            if found[1:] == version.split("."):
                return found[0]
    return None


def need_python(version: str) -> str:
    python = find_python(version)
    if python is None:
        pytest.skip(f"no CPython {version} on this machine: neither python{version} on PATH nor a pyenv version")
    return python


@dataclass(frozen=True)
class Result:
    chains: list[tuple[str, int, str]]
    faults: list[str]
    waits: int
    names: list[str]
    threads: list[str]


class Target:
    """A running workload. On the way out of the block it is killed, whatever has happened."""

    def __init__(self, directory: Path, mode: str, python: str = sys.executable, **environ: str) -> None:
        self.python, self._stop = python, directory / f"stop-{time.monotonic_ns()}"
        package = directory / "stand_in" / "entropy_hooks"
        if not package.exists():
            package.mkdir(parents=True)
            (package / "__init__.py").touch()
            (package / "remote.py").write_text(STAND_IN)
        self.process = subprocess.Popen(
            [python, str(WORKLOAD), mode, str(self._stop)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "TMPDIR": str(directory),
                "PYTHONPATH": str(package.parent),
                "OPENBLAS_NUM_THREADS": "2",
                **environ,
            },
        )
        self.pid = self.process.pid
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.communicate()

    @property
    def state(self) -> str:
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]

    def resources(self) -> tuple[int, int, int]:
        """Open files, threads, and small anonymous mappings."""
        threads = len(list(Path(f"/proc/{self.pid}/task").iterdir()))
        files = len(list(Path(f"/proc/{self.pid}/fd").iterdir()))
        return files, threads, self.mappings()

    def mappings(self) -> int:
        """Anonymous mappings of up to 64 KiB: what the injected code comes in."""
        small = 0
        for line in Path(f"/proc/{self.pid}/maps").read_text().splitlines():
            fields = line.split()
            start, end = (int(part, 16) for part in fields[0].split("-"))
            small += len(fields) == 5 and fields[1] == "rw-p" and end - start <= 1 << 16
        return small

    def finish(self, allowed: tuple[str, ...] = ()) -> Result:
        """Let it end, and check that it computed what its undisturbed twin computes."""
        self._stop.touch()
        out, err = self.process.communicate(timeout=DEADLINE_S)
        assert self.process.returncode == 0, err
        assert err == ""
        result = Result(**json.loads(out))
        for kind, steps, digest in result.chains:
            assert steps > 0
            assert digest == self._twin(kind, steps), kind
        assert not [fault for fault in result.faults if not fault.startswith(allowed or ("-",))], result.faults
        assert result.names == [], result.names
        assert not [name for name in result.threads if name.startswith(("entropy", "Dummy"))], result.threads
        return result

    def _twin(self, kind: str, steps: int) -> str:
        command = [self.python, str(WORKLOAD), "twin", kind, str(steps)]
        environ = {**os.environ, "OPENBLAS_NUM_THREADS": "2"}
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environ).stdout.strip()


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + DEADLINE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {DEADLINE_S} s in vain for {what}"
        time.sleep(0.01)
    return found
