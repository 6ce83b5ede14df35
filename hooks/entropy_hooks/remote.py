"""Requests from outside, for code that was injected into this process or listens on its socket: attach, detach, ping.

A request is carried out on the thread that submits it, never on the training thread: only hooks are installed and
removed there, at the end of an optimizer's step and at the start of a backward pass.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from typing import TYPE_CHECKING, Any

from entropy_hooks.attach import Prepared, prepare
from entropy_hooks.discovery import Found, Search, Seen, choose
from entropy_hooks.monitor import EXIT_TIMEOUT_S, live_monitors
from entropy_hooks.process_end import at_process_end
from entropy_hooks.ranks import rank_and_world_size
from entropy_hooks.training_thread import AtNextBackward, do_at_safe_point
from entropy_monitor.config import hooks_disabled, load_config
from entropy_monitor.errors import ConfigError, EntropyMonitorError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from entropy_hooks.monitor import Monitor

Answer = dict[str, Any]
logger = logging.getLogger("entropy_hooks")

WAIT_S = 60.0
"""How long a request waits for the training loop unless it says otherwise."""
_REMOVAL_S = 2.0
"""How long the training thread is given to take away what has become useless."""
_busy = threading.Lock()
"""One request at a time changes hooks."""


def _renew_lock() -> None:
    global _busy
    _busy = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)  # whoever held it is a thread of the parent


def _finish() -> None:
    """Python's end would kill a request's thread wherever it is, in a destructor of C++ with the whole process."""
    _busy.acquire(timeout=EXIT_TIMEOUT_S)  # and kept: no other begins


class RefusedError(EntropyMonitorError):
    """A request that cannot be carried out: expected, found, remedy."""


def submit(request: Mapping[str, Any], reply: Callable[[dict[str, Any]], None]) -> None:
    """Carry out one request and answer it once; on a thread of its own, which this blocks until then.

    Args:
        request: ``{"verb": "ping" | "attach" | "detach", "run": DIR, "options": {fields of MonitorOptions},
            "wait_s": seconds}``; all but the verb may be missing.
        reply: takes the answer: ``ok``, ``message`` (one line), ``pid``, ``rank``, and ``run``, ``attempt``, ``step``,
            ``model``, ``layers`` of what is observed.
    """
    try:
        answer = _carry_out(request)
    except (EntropyMonitorError, OSError) as error:
        answer = {"ok": False, "message": _one_line(error)}
    except Exception as error:  # whatever it is: the other side waits for an answer, and training goes on
        logger.debug("", exc_info=error)
        answer = {"ok": False, "message": f"{type(error).__name__}: {_one_line(error)}"}
    reply({**_identity(), **answer})


def _carry_out(request: Mapping[str, Any]) -> Answer:
    verbs: dict[str, Callable[[Mapping[str, Any]], Answer]] = {"ping": _ping, "attach": _attach, "detach": _detach}
    verb = request.get("verb")
    if not isinstance(verb, str) or verb not in verbs:
        raise ConfigError(
            f"expected a verb among {', '.join(verbs)}; found {verb!r}: use the same version on both sides"
        )
    if verb == "ping":  # also while another request is under way
        return _ping(request)
    if not _busy.acquire(blocking=False):
        raise RefusedError("expected no other request; found one under way: wait for its answer")
    take_back = at_process_end(_finish)
    try:
        return verbs[verb](request)
    finally:
        _busy.release()
        take_back()


def _ping(request: Mapping[str, Any]) -> Answer:
    monitors = live_monitors()
    if not monitors:
        return {"ok": True, "message": "here, not observed"}
    return {"ok": True, "message": f"observed: {_describe(monitors)}", **_facts(monitors[0])}


def _detach(request: Mapping[str, Any]) -> Answer:
    monitors = live_monitors()
    if not monitors:
        return {"ok": True, "message": "not observed: nothing to remove"}
    wait_s, described, facts = _wait_s(request), _describe(monitors), _facts(monitors[0])

    def remove_hooks() -> None:
        for monitor in monitors:
            monitor.remove_hooks()

    if not do_at_safe_point(remove_hooks, wait_s):
        raise RefusedError(f"expected the optimizer's step to end within {wait_s:g} s; it did not: try again")
    for monitor in monitors:
        monitor.detach()
    return {"ok": True, "message": f"our hooks are removed: {described}", **facts}


def _attach(request: Mapping[str, Any]) -> Answer:
    run, options, wait_s = request.get("run"), request.get("options", {}), _wait_s(request)
    if not isinstance(options, dict):
        raise ConfigError(f"expected options to be a table; found {options!r}: give fields of MonitorOptions")
    load_config(run=run, hooks=options)  # wrong ones are refused before anything is touched
    if hooks_disabled():
        raise RefusedError("expected ENTROPY_MONITOR_MODE unset in the job; found disabled: start it without")
    if monitors := live_monitors():
        return {"ok": True, "message": f"already observed: {_describe(monitors)}", **_facts(monitors[0])}
    approach = _Approach(time.monotonic() + wait_s, wait_s)
    try:
        found, start_step = approach.find()
        prepared = prepare(found.model, found.optimizers, run=run, **options)
        monitor = approach.install(prepared, found, start_step) if isinstance(prepared, Prepared) else prepared
    finally:
        approach.clean_up()
    if not monitor.enabled:
        raise RefusedError(monitor.why_disabled)
    logger.info("observing %s", found)
    counted = "" if start_step is not None else "; its optimizer keeps no count: step numbers are not the job's own"
    return {
        "ok": True,
        "message": f"observing {found} in {monitor.run_url}, attempt {monitor.stats().attempt}{counted}",
        "step_from": "optimizer" if start_step is not None else "unknown",
        **_facts(monitor),
    }


class _Approach:
    """From the first look at the training loop to the installed hooks, within a time."""

    def __init__(self, deadline: float, wait_s: float) -> None:
        self._deadline, self._wait_s = deadline, wait_s
        self._events: queue.SimpleQueue[Seen | Monitor | Exception] = queue.SimpleQueue()
        self._search = Search(self._events.put, self._events.put)
        self._first_look = AtNextBackward(self._search.begin)

    def find(self) -> tuple[Found, int | None]:
        """Find what trains.

        Returns:
            It, and how many steps its optimizer had made before the first that was seen, if it counts them.

        Raises:
            RefusedError: nothing trained in time, or no model belongs to what did.
        """
        if not self._first_look.wait(self._left_s):
            raise self._nothing_came("backward pass")
        seen = self._next("optimizer step")
        assert isinstance(seen, Seen)
        found = choose(seen)
        if found is None:
            names = ", ".join(stepped.name for stepped in seen.stepped)
            raise RefusedError(
                f"expected a torch module that holds the parameters of {names}; found none: use attach() in the script"
            )
        count = found.last.own_count.read(wait=True)
        return found, None if count is None else count - found.last.num_steps

    def install(self, prepared: Prepared, found: Found, start_step: int | None) -> Monitor:
        """Have the hooks installed at the end of the next optimizer step.

        Returns:
            The monitor.
        """

        def install(num_steps: int) -> None:
            step = prepared.options.start_step
            if start_step is not None:
                step = start_step + num_steps
            elif (common := self._search.common_step(found.last.optimizer)) is not None:
                step = common
            self._events.put(prepared.install(step))

        self._search.install_after(found.last.optimizer, install)
        monitor = self._next("optimizer step")
        assert not isinstance(monitor, Seen)
        return monitor

    def clean_up(self) -> None:
        """Leave no hook of the search behind."""
        self._search.give_up()
        if self._first_look.withdraw():
            return  # nothing was installed
        if not do_at_safe_point(self._search.remove, _REMOVAL_S):
            AtNextBackward(self._search.remove)  # until then they do nothing

    def _next(self, what: str) -> Seen | Monitor:
        try:
            event = self._events.get(timeout=self._left_s)
        except queue.Empty:
            raise self._nothing_came(what) from None
        if isinstance(event, Exception):
            raise event
        return event

    @property
    def _left_s(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def _nothing_came(self, what: str) -> RefusedError:
        return RefusedError(
            f"expected training, one {what} within {self._wait_s:g} s; found none: name the process that trains, or "
            "wait longer"
        )


def _wait_s(request: Mapping[str, Any]) -> float:
    wait_s = request.get("wait_s", WAIT_S)
    if isinstance(wait_s, bool) or not isinstance(wait_s, int | float) or not 0 < wait_s <= threading.TIMEOUT_MAX:
        raise ConfigError(f"expected wait_s in seconds, more than 0; found {wait_s!r}: correct it")
    return float(wait_s)


def _identity() -> Answer:
    try:
        rank = rank_and_world_size()[0]
    except ConfigError:  # RANK is no number; the verb that needs it says so
        rank = 0
    return {"pid": os.getpid(), "rank": rank}


def _facts(monitor: Monitor) -> Answer:
    stats = monitor.stats()
    return {
        "run": monitor.run_url,
        "attempt": stats.attempt,
        "step": stats.step,
        "model": monitor.model_name,
        "layers": list(monitor.layers),
        "every": stats.every,
        "steer": monitor.options.steer,
    }


def _describe(monitors: list[Monitor]) -> str:
    return ", ".join(
        f"{monitor.model_name} in {monitor.run_url}, attempt {monitor.stats().attempt}" for monitor in monitors
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
