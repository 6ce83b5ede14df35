"""One thread runs what is compiled eagerly; no other thread, and nothing afterwards, can tell."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
import torch._dynamo.eval_frame as dynamo

from entropy_hooks.eagerly import run_eagerly

if TYPE_CHECKING:
    from collections.abc import Callable


def counting() -> tuple[Callable[[torch.Tensor], torch.Tensor], list[int]]:
    """A compiled function, and how often its graph has run."""
    torch._dynamo.reset()
    runs: list[int] = []

    def backend(graph: Any, _: Any) -> Callable[..., Any]:
        return lambda *args: (runs.append(1), graph.forward(*args))[1]

    return torch.compile(lambda x: x.sin() + 1, backend=backend), runs


def test_the_thread_that_asks_runs_eagerly_and_another_at_the_same_time_does_not() -> None:
    function, runs = counting()
    function(torch.zeros(3))
    assert len(runs) == 1
    entered, done = threading.Event(), threading.Event()

    def eager() -> None:
        with run_eagerly():
            function(torch.zeros(3))
            entered.set()
            done.wait(30)

    thread = threading.Thread(target=eager)
    thread.start()
    assert entered.wait(30)
    assert len(runs) == 1
    function(torch.zeros(3))
    assert len(runs) == 2
    done.set()
    thread.join()
    assert dynamo._stance.stance == "default"
    assert isinstance(dynamo._stance, dynamo.DynamoStance)


def test_of_many_threads_that_come_and_go_the_last_leaves_it_as_it_was() -> None:
    function, runs = counting()

    def enter_and_leave() -> None:
        for _ in range(300):
            with run_eagerly(), run_eagerly():
                function(torch.zeros(3))

    threads = [threading.Thread(target=enter_and_leave) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not runs
    assert isinstance(dynamo._stance, dynamo.DynamoStance)
    function(torch.zeros(3))
    assert len(runs) == 1


def test_a_stance_that_the_user_sets_meanwhile_and_takes_back_later_holds_for_all_others() -> None:
    function, runs = counting()
    with run_eagerly():
        theirs = torch.compiler.set_stance("eager_on_recompile")
        theirs.__enter__()
    theirs.__exit__(None, None, None)
    function(torch.zeros(3))
    assert len(runs) == 1
    torch.compiler.set_stance("default")


def test_left_in_another_thread_than_entered() -> None:
    function, runs = counting()
    context = run_eagerly()
    context.__enter__()
    thread = threading.Thread(target=context.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
    function(torch.zeros(3))
    assert len(runs) == 1
    assert isinstance(dynamo._stance, dynamo.DynamoStance)
