"""The search: from the first optimizer step seen, over one iteration, to the step boundary at which hooks go in."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from torch.optim.optimizer import register_optimizer_step_post_hook

from entropy_hooks.discovery.calls import RootCalls, anything_compiled
from entropy_hooks.discovery.choice import waits_for_optimizer
from entropy_hooks.discovery.own_count import OwnCount
from entropy_hooks.discovery.seen import Seen, Stepped
from entropy_hooks.ranks import num_collectives
from entropy_hooks.untraced import untraced

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.optim import Optimizer
    from torch.utils.hooks import RemovableHandle

_PATIENCE_STEPS = 10
"""Steps after which an optimizer that has not stepped is no longer waited for."""


class Search:
    """One global hook behind every optimizer's step, and for one iteration a pair of global module hooks.

    The first optimizer to step twice closes a round of the loop; what was seen goes to `on_seen`, on the training
    thread. Whoever then knows what to install says so with `install_after`, from whatever thread.
    """

    def __init__(self, on_seen: Callable[[Seen], None], on_error: Callable[[Exception], None]) -> None:
        self._on_seen, self._on_error = on_seen, on_error
        self._handle: RemovableHandle | None = None
        self._thread: int | None = None
        self._counts: dict[int, tuple[Optimizer, int]] = {}
        self._calls: RootCalls | None = None
        self._collectives: dict[int, tuple[int | None, int | None]] = {}
        """The job's count of collectives behind the newest two steps of each optimizer."""
        self._install: tuple[Optimizer, Callable[[int], None]] | None = None
        self._over = False
        """Nothing more will be seen or installed."""

    def begin(self) -> None:
        """Install the hook: on the training thread outside `Optimizer.step`, or before anything trains."""
        self._handle = register_optimizer_step_post_hook(untraced(self.after_step))

    def install_after(self, optimizer: Optimizer, install: Callable[[int], None]) -> None:
        """At the end of the optimizer's step, the one under way included, call `install` once on the training thread.

        Args:
            optimizer: the one whose step ends an iteration.
            install: is given how many of its steps have been seen.
        """
        self._install = (optimizer, install)

    def give_up(self) -> None:
        """From now on the hooks do nothing, and nothing that was seen is kept alive; from any thread."""
        self._over = True
        self._install, self._counts = None, {}
        if self._calls is not None:
            self._calls.forget()

    def common_step(self, optimizer: Optimizer) -> int | None:
        """A step number that all ranks of a job give to this boundary, without asking one another.

        Ranks that train together begin the same collectives in each iteration: their count, divided by those of one
        iteration, grows by one a step. It is not the number of steps that the job has made.

        Returns:
            The number; None where there are no collectives to count by.
        """
        before, now = self._collectives.get(id(optimizer), (None, None))
        if before is None or now is None or now <= before:
            return None
        return now // (now - before)

    def remove(self) -> None:
        """Remove every hook; never from within an optimizer's step: torch iterates these dictionaries lazily there."""
        self.give_up()
        if self._handle is not None:
            self._handle.remove()
        if self._calls is not None:
            self._calls.stop_listening()

    def after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """The hook; who has one installed already calls this from it instead of `begin`."""
        if self._over:
            return
        try:
            self._count(optimizer)
        except Exception as error:  # handed to who searches; the training job never sees it
            self._over = True
            self._on_error(error)

    def _count(self, optimizer: Optimizer) -> None:
        if self._thread is None:
            self._thread = threading.get_ident()
        elif self._thread != threading.get_ident():
            return  # another loop, in another thread: one is observed
        num_steps = self._counts.get(id(optimizer), (optimizer, 0))[1] + 1
        self._counts[id(optimizer)] = (optimizer, num_steps)
        if self._calls is None:
            self._calls = RootCalls()
            if not anything_compiled():
                self._calls.listen()
        else:
            self._calls.end_iteration()
            if self._on_seen is not _done and num_steps > 1:
                self._look(self._calls)
        self._collectives[id(optimizer)] = (self._collectives.get(id(optimizer), (None, None))[1], num_collectives())
        if (planned := self._install) is not None and planned[0] is optimizer:
            self._over = True
            planned[1](num_steps)

    def _look(self, calls: RootCalls) -> None:
        stepped = tuple(Stepped(optimizer, num, OwnCount(optimizer)) for optimizer, num in self._counts.values())
        seen = Seen(stepped, calls.roots)
        if waits_for_optimizer(seen) and sum(one.num_steps for one in stepped) < _PATIENCE_STEPS:
            return
        calls.stop_listening()  # these are not being iterated here
        on_seen, self._on_seen = self._on_seen, _done
        on_seen(seen)


def _done(seen: Seen) -> None:
    """What was seen has been told."""
