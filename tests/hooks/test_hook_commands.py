"""What is answered but not applied: expired, malformed, unsigned, badly signed, copied; and to an observer."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import pytest

from entropy_hooks.phase import DEFAULT_WEIGHT
from entropy_monitor.store import open_run, read_heartbeat, read_status
from entropy_monitor.store.layout import command_key

from .training import Job, acknowledgement, apply_now, assert_same_training, command, observe, tiny_gpt, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from entropy_monitor.types import Acknowledgement

KEY = "a shared secret"


def write_raw(run: Path, number: int, value: bytes) -> None:
    assert open_run(run).objects.create(command_key(number), value)


def valid_fields(number: int = 1) -> dict[str, object]:
    return {
        "command_id": f"{number:08d}",
        "phase": "compress",
        "weight": 0.5,
        "reason": "a test",
        "issued_by": "test",
        "issued_at": time.time(),
        "expires_after_s": 300.0,
        "signature": None,
    }


def answered(run: Path, number: int = 1) -> Acknowledgement:
    return wait_until(lambda: acknowledgement(run, number), f"the answer to command {number}")


def check_not_applied(
    run: Path, send: Callable[[], object], status: str, detail: str, *, steer: bool = True, faults: dict[str, int]
) -> None:
    """Send a command to a trainer: it is answered, changes nothing, and the trainer goes on answering."""
    twin = Job(lambda: tiny_gpt(num_layers=2)).run(6)
    job = Job(lambda: tiny_gpt(num_layers=2))
    with observe(job, run=run, steer=steer) as monitor:
        job.run(2)
        send()
        ack = answered(run)
        assert (ack.status, ack.rank, ack.step) == (status, 0, 2)
        assert detail in ack.detail
        job.run(4)
        assert monitor.phase == "memorize"
        assert monitor.stats().faults == faults
    assert_same_training(job, twin)


def test_expired(run: Path) -> None:
    check_not_applied(
        run, lambda: command(run, "compress", now=time.time() - 301), "expired", "after it expired", faults={}
    )


def test_expired_while_it_waited_for_a_step_boundary(run: Path) -> None:
    job = Job()
    with observe(job, run=run, steer=True) as monitor:
        job.step()
        command(run, "compress", weight=0.5, expires_after_s=0.2)
        session = monitor._session
        assert session is not None
        wait_until(lambda: len(session._pulse.delivery._pending), "the command")
        wait_until(lambda: time.time() > session._pulse.delivery._pending[0].command.issued_at + 0.2, "its expiry")
        job.step()
        assert monitor.phase == "memorize"
    ack = answered(run)
    assert (ack.status, ack.step) == ("expired", 2)


@pytest.mark.parametrize(
    "change",
    [
        {"phase": "sideways"},
        {"weight": -1.0},
        {"weight": "0.5"},
        {"reason": ""},
        {"issued_at": None},
        {"issued_at": "12.5"},
        {"expires_after_s": 0},
        {"signature": 5},
        {"surplus": 1},
    ],
    ids=lambda change: "-".join(f"{name}={value}" for name, value in change.items()),
)
def test_malformed_fields(run: Path, change: dict[str, object]) -> None:
    check_not_applied(
        run,
        lambda: write_raw(run, 1, json.dumps({**valid_fields(), **change}).encode()),
        "rejected",
        "",
        faults={"malformed_command": 1},
    )


@pytest.mark.parametrize("value", [b"", b"{", b"[1, 2]", b"null", b"\xff\xfe", b'{"phase": "compress"}'])
def test_malformed_bytes(run: Path, value: bytes) -> None:
    check_not_applied(
        run, lambda: write_raw(run, 1, value), "rejected", "malformed command", faults={"malformed_command": 1}
    )


def test_the_same_fields_unchanged_are_applied(run: Path) -> None:
    """The negative tests above fail for what was changed, not for how the file was written."""
    job = Job()
    with observe(job, run=run, steer=True) as monitor:
        write_raw(run, 1, json.dumps(valid_fields()).encode())
        session = monitor._session
        assert session is not None
        wait_until(lambda: len(session._pulse.delivery._pending), "the command")
        job.step()
        assert monitor.phase == "compress"
    assert answered(run).status == "applied"


def test_unsigned(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENTROPY_MONITOR_KEY", KEY)
    check_not_applied(run, lambda: command(run, "compress"), "rejected", "unsigned", faults={"rejected_command": 1})


def test_badly_signed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENTROPY_MONITOR_KEY", KEY)
    check_not_applied(
        run, lambda: command(run, "compress", key="guess"), "rejected", "bad signature", faults={"rejected_command": 1}
    )


def test_signed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENTROPY_MONITOR_KEY", KEY)
    job = Job()
    with observe(job, run=run, steer=True) as monitor:
        apply_now(job, run, monitor, "compress", key=KEY)
        assert monitor.phase == "compress"


def test_a_copied_command(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signed command of the same run, copied to a later number."""
    monkeypatch.setenv("ENTROPY_MONITOR_KEY", KEY)
    job = Job()
    with observe(job, run=run, steer=True) as monitor:
        apply_now(job, run, monitor, "compress", key=KEY)
        apply_now(job, run, monitor, "memorize", key=KEY)
        objects = open_run(run).objects
        value = objects.get(command_key(1))
        assert value is not None
        write_raw(run, 3, value)
        ack = answered(run, 3)
        assert ack.status == "rejected"
        assert "copied" in ack.detail
        job.step()
        assert monitor.phase == "memorize"


def test_a_command_of_another_run(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENTROPY_MONITOR_KEY", KEY)
    job = Job()
    with observe(job, run=tmp_path / "other"):
        command(tmp_path / "other", "compress", key=KEY)
    value = open_run(tmp_path / "other").objects.get(command_key(1))
    assert value is not None
    check_not_applied(
        run, lambda: write_raw(run, 1, value), "rejected", "bad signature", faults={"rejected_command": 1}
    )


def test_an_observing_trainer_rejects(run: Path) -> None:
    check_not_applied(run, lambda: command(run, "compress"), "rejected", "observe-only", steer=False, faults={})


def test_an_unreadable_command_does_not_stop_the_heartbeat(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file where the commands' directory should be: nobody can read them, and the trainer must not look dead."""
    job = Job()
    with observe(job, run=run, steer=True) as monitor:
        objects = open_run(run).objects
        (run / "control").write_text("in the way")
        wait_until(lambda: monitor.stats().faults.get("commands_unreadable"), "the fault")
        beats = wait_until(lambda: read_heartbeat(objects, "r00000"), "a heartbeat")
        wait_until(
            lambda: (read_heartbeat(objects, "r00000") or {})["written_at"] >= beats["written_at"] + 1.5,
            "two more beats",
        )
        assert (read_heartbeat(objects, "r00000") or {})["faults"]["commands_unreadable"] >= 1
        (run / "control").unlink()
        apply_now(job, run, monitor, "compress")
        assert monitor.phase == "compress"
    assert len([record for record in caplog.records if "commands_unreadable" in record.getMessage()]) == 1


def test_a_deleted_command_does_not_block_those_behind_it(run: Path) -> None:
    job = Job()
    with observe(job, run=run, steer=True) as monitor:
        write_raw(run, 3, json.dumps(valid_fields(3)).encode())
        session = monitor._session
        assert session is not None
        wait_until(lambda: len(session._pulse.delivery._pending), "the command behind the gap")
        job.step()
        assert monitor.phase == "compress"
    assert answered(run, 3).status == "applied"
    assert acknowledgement(run, 1) is None


def test_pending_commands_are_seen_as_such(run: Path) -> None:
    job = Job()
    with observe(job, run=run, steer=True):
        command(run, "compress")
        command(run, "memorize")
        assert read_status(open_run(run)).commands_pending == 2, "no step has ended yet"
        wait_until(lambda: job.step() or read_status(open_run(run)).commands_pending == 0, "both answers")


def test_a_command_without_a_weight_means_the_default_and_not_the_last_one(run: Path) -> None:
    job = Job()
    with observe(job, run=run, steer=True) as monitor:
        apply_now(job, run, monitor, "compress", weight=0.5)
        assert monitor.stats().weight == 0.5
        apply_now(job, run, monitor, "compress")
        assert monitor.stats().weight == DEFAULT_WEIGHT
