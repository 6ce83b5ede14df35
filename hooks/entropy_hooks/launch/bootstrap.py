"""In each Python process of a launched job, before its own first line. Standard library only, and little of it.

Until the process imports ``torch.optim`` there is one import hook; from then on one hook behind optimizer steps. What
is heavy is imported at the first step, so processes that never train (workers of a DataLoader, the launcher's own) pay
nothing.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

OPTIM = "torch.optim"
NOTES = "notes.jsonl"


def start() -> None:
    """Begin, if this process belongs to a launch and hooks are not switched off."""
    if "ENTROPY_MONITOR_LAUNCH" not in os.environ or os.environ.get("ENTROPY_MONITOR_MODE", "").lower() == "disabled":
        return
    note("python")
    if OPTIM in sys.modules:
        _StepHook()
    else:
        sys.meta_path.insert(0, _Finder())


def note(what: str, **facts: Any) -> None:
    """Tell the launcher what has come to pass here."""
    path = Path(os.environ.get("ENTROPY_MONITOR_LAUNCH", ""), NOTES)
    line = json.dumps({"what": what, "pid": os.getpid(), **facts}) + "\n"
    try:
        with path.open("a", encoding="utf-8") as notes:
            notes.write(line)
    except OSError:  # the launcher is on another machine, or has gone: it alone would want to know
        pass


class _Finder:
    """Finds `torch.optim` as all others do, and acts once it has been executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != OPTIM:
            return None
        for finder in sys.meta_path:
            find_spec = getattr(finder, "find_spec", None)
            if finder is self or find_spec is None:
                continue
            if (spec := find_spec(name, path, target)) is not None:
                _guarded(functools.partial(self._act_after, spec.loader))
                return spec
        return None

    def _act_after(self, loader: Any) -> None:
        execute: Callable[[ModuleType], None] = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            with contextlib.suppress(AttributeError):
                del loader.exec_module
            execute(module)
            with contextlib.suppress(ValueError):
                sys.meta_path.remove(self)
            _guarded(_StepHook)

        loader.exec_module = exec_module


class _StepHook:
    """One global hook behind optimizer steps; at the first it fetches who knows what to do."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._launched: Any = None
        self._fetched = False
        self._install()
        os.register_at_fork(after_in_child=functools.partial(_guarded, self._start_afresh))

    def _install(self) -> None:
        optimizer: Any = sys.modules["torch.optim.optimizer"]

        def hook(*arguments: Any) -> None:
            self._after_step(*arguments)

        # Dynamo must not trace it where a whole optimizer step is compiled; see `entropy_hooks.untraced`.
        untraced: Any = getattr(sys.modules.get("torch._compile"), "_disable_dynamo", None)
        self._handle = optimizer.register_optimizer_step_post_hook(untraced(hook) if untraced else hook)

    def _start_afresh(self) -> None:
        """A forked child may train by itself."""
        self._handle.remove()
        if self._launched is not None:
            self._launched.forget()
        self._launched, self._fetched = None, False
        self._install()

    def _after_step(self, *arguments: Any) -> None:
        if not self._fetched:
            self._fetched = True
            _guarded(self._fetch)
        if self._launched is not None:
            _guarded(functools.partial(self._launched.after_step, *arguments))

    def _fetch(self) -> None:
        note("step")
        from entropy_hooks.launch.observe import Launched

        self._launched = Launched(self._handle.remove)


def _guarded(task: Callable[[], object]) -> None:
    try:
        task()
    except Exception as error:  # the job goes on
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        print(f"entropy-monitor: not observing this process: {message}", file=sys.stderr)
        note("failed", message=message)
