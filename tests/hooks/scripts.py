"""Training scripts that run as processes of their own, in the words of a test."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PRELUDE = """\
import json, os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from training import *
from entropy_hooks import attach

def report(**values):
    print("REPORT " + json.dumps(values), flush=True)

"""

EPILOGUE = """
import time
time.sleep(0.3)
"""
"""Gloo's threads free their last tensors: torch aborts if Python has ended by then (pytorch pull request 179291)."""


def start(source: str, *arguments: object, prefix: tuple[str, ...] = (), **variables: str) -> subprocess.Popen[str]:
    """Start a script with `training` and `report` at hand."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ENTROPY_MONITOR_")}
    paths = [ROOT, ROOT / "hooks", Path(__file__).parent]
    epilogue = EPILOGUE if "destroy_process_group" in source else ""
    return subprocess.Popen(
        [*prefix, sys.executable, "-c", PRELUDE + textwrap.dedent(source) + epilogue, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment, "PYTHONPATH": os.pathsep.join(map(str, paths)), **variables},
    )


def finish(process: subprocess.Popen[str], *, code: int = 0) -> tuple[dict[str, Any], str]:
    """Its report and what it wrote to stderr."""
    out, err = process.communicate(timeout=90)
    assert process.returncode == code, err
    reports: dict[str, Any] = {}
    for line in out.splitlines():
        if line.startswith("REPORT "):
            reports.update(json.loads(line.removeprefix("REPORT ")))
    return reports, err


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])
