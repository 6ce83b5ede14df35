"""What a trainer's heartbeat says beside its counts: where the process is, and what observing costs it."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from entropy_hooks.cost import Overhead


def process_fields() -> dict[str, Any]:
    """Where this process is.

    Returns:
        Fields of the heartbeat.
    """
    return {"pid": os.getpid(), "host": socket.gethostname(), "boot_id": _boot_id()}


def overhead_fields(stated: Overhead, real: Overhead) -> dict[str, Any]:
    """What observing costs.

    Args:
        stated: by the clock that the budget is kept by.
        real: by wall time.

    Returns:
        Fields of the heartbeat.
    """
    return {
        "overhead_percent": stated.percent,
        "overhead_error_percent": stated.error_percent,
        "overhead_samples": stated.num_pairs,
        "overhead_source": stated.source,
        "overhead_wall_percent": real.percent if real.num_pairs else None,
        "overhead_wall_error_percent": real.error_percent,
    }


def _boot_id() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None
