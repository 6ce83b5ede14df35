"""From the first optimizer step of a launched process to its monitor."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entropy_hooks.attach import attach
from entropy_hooks.discovery import Search, choose
from entropy_hooks.launch.bootstrap import note
from entropy_hooks.launch.claims import claim_run
from entropy_hooks.listen import listen
from entropy_hooks.monitor import live_monitors
from entropy_hooks.training_thread import AtNextBackward

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.optim import Optimizer

    from entropy_hooks.discovery import Found, Seen

logger = logging.getLogger("entropy_hooks")

_YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")
_PR_SET_PTRACER, _PR_SET_PTRACER_ANY = 0x59616D61, ctypes.c_ulong(-1)


class Launched:
    """Finds what trains and attaches to it, on the training thread, as ``attach()`` in the script would."""

    def __init__(self, remove_hook: Callable[[], None]) -> None:
        self._remove_hook = remove_hook
        self._search = Search(self._attach_to, self._fail)
        if os.environ.get("ENTROPY_MONITOR_VERBOSE"):
            _show_messages()

    def after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Behind every optimizer step until this has come to an end."""
        self._search.after_step(optimizer, args, kwargs)

    def forget(self) -> None:
        """In a forked child: what the parent has seen is of no use here."""
        self._search.remove()

    def _attach_to(self, seen: Seen) -> None:
        if live_monitors():
            note("observed", by="the script")
            self._end()
            return
        found = choose(seen)
        if found is None:
            names = ", ".join(stepped.name for stepped in seen.stepped)
            raise LookupError(f"no torch module holds the parameters of {names}: use attach() in the script")
        self._search.install_after(found.last.optimizer, functools.partial(self._attach, found))

    def _attach(self, found: Found, num_steps: int) -> None:
        before = found.last.own_count.read(wait=False)
        # A resumed job's optimizer knows of the steps of earlier starts.
        step = num_steps if before is None else max(num_steps, num_steps + before - found.last.num_steps)
        monitor = attach(found.model, found.optimizers, run=claim_run(), start_step=step)
        self._end()
        if not monitor.enabled:
            note("failed", message=monitor.why_disabled)  # which has been logged
            return
        note("observed", by="the launcher", run=monitor.run_url, attempt=monitor.stats().attempt, step=step)
        logger.info("observing %s in %s from step %d", found, monitor.run_url, step)

    def _fail(self, error: Exception) -> None:
        self._end()
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        logger.warning("not observing this process (training goes on): %s", message)
        note("failed", message=message)

    def _end(self) -> None:
        """Whatever came of it, the process trains: it can be entered from now on."""
        self._search.give_up()
        AtNextBackward(self._remove_hooks)  # not in the hook that runs: torch is iterating over it
        listen()
        _allow_tracers()

    def _remove_hooks(self) -> None:
        self._search.remove()
        self._remove_hook()


def _show_messages() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _allow_tracers() -> None:
    """Where Yama restricts ptrace to ancestors, let ``entropy-monitor attach`` in even without the socket."""
    try:
        restricted = _YAMA.read_text(encoding="ascii").strip() == "1"
    except OSError:  # no Yama: nothing to allow
        return
    if restricted:
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _PR_SET_PTRACER_ANY, 0, 0, 0)
