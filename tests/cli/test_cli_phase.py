"""`status` and `phase` against a real trainer: acknowledged, refused, expired, unanswered, ended."""

from __future__ import annotations

import json
import re
import time
from typing import TYPE_CHECKING

import pytest

from entropy_monitor.store import CommandRequest, issue_command, open_run

from .processes import Trainer, entropy_monitor, one_line, status_of, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KEY = "a shared secret"


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    """A live, steerable trainer with a key."""
    with Trainer(tmp_path_factory.mktemp("steered"), ENTROPY_MONITOR_KEY=KEY) as running:
        yield running


def test_phase_prints_the_step_of_the_acknowledgement(trainer: Trainer) -> None:
    before = status_of(trainer.run)
    found = entropy_monitor(
        "phase", trainer.run, "compress", "--reason", "a test", "--weight", "0.2", ENTROPY_MONITOR_KEY=KEY
    )
    assert found.returncode == 0, found.stderr
    match = re.fullmatch(r"rank 0: applied at step (\d+) \(compress\)\n", found.stdout)
    assert match
    assert int(match[1]) > before["step"]
    after = wait_until(
        lambda: (now := status_of(trainer.run))["phase"] == "compress" and now, "the phase in the heartbeat"
    )
    assert (after["state"], after["weight"], after["commands_pending"]) == ("live", 0.2, 0)
    shown = entropy_monitor("status", trainer.run)
    assert "compress, weight 0.2, steered" in shown.stdout

    back = entropy_monitor("phase", trainer.run, "memorize", "--reason", "back", "--json", ENTROPY_MONITOR_KEY=KEY)
    assert back.returncode == 0
    answer = json.loads(back.stdout)
    assert answer["command"]["reason"] == "back"
    (ack,) = answer["acknowledgements"]
    assert (ack["status"], ack["rank"]) == ("applied", 0)
    assert ack["step"] > int(match[1])


def test_unsigned_is_refused(trainer: Trainer) -> None:
    found = entropy_monitor("phase", trainer.run, "compress", "--reason", "a test")
    assert found.returncode == 1
    assert "rank 0: rejected" in found.stdout
    assert "ENTROPY_MONITOR_KEY" in found.stdout
    assert wait_until(lambda: status_of(trainer.run)["faults"], "the fault in status") == {"rejected_command": 1}


def test_a_signed_command_that_comes_too_late_is_expired(trainer: Trainer) -> None:
    """`phase` itself never sends one; a queue in between may."""
    run = open_run(trainer.run)
    request = CommandRequest(phase="compress", reason="late", issued_by="test", expires_after_s=1)
    late = issue_command(run.objects, run.run_id, request, key=KEY, now=time.time() - 5)
    acks = wait_until(
        lambda: [ack for ack in run.acknowledgements() if ack.command_id == late.command_id], "the answer"
    )
    assert [ack.status for ack in acks] == ["expired"]
    assert status_of(trainer.run)["phase"] == "memorize"


def test_life_of_an_observing_trainer(tmp_path: Path) -> None:
    """Refused while it observes, unanswered once it is killed, and told at once when it has ended."""
    with Trainer(tmp_path, steer=False) as running:
        found = entropy_monitor("phase", running.run, "compress", "--reason", "a test")
        assert found.returncode == 1
        assert "rank 0: rejected" in found.stdout
        assert "observe-only" in found.stdout
        steps = running.stop()
    ended = status_of(running.run)
    assert (ended["state"], ended["step"], ended["faults"]) == ("ended", steps, {})
    assert ended["frames_committed"] + ended["frames_dropped"] == (steps + 9) // 10

    began = time.monotonic()
    found = entropy_monitor("phase", running.run, "compress", "--reason", "a test")
    assert time.monotonic() - began < 20, "it must not wait its 30 s for a run that has ended"
    assert found.returncode == 1
    line = one_line(found.stderr)
    assert "unacknowledged" in line
    assert "has ended" in line
    assert status_of(running.run)["commands_pending"] == 1


def test_a_killed_trainer_does_not_answer(tmp_path: Path) -> None:
    running = Trainer(tmp_path)
    running.kill()
    found = entropy_monitor("phase", running.run, "compress", "--reason", "a test", "--wait-s", "0.5")
    assert found.returncode == 1
    assert "did not answer within" in one_line(found.stderr)
    assert found.stdout == ""
