"""What is worth knowing of a start of the trainer, months later."""

from __future__ import annotations

import getpass
import os
import platform
import socket
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parameter import UninitializedParameter

from entropy_hooks.ranks import process_started
from entropy_monitor import __version__

if TYPE_CHECKING:
    from torch import nn

    from entropy_hooks.target import Target
    from entropy_monitor.config import MonitorOptions


def attempt_record(target: Target, options: MonitorOptions, world_size: int) -> dict[str, Any]:
    """Collect it.

    Args:
        target: what is observed.
        options: how.
        world_size: number of ranks.

    Returns:
        The attempt's record.
    """
    return {
        "started_at": time.time(),
        "command_line": sys.argv,
        "pid": os.getpid(),
        "process_started": process_started(os.getpid()),
        "host": socket.gethostname(),
        "user": _user(),
        "world_size": world_size,
        "versions": {
            "entropy_monitor": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "model": type(target.model).__name__,
        "num_parameters": _num_parameters(target.model),
        "layers": list(target.layers),
        "steered_layers": list(target.steered),
        "options": asdict(options),
        "total_steps": options.total_steps,
    }


def _num_parameters(model: nn.Module) -> int:
    """Those of a lazy module have no size before its first pass.

    Returns:
        The entries of all that have.
    """
    parameters = (each for each in model.parameters() if not isinstance(each, UninitializedParameter))
    return sum(parameter.numel() for parameter in parameters)


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return None
