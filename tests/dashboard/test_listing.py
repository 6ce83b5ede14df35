"""Which directories are runs, and that names reach nothing else."""

from __future__ import annotations

import os

import pytest

from entropy_dashboard.listing import list_runs
from entropy_monitor.store import create_run


def test_runs_are_listed_by_activity(runs):
    for index, name in enumerate(("old", "new")):
        create_run(runs / name)
        (runs / name / "heartbeat").mkdir()
        os.utime(runs / name / "heartbeat", (1000 + 10_000 * index,) * 2)
    assert list(list_runs(runs)) == ["new", "old"]


def test_a_run_is_shown_alone(runs):
    create_run(runs / "one")
    assert list_runs(runs / "one") == {"one": runs / "one"}


def test_a_missing_directory_has_no_runs(runs):
    assert list_runs(runs / "absent") == {}


@pytest.mark.parametrize("name", ["<img src=x onerror=alert(1)>", ".hidden", "a b", "-x", "x" * 129, "\u202eabc"])
def test_odd_names_are_left_out(runs, name):
    create_run(runs / name)
    assert list_runs(runs) == {}


def test_links_are_left_out(runs, tmp_path):
    create_run(tmp_path / "outside")
    (runs / "link").symlink_to(tmp_path / "outside")
    (runs / "half").mkdir()
    (runs / "half" / "store.zarr").symlink_to(tmp_path / "outside" / "store.zarr")
    assert list_runs(runs) == {}


def test_other_directories_and_files_are_left_out(runs):
    (runs / "notes").mkdir()
    (runs / "file").write_text("")
    assert list_runs(runs) == {}
