"""Exit codes and one-line errors: 0 done, 1 failed, 2 usage, 3 no such run."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from entropy_monitor.store import create_run

from .processes import entropy_monitor, one_line, status_of

if TYPE_CHECKING:
    from pathlib import Path

VERBS = {"status": [], "phase": ["compress", "--reason", "a test"], "watch": ["--once"]}


def arguments(verb: str, run: Path) -> list[object]:
    return [verb, run, *VERBS[verb]]


@pytest.mark.parametrize("verb", VERBS)
def test_no_such_run(tmp_path: Path, verb: str) -> None:
    found = entropy_monitor(*arguments(verb, tmp_path / "nowhere"))
    assert found.returncode == 3
    line = one_line(found.stderr)
    assert all(part in line for part in ("expected", "found", "nowhere"))
    assert found.stdout == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("what", ["a directory", "a file"])
def test_something_that_is_no_run(tmp_path: Path, verb: str, what: str) -> None:
    place = tmp_path / "place"
    if what == "a directory":
        place.mkdir()
        (place / "notes.txt").write_text("mine")
    else:
        place.write_text("mine")
    found = entropy_monitor(*arguments(verb, place))
    assert found.returncode == 3
    assert "expected" in one_line(found.stderr)
    left = [path.name for path in tmp_path.rglob("*")]
    assert sorted(left) == (["notes.txt", "place"] if what == "a directory" else ["place"])


@pytest.mark.parametrize("verb", VERBS)
def test_truncated_metadata(tmp_path: Path, verb: str) -> None:
    create_run(tmp_path / "run")
    metadata = tmp_path / "run" / "store.zarr" / "zarr.json"
    metadata.write_bytes(metadata.read_bytes()[:30])
    found = entropy_monitor(*arguments(verb, tmp_path / "run"))
    assert found.returncode == 1
    line = one_line(found.stderr)
    assert all(part in line for part in ("expected", "found", "restore the file"))


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["nonsense"], "nonsense"),
        (["status"], "'run'"),
        (["status", "x", "--surplus"], "--surplus"),
        (["phase", "x", "compress"], "--reason"),
        (["phase", "x", "sideways", "--reason", "a test"], "sideways"),
        (["phase", "x", "compress", "--reason", "a test", "--weight", "much"], "--weight"),
        (["watch", "x", "--control", "all"], "all"),
        (["demo", "--steps", "0"], "--steps"),
        (["demo", "--steps", "many"], "--steps"),
    ],
    ids=str,
)
def test_usage(tmp_path: Path, given: list[str], named: str) -> None:
    found = entropy_monitor(*given)
    assert found.returncode == 2
    line = one_line(found.stderr)
    assert "--help" in line
    assert named in line


def test_without_arguments_the_help_is_shown() -> None:
    found = entropy_monitor()
    assert found.returncode == 2
    assert "phase" in found.stdout + found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize(
    "given",
    [
        ["--reason", "  "],
        ["--reason", "x" * 301],
        ["--reason", "a test", "--weight", "-1"],
        ["--reason", "a test", "--weight", "nan"],
        ["--reason", "a test", "--expires-s", "0"],
        ["--reason", "a test", "--wait-s", "-1"],
        ["--reason", "a test", "--wait-s", "nan"],
    ],
    ids=lambda given: " ".join(given)[:40],
)
def test_phase_refuses_bad_values(tmp_path: Path, given: list[str]) -> None:
    create_run(tmp_path / "run")
    found = entropy_monitor("phase", tmp_path / "run", "compress", *given)
    assert found.returncode == 2
    assert "expected" in one_line(found.stderr)
    assert not (tmp_path / "run" / "control").exists()


def test_demo_text_is_checked_before_anything_is_created(tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    for text, part in ((empty, "empty"), (tmp_path / "missing.txt", "missing.txt")):
        found = entropy_monitor("demo", "--run", tmp_path / "run", "--no-dashboard", "--text", text)
        assert found.returncode == 2
        assert part in one_line(found.stderr)
        assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]


def test_status_of_a_run_that_nobody_trains(tmp_path: Path) -> None:
    create_run(tmp_path / "run")
    found = status_of(tmp_path / "run")
    assert set(found) >= {
        "run_id",
        "state",
        "step",
        "phase",
        "regime",
        "frames_committed",
        "frames_dropped",
        "last_measured_step",
        "watcher_lag_s",
        "commands_pending",
        "ranks",
        "overhead_percent",
        "faults",
    }
    assert (found["state"], found["step"], found["faults"], found["ranks"]) == ("dead", None, {}, [])
    shown = entropy_monitor("status", tmp_path / "run")
    assert shown.returncode == 0
    assert "dead" in shown.stdout


def test_doctor() -> None:
    found = entropy_monitor("doctor", "--json")
    assert found.returncode == 0, found.stdout
    checks = {check["name"]: check for check in json.loads(found.stdout)["checks"]}
    assert {"python", "torch", "zarr", "store", "file events", "ptrace", "gpu"} <= set(checks)
    assert checks["store"]["state"] == "ok"
    assert set(checks["store"]) == {"name", "state", "found", "remedy"}
    shown = entropy_monitor("doctor")
    assert shown.returncode == 0
    assert len(shown.stdout.splitlines()) == len(checks)


def test_version() -> None:
    found = entropy_monitor("--version")
    assert found.returncode == 0
    assert found.stdout.startswith("entropy-monitor ")
