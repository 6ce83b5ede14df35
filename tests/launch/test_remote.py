"""Attach, detach and ping from another thread, while the training thread trains."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from entropy_hooks import remote
from entropy_hooks.attach import attach
from entropy_hooks.monitor import live_monitors
from entropy_monitor.store import open_run

from .launching import steps
from .loops import Loop, batch, hook_dictionaries, loss_of, until


def submit(verb: str, **request: Any) -> dict[str, Any]:
    answers: list[dict[str, Any]] = []
    remote.submit({"verb": verb, **request}, answers.append)
    (answer,) = answers
    assert answer["pid"] == os.getpid()
    assert answer["rank"] == 0
    assert "\n" not in answer["message"]
    return answer


def num_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def ours() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("entropy")}


def test_attach_then_detach_leaves_everything_as_it_was(run: Path) -> None:
    with Loop() as loop:
        loop.pause_s = 0.02  # so that no disk is too slow for a frame every 2 steps
        before, descriptors = hook_dictionaries(loop.model, loop.optimizer), num_descriptors()
        attached = submit("attach", run=str(run), options={"every": 2}, wait_s=20)
        assert attached["ok"], attached
        assert attached["step_from"] == "optimizer"
        assert attached["model"] == "Net"
        assert attached["layers"] == ["blocks.0", "blocks.1", "blocks.2"]
        assert (attached["run"], attached["attempt"]) == (str(run), 1)
        assert hook_dictionaries() == {name: value for name, value in before.items() if name in hook_dictionaries()} | {
            "backward": {0: torch.autograd.backward}
        }, "what searched has gone already"
        assert submit("ping")["message"] == f"observed: Net in {run}, attempt 1"
        first = open_run(run).attempts()[0]
        until(lambda: len(steps(run)) > 3, "frames")
        detached = submit("detach", wait_s=20)
        assert detached["ok"], detached
        assert hook_dictionaries(loop.model, loop.optimizer) == before
        assert ours() == set()
        at = loop.steps
        until(lambda: loop.steps > at + 5, "training to go on")
        assert hook_dictionaries(loop.model, loop.optimizer) == before
    assert num_descriptors() <= descriptors + 2, "TensorStore's own"
    assert first["model"] == "Net"
    numbers = [step for _, step in steps(run)]
    assert numbers == list(range(numbers[0], numbers[-1] + 1, 2)), "no sampled step is missing"
    scalars = open_run(run).scalars()
    for step in scalars["step"].values[:-1]:
        assert scalars["loss"].sel(step=step).item() == pytest.approx(loop.losses[step], rel=1e-6)


def test_training_is_bit_identical_through_cycles_of_attach_and_detach(run: Path) -> None:
    with Loop() as loop:
        for _ in range(8):
            assert submit("attach", run=str(run), options={"every": 1}, wait_s=20)["ok"]
            assert submit("detach", wait_s=20)["ok"]
    alone = Loop()
    for _ in range(loop.steps):
        alone.step()
    assert alone.losses == loop.losses
    assert len(open_run(run).attempts()) == 8


def test_a_second_attach_changes_nothing(run: Path) -> None:
    with Loop() as loop, attach(loop.model, loop.optimizer, run=run):
        answer = submit("attach", run=str(run.with_name("other")), wait_s=20)
        assert answer["ok"]
        assert answer["message"] == f"already observed: Net in {run}, attempt 1"
        assert answer["run"] == str(run)
        assert submit("detach", wait_s=20)["ok"]
        again = submit("detach")
        assert (again["ok"], again["message"]) == (True, "not observed: nothing to remove")
    assert not run.with_name("other").exists()


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"verb": "run code"}, "expected a verb among"),
        ({"verb": "attach", "options": {"evry": 3}}, "expected options among"),
        ({"verb": "attach", "options": {"every": 0}}, "expected every >= 1"),
        ({"verb": "attach", "options": "every=3"}, "expected options to be a table"),
        ({"verb": "attach", "wait_s": -1}, "expected wait_s"),
        ({"verb": "attach", "run": 3}, "expected run to be a path"),
        ({"verb": "detach", "wait_s": "long"}, None),
    ],
)
def test_wrong_requests_are_answered_and_touch_nothing(request_: dict[str, Any], words: str | None) -> None:
    before = hook_dictionaries()
    answer = submit(**request_)
    assert answer["ok"] is (words is None)
    assert (words or "not observed") in answer["message"]
    assert hook_dictionaries() == before


def test_unknown_layers_are_refused_once_the_model_is_known(run: Path) -> None:
    with Loop() as loop:
        before = hook_dictionaries(loop.model, loop.optimizer)
        answer = submit("attach", run=str(run), options={"layers": ["nowhere.*"]}, wait_s=20)
        assert not answer["ok"]
        assert "expected layers among" in answer["message"]
        assert hook_dictionaries(loop.model, loop.optimizer) == before
    assert not run.exists()


def test_a_run_that_cannot_be_written_is_an_answer(run: Path) -> None:
    run.write_text("a file")
    with Loop() as loop:
        before = hook_dictionaries(loop.model, loop.optimizer)
        answer = submit("attach", run=str(run), wait_s=20)
        assert not answer["ok"]
        assert "found a file" in answer["message"]
        assert hook_dictionaries(loop.model, loop.optimizer) == before


def test_without_training_everything_is_taken_back(run: Path) -> None:
    before = hook_dictionaries()
    answer = submit("attach", run=str(run), wait_s=0.2)
    assert not answer["ok"]
    assert "one backward pass within 0.2 s" in answer["message"]
    assert hook_dictionaries() == before
    assert not run.exists()


def test_a_step_that_does_not_come_is_an_answer(run: Path) -> None:
    """A backward pass was seen, and then an evaluation took its time."""
    loop = Loop()
    before = hook_dictionaries(loop.model, loop.optimizer)
    answers: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: answers.append(submit("attach", run=str(run), wait_s=1.0)))
    thread.start()
    until(lambda: torch.autograd.backward is not before["backward"][0], "the request")
    loss_of(loop.model, batch()).backward()
    thread.join()
    assert "one optimizer step within 1 s" in answers[0]["message"]
    assert hook_dictionaries(loop.model, loop.optimizer) == before
    assert not run.exists()


def test_an_idle_job_is_left_at_once(run: Path) -> None:
    with Loop() as loop:
        before = hook_dictionaries(loop.model, loop.optimizer)
        assert submit("attach", run=str(run), wait_s=20)["ok"]
        loop.idle()
        time.sleep(0.1)
        assert submit("detach", wait_s=0.3)["ok"]
        assert hook_dictionaries(loop.model, loop.optimizer) == before
        assert live_monitors() == []


def test_the_users_global_hooks_are_never_disturbed(run: Path) -> None:
    """Torch iterates them lazily: adding one of ours from another thread would raise out of the user's step."""
    seen: list[int] = []
    slow = [
        register_optimizer_step_pre_hook(lambda *_: time.sleep(0.002)),
        register_optimizer_step_post_hook(lambda *_: (time.sleep(0.002), seen.append(1))[-1]),
    ]
    try:
        with Loop() as loop:
            loop.pause_s = 0
            for _ in range(10):
                assert submit("attach", run=str(run), options={"every": 1}, wait_s=20)["ok"]
                assert submit("detach", wait_s=20)["ok"]
        assert len(seen) == loop.steps
    finally:
        for handle in slow:
            handle.remove()


def test_an_optimizer_without_a_count_begins_at_zero(run: Path) -> None:
    with Loop(optimizer=torch.optim.SGD) as loop:
        answer = submit("attach", run=str(run), options={"every": 1}, wait_s=20)
        assert (answer["ok"], answer["step_from"]) == (True, "unknown")
        until(lambda: len(steps(run)) > 2, "frames")
        submit("detach", wait_s=20)
        assert loop.steps > 5
    assert steps(run)[0] == (1, 0)


def test_switched_off_is_said(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENTROPY_MONITOR_MODE", "disabled")
    answer = submit("attach", run=str(run), wait_s=1)
    assert not answer["ok"]
    assert "ENTROPY_MONITOR_MODE" in answer["message"]
