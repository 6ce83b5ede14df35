"""Promise 2: whatever fails, training ends with the same losses; the fault is counted, logged once, and shown."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch

from entropy_hooks import attach
from entropy_hooks.frame import FrameAssembler
from entropy_hooks.observer import Observer
from entropy_monitor.errors import StoreError
from entropy_monitor.store import FrameWriter, open_run, read_status

from .scripts import finish, start
from .training import Job, apply_now, assert_same_training, command, frames, observe, queued, tiny_gpt, wait_until

if TYPE_CHECKING:
    from pathlib import Path


STEPS = 12


@pytest.fixture(scope="module")
def unobserved() -> Job:
    torch.set_num_threads(1)
    return Job().run(STEPS)


def times_logged(caplog: pytest.LogCaptureFixture, kind: str) -> int:
    return sum(record.getMessage().startswith(f"{kind}: ") for record in caplog.records)


def shown(run: Path, kind: str) -> int:
    return read_status(open_run(run)).faults.get(kind, 0)


def has_beaten(run: Path) -> None:
    """The first heartbeat is written: for the next second nothing is put into the directory behind our back."""
    wait_until(lambda: (run / "heartbeat" / "r00000.json").exists(), "the first heartbeat")


def wait_until_shown(run: Path, kind: str) -> None:
    wait_until(lambda: shown(run, kind) >= 1, f"{kind} in status")


# ---- the store -------------------------------------------------------------------------------------------------------


def test_a_disk_that_is_full(run: Path, unobserved: Job) -> None:
    """No file may grow beyond 20 kB: arrays cannot be written, heartbeats can. Then there is room again."""
    script = """
    import resource
    from entropy_monitor.store import open_run, read_status
    run = Path(sys.argv[1])
    job = Job()
    monitor = observe(job, run=run, every=1)
    job.run(2)
    wait_until(lambda: monitor.stats().frames_committed == 2, "two frames")
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    job.run(7)
    wait_until(lambda: read_status(open_run(run)).faults.get("write_failed"), "the fault in status")
    during = read_status(open_run(run))
    stats = monitor.stats()
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    job.run(3)
    monitor.detach()
    after = monitor.stats()
    report(losses=job.losses, state=during.state, dropped=stats.frames_dropped, faults=stats.faults,
           committed=after.frames_committed, dropped_at_end=after.frames_dropped)
    """
    found, err = finish(start(script, run))
    assert found["losses"] == unobserved.losses
    assert found["state"] == "live"
    assert found["dropped"] == found["dropped_at_end"] == 7
    assert found["faults"]["write_failed"] >= 7
    assert found["committed"] == 5
    assert err.count("write_failed: ") == 1
    assert [frame.step for frame in frames(run)] == [0, 1, 9, 10, 11]


def test_a_store_that_becomes_unusable_in_the_middle(
    run: Path, tmp_path: Path, unobserved: Job, caplog: pytest.LogCaptureFixture
) -> None:
    """The run directory is replaced by a file, and comes back."""
    job = Job()
    with observe(job, run=run, every=1) as monitor:
        job.run(2)
        wait_until(lambda: monitor.stats().frames_committed == 2, "two frames")
        has_beaten(run)
        shutil.move(run, tmp_path / "elsewhere")
        run.write_text("in the way")
        job.run(4)
        wait_until(lambda: monitor.stats().faults.get("heartbeat_failed"), "a missed heartbeat")
        faults = monitor.stats().faults
        assert faults["write_failed"] >= 4
        run.unlink()
        shutil.move(tmp_path / "elsewhere", run)
        wait_until_shown(run, "write_failed")
        assert shown(run, "heartbeat_failed") >= 1
        job.run(STEPS - 6)
    assert_same_training(job, unobserved)
    assert monitor.stats().frames_dropped == 4
    assert [frame.step for frame in frames(run)] == [0, 1, *range(6, STEPS)]
    assert read_status(open_run(run)).state == "ended"
    for kind in ("write_failed", "heartbeat_failed"):
        assert times_logged(caplog, kind) == 1


def test_a_store_that_never_comes_back(run: Path, unobserved: Job, caplog: pytest.LogCaptureFixture) -> None:
    job = Job()
    with observe(job, run=run, every=1) as monitor:
        has_beaten(run)
        shutil.rmtree(run)
        run.write_text("in the way")
        job.run(STEPS)
    assert_same_training(job, unobserved)
    stats = monitor.stats()
    assert stats.frames_committed + stats.frames_dropped == STEPS
    assert stats.frames_dropped >= STEPS - 1
    assert stats.faults["write_failed"] >= 1
    assert times_logged(caplog, "write_failed") == 1


def test_a_file_where_the_run_should_be(run: Path, unobserved: Job, caplog: pytest.LogCaptureFixture) -> None:
    run.write_text("somebody's notes")
    job = Job()
    with observe(job, run=run, every=1) as monitor:
        assert not monitor.enabled
        assert not job.model._forward_hooks
        job.run(STEPS)
    assert_same_training(job, unobserved)
    assert monitor.stats().faults == {"store_unavailable": 1}
    assert monitor.stats().frames_committed == 0
    assert times_logged(caplog, "store_unavailable") == 1
    assert run.read_text() == "somebody's notes"


def may_mount() -> bool:
    """Whether this machine lets us mount a filesystem of our own, in a namespace of our own."""
    if shutil.which("unshare") is None or shutil.which("mount") is None:
        return False
    return (
        subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode == 0
    )


@pytest.mark.parametrize("at_attach", [True, False], ids=["at attach", "in the middle"])
def test_a_read_only_store(run: Path, unobserved: Job, at_attach: bool) -> None:
    """A mount that turns read-only; where nothing may be mounted, a file in place of a directory."""
    script = """
    import subprocess
    run, at_attach, may_mount = Path(sys.argv[1]), sys.argv[2] == "True", sys.argv[3] == "True"
    run.mkdir()
    if may_mount:
        subprocess.run(["mount", "-t", "tmpfs", "none", str(run)], check=True)
    def make_read_only():
        if may_mount:
            subprocess.run(["mount", "-o", "remount,ro", str(run)], check=True)
        elif at_attach:
            (run / "store.zarr").write_text("in the way")
        else:
            (run / "store.zarr").rename(run / "gone")
            (run / "store.zarr").write_text("in the way")
    job = Job()
    if at_attach:
        make_read_only()
    monitor = observe(job, run=run, every=1)
    enabled = monitor.enabled
    job.run(4)
    if not at_attach:
        wait_until(lambda: monitor.stats().frames_committed == 4, "four frames")
        make_read_only()
    job.run(8)
    monitor.detach()
    report(losses=job.losses, enabled=enabled, faults=monitor.stats().faults, dropped=monitor.stats().frames_dropped)
    """
    mount = may_mount()
    found, err = finish(start(script, run, at_attach, mount, prefix=("unshare", "-m") if mount else ()))
    assert found["losses"] == unobserved.losses
    if at_attach:
        assert not found["enabled"]
        assert found["faults"] == {"store_unavailable": 1}
    else:
        assert found["dropped"] == 8
        assert found["faults"]["write_failed"] >= 1
        if mount:
            assert found["faults"]["heartbeat_failed"] >= 1
    for kind in found["faults"]:
        assert err.count(f"{kind}: ") == 1


# ---- the writer thread -----------------------------------------------------------------------------------------------


def test_an_exception_in_the_writer_thread(
    run: Path, unobserved: Job, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> int:
        raise RuntimeError("a defect of the writer")

    job = Job()
    with observe(job, run=run, every=1) as monitor:
        with monkeypatch.context() as patched:
            patched.setattr(FrameWriter, "write", broken)
            job.run(6)
        wait_until_shown(run, "write_failed")
        job.run(STEPS - 6)
    assert_same_training(job, unobserved)
    assert monitor.stats().faults == {"write_failed": 6}
    assert (monitor.stats().frames_dropped, monitor.stats().frames_committed) == (6, STEPS - 6)
    assert times_logged(caplog, "write_failed") == 1


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_a_writer_thread_that_dies(
    run: Path,
    unobserved: Job,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
) -> None:
    def fatal(*_: object) -> int:
        raise error("the end")

    job = Job()
    with observe(job, run=run, every=1) as monitor:
        job.run(2)
        wait_until(lambda: monitor.stats().frames_committed == 2, "two frames")
        monkeypatch.setattr(FrameWriter, "write", fatal)
        job.step()
        session = monitor._session
        assert session is not None
        wait_until(lambda: not session.writer.alive, "the end of the thread")
        job.run(STEPS - 3)
        wait_until_shown(run, "writer_dead")
        assert read_status(open_run(run)).state == "live"
    assert_same_training(job, unobserved)
    stats = monitor.stats()
    assert stats.faults["writer_dead"] >= STEPS - 2
    assert set(stats.faults) == {"writer_dead"}
    assert (stats.frames_committed, stats.frames_dropped) == (2, STEPS - 2)
    assert times_logged(caplog, "writer_dead") == 1


def test_a_writer_that_dies_with_the_last_frame_is_still_a_fault(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fatal(*_: object) -> int:
        raise SystemExit

    monkeypatch.setattr(FrameWriter, "write", fatal)
    job = Job()
    with observe(job, run=run, every=1) as monitor:
        job.step()
    assert monitor.stats().faults == {"writer_dead": 1}
    assert monitor.stats().frames_dropped == 1
    assert shown(run, "writer_dead") == 1


def test_a_slow_store_fills_the_ring(
    run: Path, unobserved: Job, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, write = threading.Event(), FrameWriter.write

    def slow(self: FrameWriter, *arguments: Any) -> int:
        assert go.wait(30)
        return write(self, *arguments)

    monkeypatch.setattr(FrameWriter, "write", slow)
    job = Job()
    with attach(job.model, job.optimizer, run=run, every=1) as monitor:
        job.run(STEPS)
        assert monitor.stats().frames_dropped == STEPS - 4
        wait_until_shown(run, "ring_full")
        go.set()
    assert_same_training(job, unobserved)
    assert monitor.stats().faults == {"ring_full": STEPS - 4}
    assert times_logged(caplog, "ring_full") == 1
    assert [frame.step for frame in frames(run)] == [0, 1, 2, 3]
    # The frames of the ring are whole, although later steps came while they waited.
    assert [frame.scalars["loss"] for frame in frames(run)] == job.losses[:4]


def test_a_store_that_hangs_at_the_end(
    run: Path, unobserved: Job, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    monkeypatch.setattr(FrameWriter, "write", lambda *_: go.wait(30))
    job = Job()
    monitor = attach(job.model, job.optimizer, run=run, every=1)
    job.run(STEPS)
    monitor.close(0.2)  # as at the interpreter's exit, with less patience
    assert_same_training(job, unobserved)
    assert monitor.stats().frames_dropped == STEPS
    assert monitor.stats().faults == {"ring_full": STEPS - 4, "flush_timeout": 1}
    assert times_logged(caplog, "flush_timeout") == 1
    assert shown(run, "flush_timeout") == 1
    go.set()
    wait_until(lambda: not entropy_threads(), "the end of the writer thread")


def entropy_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("entropy-")]


def test_no_watcher_for_so_long_that_frames_are_removed_unmeasured(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    def small() -> torch.nn.Module:
        return tiny_gpt(num_layers=2, dropout=0.0)

    steps = 140
    job, twin = Job(small, batch=1, tokens=8), Job(small, batch=1, tokens=8).run(steps)
    options = {"gradients": False, "patches": 2, "keep": 1}
    with observe(job, run=run, every=1, **options) as monitor:
        job.run(steps)
        wait_until_shown(run, "frames_removed_unmeasured")
    assert_same_training(job, twin)
    stats = monitor.stats()
    assert stats.faults == {"frames_removed_unmeasured": 128}
    assert stats.frames_removed_unmeasured == 128
    assert stats.frames_committed == steps
    assert times_logged(caplog, "frames_removed_unmeasured") == 1
    assert read_status(open_run(run)).frames_removed_unmeasured == 128
    assert [frame.step for frame in frames(run)] == list(range(128, steps))


# ---- what the model does ---------------------------------------------------------------------------------------------


def test_activations_that_are_not_finite(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    def poisoned(job: Job) -> None:
        job.run(2)
        with torch.no_grad():
            job.model.get_parameter("blocks.1.mlp.2.weight").fill_(float("nan"))
        job.run(3)

    job, twin = Job(), Job()
    with observe(job, run=run, every=1) as monitor:
        torch.manual_seed(2)
        poisoned(job)
        wait_until_shown(run, "non_finite")
    torch.manual_seed(2)
    poisoned(twin)
    assert list(map(repr, job.losses)) == list(map(repr, twin.losses))
    assert monitor.stats().faults == {"non_finite": 3}
    assert times_logged(caplog, "non_finite") == 1
    found = frames(run)
    assert [frame.step for frame in found] == [0, 1, 2, 3, 4]
    assert torch.from_numpy(found[1].activations).isfinite().all()
    assert torch.from_numpy(found[2].activations).isfinite().all(2).all(1).tolist() == [True, False, False]


def test_a_batch_shorter_than_a_patch(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    def short_then_long(job: Job) -> None:
        for tokens in (32, 7, 1, 8):
            job.shape = (4, tokens)
            job.step()

    job, twin = Job(), Job()
    with observe(job, run=run, every=1) as monitor:
        torch.manual_seed(2)
        short_then_long(job)
        wait_until_shown(run, "batch_too_short")
    torch.manual_seed(2)
    short_then_long(twin)
    assert_same_training(job, twin)
    assert monitor.stats().faults == {"batch_too_short": 2}
    assert times_logged(caplog, "batch_too_short") == 1
    assert "give longer ones (the probe's, too), or attach(token_dim=...)" in caplog.text
    assert [frame.step for frame in frames(run)] == [0, 3]
    assert open_run(run).scalars()["step"].values.tolist() == [0, 1, 2, 3]


def test_a_model_that_does_not_run_is_not_observed(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The optimizer steps, but another model's gradients are behind it."""
    job = Job()
    with attach(tiny_gpt(), job.optimizer, run=run, every=1) as monitor:
        job.run(2)
    assert monitor.stats().faults == {"not_observed": 2}
    assert times_logged(caplog, "not_observed") == 1
    assert frames(run) == []


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (Observer, "_sample_activation"),
        (Observer, "_see_tokens"),
        (Observer, "_hook_gradient"),
        (FrameAssembler, "assemble"),
    ],
)
def test_a_hook_that_raises(
    run: Path,
    unobserved: Job,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
    name: str,
) -> None:
    """Our own defect: the steps are still counted, and observation goes on as soon as it can."""

    def broken(*_: object, **__: object) -> None:
        raise LookupError("a defect of ours")

    job = Job()
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, broken)
        monitor = observe(job, run=run, every=1)
        job.run(8)
        wait_until_shown(run, "hook_error")
        assert monitor.stats().step == 8
    if name == "_see_tokens":  # it was bound when it was hooked
        monitor.detach()
        assert monitor.stats().frames_committed == 8
        return
    job.run(STEPS - 8)
    monitor.detach()
    assert_same_training(job, unobserved)
    assert monitor.stats().faults["hook_error"] >= 8
    assert times_logged(caplog, "hook_error") == 1
    assert {frame.step for frame in frames(run)} >= set(range(8, STEPS))
    assert open_run(run).scalars()["step"].values.tolist() == list(range(STEPS))
    assert open_run(run).scalars()["loss"].values.tolist() == job.losses


def test_a_loss_that_cannot_be_read(
    run: Path, unobserved: Job, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise LookupError("a defect of ours")

    monkeypatch.setattr("entropy_hooks.passes.read_loss", broken)
    job = Job()
    with observe(job, run=run, every=1) as monitor:
        job.run(STEPS)
    assert_same_training(job, unobserved)
    assert monitor.stats().faults == {"hook_error": STEPS}
    assert times_logged(caplog, "hook_error") == 1
    assert len(frames(run)) == STEPS
    assert all(frame.scalars["loss"] != frame.scalars["loss"] for frame in frames(run))


# ---- commands --------------------------------------------------------------------------------------------------------


def test_an_answer_that_cannot_be_stored_means_not_applied(
    run: Path, unobserved: Job, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> bool:
        raise StoreError("disk full")

    monkeypatch.setattr("entropy_hooks.pulse.acknowledge", full)
    job = Job()
    with observe(job, run=run, every=1, steer=True) as monitor:
        command(run, "compress", weight=0.5)
        wait_until(lambda: queued(monitor), "the command")
        job.run(STEPS)
        assert monitor.phase == "memorize"
        wait_until_shown(run, "acknowledgement_failed")
    assert_same_training(job, unobserved)
    assert monitor.stats().faults == {"acknowledgement_failed": 1}
    assert times_logged(caplog, "acknowledgement_failed") == 1
    assert read_status(open_run(run)).commands_pending == 1


# ---- processes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["returns", "raises", "detaches in a callback"])
def test_a_script_that_does_not_detach(run: Path, how: str) -> None:
    """`atexit` writes what is queued, and "ended"."""
    script = """
    job = Job()
    monitor = observe(job, run=sys.argv[1], every=1, steer=True)
    job.run(3)
    if sys.argv[2] == "raises":
        raise SystemExit("the user's script fails")
    if sys.argv[2] == "detaches in a callback":
        monitor.on_phase(lambda *_: monitor.detach())
        apply_now(job, sys.argv[1], monitor, "compress")
        assert not monitor.enabled
        job.run(2)
    """
    finish(start(script, run, how), code=1 if how == "raises" else 0)
    assert read_status(open_run(run)).state == "ended"
    assert [frame.step for frame in frames(run)] == [0, 1, 2, *([3] if how == "detaches in a callback" else [])]


def test_forked_children_leave_the_parent_unharmed(run: Path) -> None:
    """The workers of a DataLoader, a child that ends at once, and one that runs its exit handlers."""
    script = """
    import time
    from torch.utils.data import DataLoader, TensorDataset

    def train(run):
        torch.manual_seed(0)
        model = tiny_gpt()
        optimizer = torch.optim.AdamW(model.parameters())
        data = torch.randint(0, 256, (48, 32), generator=torch.Generator().manual_seed(1))
        monitor = attach(model, optimizer, run=run, every=1) if run else None
        losses, codes = [], []
        for (tokens,) in DataLoader(TensorDataset(data), batch_size=4, num_workers=2):
            optimizer.zero_grad()
            loss = byte_loss(model(tokens), tokens)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if run:
                flushed(monitor)
            if len(losses) == 3 and run:
                codes.append(fork_a_child(model, monitor, tokens, leave=os._exit))
        if run:
            codes.append(fork_a_child(model, monitor, tokens, leave=sys.exit))
        if monitor is not None:
            monitor.detach()
        return losses, codes, monitor

    def fork_a_child(model, monitor, tokens, leave):
        pid = os.fork()
        if pid:
            return os.waitpid(pid, 0)[1]
        hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
        byte_loss(model(tokens), tokens).backward()
        enabled, stats = monitor.enabled, monitor.stats()
        monitor.detach()
        again = attach(model, torch.optim.AdamW(model.parameters()), run=sys.argv[1] + "-child")
        refused = not again.enabled and again.stats().faults == {"store_unavailable": 1}
        leave(0 if hooks == 0 and not enabled and refused else 7)

    observed, codes, monitor = train(sys.argv[1])
    plain, _, _ = train(None)
    report(observed=observed, plain=plain, codes=codes, faults=monitor.stats().faults,
           committed=monitor.stats().frames_committed)
    """
    found, _ = finish(start(script, run))
    assert found["observed"] == found["plain"]
    assert found["codes"] == [0, 0]
    assert found["faults"] == {}
    assert found["committed"] == 12
    assert [frame.step for frame in frames(run)] == list(range(12))
    status = read_status(open_run(run))
    assert (status.state, status.step, status.frames_committed) == ("ended", 12, 12)
    assert len(open_run(run).attempts()) == 1


def test_stats_are_frozen(run: Path) -> None:
    job = Job()
    with observe(job, run=run) as monitor:
        stats = monitor.stats()
        with pytest.raises(dataclasses.FrozenInstanceError):
            stats.frames_committed = 7  # type: ignore[misc]


def test_an_older_trainer_leaves_heartbeat_and_commands_to_the_newer_one(run: Path) -> None:
    """Two trainers on one run by mistake: the newer one owns it, and the run says so."""
    old, new = Job(), Job()
    with observe(old, run=run, steer=True) as older:
        old.step()
        with observe(new, run=run, steer=True) as newer:
            new.step()
            wait_until(lambda: older.stats().faults.get("superseded"), "the older one's notice")
            opened = open_run(run)
            for _ in range(30):
                assert read_status(opened).attempt == newer.stats().attempt
                assert read_status(opened).state == "live"
                time.sleep(0.05)
            apply_now(new, run, newer, "compress")
            assert older.phase == "memorize"
    faults = [event for event in open_run(run).events() if event.kind == "fault"]
    assert len(faults) == 1
    assert "attempt 1" in faults[0].evidence["reason"]


def test_a_run_deleted_while_training_is_counted_and_not_brought_back(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = Job()
    with observe(job, run=run, every=1) as monitor:
        job.step()
        wait_until(lambda: monitor.stats().frames_committed, "the first frame")
        has_beaten(run)
        shutil.rmtree(run)
        wait_until(lambda: job.step() or monitor.stats().faults.get("run_removed"), "the fault")
        committed = monitor.stats().frames_committed
        for _ in range(3):
            job.step()
    assert monitor.stats().frames_committed == committed
    assert not (run / "store.zarr").exists()
    assert len([record for record in caplog.records if "run_removed" in record.getMessage()]) == 1


def test_a_run_path_may_go_up_and_down(tmp_path: Path) -> None:
    job = Job()
    with observe(job, run=tmp_path / "a" / ".." / "b" / "run") as monitor:
        job.step()
        assert monitor.enabled
    assert open_run(tmp_path / "b" / "x" / ".." / "run").objects.path == (tmp_path / "b" / "run").resolve()
