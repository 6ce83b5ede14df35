"""Which rank this process is, and how its ranks agree on the attempt without a collective.

A collective in `attach` could hang a job in which not every rank calls it; the process group's key-value store cannot.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from entropy_monitor.errors import ConfigError, StoreError
from entropy_monitor.store import claim_attempt, find_attempt

if TYPE_CHECKING:
    from collections.abc import Callable

    from entropy_monitor.store import Objects

_JOIN_TIMEOUT_S = 60.0
_starts: dict[str, int] = {}
"""How often this process has attached to a run; every rank counts alike."""


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank: from `torch.distributed` if it is initialised, else from ``RANK``, else 0.

    Returns:
        Rank and number of ranks.
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    rank = _number("RANK", 0)
    return rank, max(_number("WORLD_SIZE", 1), rank + 1)


def _number(variable: str, default: int) -> int:
    value = os.environ.get(variable) or str(default)
    if not value.isdecimal():
        raise ConfigError(f"expected a whole number in {variable}; found {value!r}: correct or unset it")
    return int(value)


def num_collectives() -> int | None:
    """How many collectives the job has begun in its default group: alike on all ranks wherever they are in step.

    Returns:
        The count, which is asked of nobody else; None outside `torch.distributed`, or where the backend keeps none.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    group: Any = dist.distributed_c10d._get_default_group()  # pyright: ignore[reportPrivateUsage]
    try:
        return int(group._get_sequence_number_for_group())
    except RuntimeError:
        return None


def launch_id() -> str | None:
    """What all ranks of one launch share, when `torch.distributed` is not initialised.

    Returns:
        The id, or None outside any launcher.
    """
    if elastic := os.environ.get("TORCHELASTIC_RUN_ID"):
        return f"{elastic}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    return f"{address}:{port}" if address and port else None


def agree_on_attempt(objects: Objects, rank: int, record: Callable[[], dict[str, Any]]) -> int:
    """Rank 0 claims the attempt; the others learn its number.

    Args:
        objects: the run.
        rank: this process's rank.
        record: makes the attempt's record, on rank 0.

    Returns:
        The attempt's number.

    Raises:
        StoreError: rank 0 did not claim one in time.
    """
    start = _starts[objects.url] = _starts.get(objects.url, 0) + 1
    launch = launch_id()
    if dist.is_available() and dist.is_initialized():
        return _through_process_group(objects, rank, record, f"entropy_monitor/{objects.url}/{start}")
    if rank == 0:
        return claim_attempt(objects, {**record(), "launch_id": f"{launch}#{start}" if launch else None})
    if launch is None:
        raise StoreError(
            f"expected MASTER_ADDR and MASTER_PORT, or torch.distributed, on rank {rank}; found neither: attach after "
            "init_process_group"
        )
    return _through_attempt_file(objects, f"{launch}#{start}")


def _through_process_group(objects: Objects, rank: int, record: Callable[[], dict[str, Any]], key: str) -> int:
    store = dist.distributed_c10d._get_default_store()  # pyright: ignore[reportPrivateUsage]
    if rank == 0:
        number = claim_attempt(objects, {**record(), "launch_id": launch_id()})
        store.set(key, str(number))
        return number
    deadline = time.monotonic() + _JOIN_TIMEOUT_S
    while not store.check([key]):
        if time.monotonic() > deadline:
            raise StoreError(
                f"expected rank 0 to attach within {_JOIN_TIMEOUT_S:.0f} s; it did not: attach on every rank"
            )
        time.sleep(0.02)
    return int(store.get(key))


def _through_attempt_file(objects: Objects, launch: str) -> int:
    deadline = time.monotonic() + _JOIN_TIMEOUT_S
    while True:
        found = find_attempt(objects, launch)
        # An earlier launch may have had the same address and port: its rank 0 is gone.
        if found is not None and _is_running(int(found.get("pid", 0)), found.get("process_started")):
            return int(found["attempt"])
        if time.monotonic() > deadline:
            raise StoreError(
                f"expected rank 0 to attach within {_JOIN_TIMEOUT_S:.0f} s; it did not: attach on every rank"
            )
        time.sleep(0.02)


def process_started(pid: int) -> str | None:
    """When a process started, in clock ticks since boot; tells a process from a later one of the same number.

    Returns:
        The ticks, or None where ``/proc`` does not say.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return None
    return stat.rpartition(")")[2].split()[19]


def _is_running(pid: int, started: str | None) -> bool:
    return started is None or process_started(pid) == started
