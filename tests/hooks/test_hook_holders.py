"""What is changed in Python and torch while somebody is observed: made once, undone by the last, whoever comes when."""

from __future__ import annotations

import copy
import copyreg
import gc
import multiprocessing
import pickle
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.jit import _recursive

from entropy_hooks import attach, holders
from entropy_hooks.faults import Faults
from entropy_hooks.guard import Guard
from entropy_hooks.meter import Meter

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

    from entropy_hooks import Monitor


class Holder:
    """Somebody."""


class SeesItself(nn.Sequential):
    """Has a hook of its own that names it."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 8), nn.Linear(8, 8))
        self[0].register_forward_hook(self.seen)

    def seen(self, *args: Any) -> None:
        """A hook of the user's."""


class HandleFirst(nn.Module):
    """Keeps the handle of a hook where it is met before the module that has the hook."""

    def __init__(self) -> None:
        super().__init__()
        first, second = nn.Linear(8, 8), nn.Linear(8, 8)
        handle = second.register_forward_hook(print)
        self.__dict__ = {"handle": handle, **self.__dict__}
        self.first, self.second = first, second


class State:
    """A change that counts how often it is in place."""

    def __init__(self) -> None:
        self.in_place = self.made = 0

    def make(self) -> Callable[[], None]:
        self.in_place += 1
        self.made += 1
        return self.undo

    def undo(self) -> None:
        self.in_place -= 1


@pytest.fixture
def many_switches() -> Generator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def in_threads(task: Callable[[], None], number: int = 4) -> None:
    """Run a task in several threads, and raise what it raises in one of them."""
    raised: list[BaseException] = []

    def guarded() -> None:
        try:
            task()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=guarded) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised:
        raise raised[0]


def observed(model: nn.Module, run: Path) -> Monitor:
    return attach(model, torch.optim.SGD(model.parameters(), lr=0.1), run=run)


def test_the_first_makes_a_change_and_the_last_undoes_it() -> None:
    state, one, other = State(), Holder(), Holder()
    for holder in (one, one, other):
        holders.hold(holder, "a change", state.make)
    holders.release(one)
    holders.release(one)
    assert (state.in_place, state.made) == (1, 1)
    holders.release(other)
    assert state.in_place == 0


def test_who_is_gone_holds_nothing() -> None:
    state, holder = State(), Holder()
    holders.hold(holder, "a change", state.make)
    assert state.in_place == 1
    del holder
    assert state.in_place == 0


@pytest.mark.usefixtures("many_switches")
def test_threads_hold_and_release_one_change() -> None:
    state = State()

    def come_and_go() -> None:
        for _ in range(500):
            holder = Holder()
            holders.hold(holder, "a change", state.make)
            assert state.in_place == 1
            holders.release(holder)

    in_threads(come_and_go)
    assert state.in_place == 0


@pytest.mark.usefixtures("many_switches")
def test_threads_that_observe_leave_python_and_torch_as_they_were() -> None:
    before, create = dict(copyreg.dispatch_table), _recursive.create_script_module

    def come_and_go() -> None:
        model = nn.Linear(2, 2)
        for _ in range(3000):
            guard = Guard(Faults(), Meter())
            guard(print).on(model)
            assert type(model) in copyreg.dispatch_table
            assert _recursive.create_script_module is not create
            guard.release()

    in_threads(come_and_go)
    assert copyreg.dispatch_table == before
    assert _recursive.create_script_module is create


def test_a_child_is_not_kept_out_by_a_thread_of_its_parent(tmp_path: Path) -> None:
    monitor = observed(SeesItself(), tmp_path)
    taken, done = threading.Event(), threading.Event()

    def take() -> None:
        with holders.locked():
            taken.set()
            done.wait(60)

    thread = threading.Thread(target=take)
    thread.start()
    assert taken.wait(60)
    child = multiprocessing.get_context("fork").Process(target=gc.collect)  # its hooks are removed before
    child.start()
    child.join(30)
    done.set()
    thread.join()
    child.kill()
    child.join()
    assert child.exitcode == 0
    monitor.detach()


@pytest.mark.parametrize("detached", [True, False])
def test_a_model_that_was_copied_goes_when_its_user_drops_it(tmp_path: Path, detached: bool) -> None:
    kept = observed(SeesItself(), tmp_path / "kept")
    model = SeesItself()
    monitor = observed(model, tmp_path / "dropped")
    copy.deepcopy(model)  # the best so far
    if detached:
        monitor.detach()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    monitor.detach()
    kept.detach()


def test_a_handle_that_is_met_before_its_module_names_the_same_hooks(run: Path) -> None:
    model = HandleFirst()
    monitor = observed(model, run)
    twin = pickle.loads(pickle.dumps(model))
    monitor.detach()
    assert list(twin.second._forward_hooks.values()) == [print]
    assert twin.handle.hooks_dict_ref() is twin.second._forward_hooks
