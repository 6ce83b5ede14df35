"""``entropy-monitor doctor``: is this machine fit to watch and to be watched?"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

_PACKAGES = ("torch", "numpy", "zarr", "tensorstore", "xarray", "scipy", "watchdog", "streamlit", "altair")
_CORE = ("numpy", "zarr", "tensorstore", "xarray")


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    state: Literal["ok", "note", "fail"]
    found: str
    remedy: str = ""


def doctor(as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for scripts.")] = False) -> None:
    """Check versions, store, file events, ptrace rights and GPU; exit 1 if something needed is missing."""
    checks = [_python(), *_packages(), _store(), _inotify(), _ptrace(), _gpu()]
    if as_json:
        typer.echo(json.dumps({"checks": [asdict(check) for check in checks]}))
    else:
        marks = {"ok": "ok  ", "note": "note", "fail": "FAIL"}
        for check in checks:
            typer.echo(
                f"{marks[check.state]}  {check.name}: {check.found}{f' ({check.remedy})' if check.remedy else ''}"
            )
    if any(check.state == "fail" for check in checks):
        raise typer.Exit(1)


def _python() -> Check:
    return Check("python", "ok", f"{platform.python_version()} on {platform.platform()}")


def _packages() -> list[Check]:
    checks: list[Check] = []
    for name in _PACKAGES:
        try:
            checks.append(Check(name, "ok", importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            state = "fail" if name in _CORE else "note"
            checks.append(Check(name, state, "not installed", "pip install 'entropy-monitor[all]'"))
    return checks


def _store() -> Check:
    from entropy_monitor.errors import StoreError
    from entropy_monitor.store import create_run

    with tempfile.TemporaryDirectory() as directory:
        try:
            run = create_run(Path(directory) / "run")
            twice = run.objects.create("probe", b"1") and run.objects.create("probe", b"2")
        except StoreError as error:
            return Check("store", "fail", str(error), "free some space in the temporary directory")
    if twice:
        return Check("store", "fail", "conditional create overwrote a file", "use another filesystem for runs")
    return Check("store", "ok", f"writes to {tempfile.gettempdir()}")


def _inotify() -> Check:
    limits = [Path("/proc/sys/fs/inotify") / name for name in ("max_user_instances", "max_user_watches")]
    try:
        instances, watches = (int(path.read_text(encoding="ascii")) for path in limits)
    except OSError:
        return Check("file events", "note", "no inotify here", "the watcher polls every 250 ms")
    if instances < 16 or watches < 64:
        remedy = "raise fs.inotify.max_user_instances; until then the watcher polls every 250 ms"
        return Check("file events", "note", f"{instances} instances, {watches} watches", remedy)
    return Check("file events", "ok", f"inotify, {instances} instances a user")


def _ptrace() -> Check:
    from entropy_monitor.injection.rights import may_trace_all, yama_scope
    from entropy_monitor.injection.self_test import trace_a_child

    scope = yama_scope()
    found = ", ".join(
        [
            "no Yama" if scope is None else f"Yama scope {scope}",
            f"CAP_SYS_PTRACE {'effective' if may_trace_all() else 'missing'}",
            f"uid {os.geteuid()}",
            "gdb installed" if shutil.which("gdb") else "no gdb",
        ]
    )
    if failure := trace_a_child():
        remedy = "start jobs with `entropy-monitor run`, or a container with --cap-add SYS_PTRACE"
        return Check("ptrace", "note", f"{found}; tracing a child failed: {failure}", remedy)
    if scope and not may_trace_all():
        remedy = "to attach to a running process be root, or start it with `entropy-monitor run`"
        return Check("ptrace", "note", f"{found}; a child was traced, other processes may not be", remedy)
    return Check("ptrace", "ok", f"{found}; a child was traced")


def _gpu() -> Check:
    try:
        import torch
    except ImportError:
        return Check("gpu", "note", "torch is not installed", "pip install torch")
    if not torch.cuda.is_available():
        return Check("gpu", "ok", "none: everything runs on the CPU")
    return Check("gpu", "ok", f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
