"""Child processes that live and die together."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence
    from pathlib import Path
    from types import FrameType, TracebackType

_PATIENCE_S = 10.0


@dataclass(slots=True)
class Children:
    """Starts processes in their own sessions, so that Ctrl-C reaches the parent alone, which ends them in order."""

    log_dir: Path
    environment: Mapping[str, str]
    _processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict[str, "subprocess.Popen[bytes]"])

    def start(self, name: str, module: str, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start ``python -m module``; what it prints goes to ``NAME.log``.

        Returns:
            The process.
        """
        self.log_dir.mkdir(parents=True, exist_ok=True)
        with (self.log_dir / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(self.environment),
                start_new_session=True,
            )
        self._processes[name] = process
        return process

    def __enter__(self) -> Self:
        """Nothing to do yet.

        Returns:
            These children.
        """
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End every child: asked first, in the order of their start, then killed."""
        for process in self._processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            try:
                process.wait(_PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def last_words(self, name: str) -> str:
        """The last line of a child's log.

        Returns:
            The line, or a remark that there is none.
        """
        lines = (self.log_dir / f"{name}.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


@contextmanager
def interruptible() -> Generator[threading.Event]:
    """Turn SIGINT and SIGTERM into an event while the block runs.

    Yields:
        The event.
    """
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
