"""What runs inside the target: never imported, its text is executed in a namespace of its own.

Standard library only, CPython 3.11 or newer; no name is left anywhere, and nothing is raised into the target.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from importlib import import_module
from pathlib import Path
from typing import Any


def start(plan: dict[str, Any]) -> None:
    """Free the memory that the code came in, and carry out the request on a thread of its own."""
    free(plan)
    if Path(plan["answers"]).is_dir():  # else the one that asked has given up
        # Not this thread itself: threading does not know it, and would keep a stand-in for it for ever.
        threading.Thread(target=carry_out, args=(plan,), name="entropy-monitor-request", daemon=True).start()


def free(plan: dict[str, Any]) -> None:
    """Unmap the buffer: it has been compiled, and nothing reads it again."""
    if plan["size"]:
        import ctypes

        munmap = ctypes.CDLL(None).munmap
        munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        munmap(plan["address"], plan["size"])


def carry_out(plan: dict[str, Any]) -> None:
    """Find the hooks and hand them the request; whatever goes wrong is the answer."""
    answered = threading.Lock()

    def reply(message: dict[str, Any]) -> None:
        if answered.acquire(blocking=False):
            write(plan["answers"], message)

    try:
        find_submit(plan)(plan["request"], reply)
    except ImportError as error:
        reply({"ok": False, "pid": os.getpid(), "message": missing(error)})
    except Exception as error:
        reply({"ok": False, "pid": os.getpid(), "message": f"{type(error).__name__}: {error}"})


def write(directory: str, message: dict[str, Any]) -> None:
    """Leave the answer where it is waited for."""
    part = Path(directory, "reply.json.part")
    try:
        part.write_text(json.dumps(message, default=str) + "\n", encoding="utf-8")
        part.rename(part.with_suffix(""))
    except OSError:  # the one that asked has given up
        return


def find_submit(plan: dict[str, Any]) -> Any:
    """Import the hooks, from the target's own packages, else from where the asking side has them."""
    try:
        return hooks()
    except ImportError as error:
        if error.name not in {"entropy_hooks", "entropy_monitor", "tensorstore", "zarr"}:
            raise
        if "torch" not in sys.modules:
            raise ImportError("it has not imported torch", name="torch") from None
        added = [path for path in plan["paths"] if path not in sys.path and Path(path).is_dir()]
        sys.path.extend(added)
        try:
            return hooks()
        except ImportError:
            for path in added:
                sys.path.remove(path)
            raise


def hooks() -> Any:
    """Import the function that takes requests."""
    return import_module("entropy_hooks.remote").submit


def missing(error: ImportError) -> str:
    """Say which package is missing in which Python, and the remedy."""
    version = ".".join(map(str, sys.version_info[:3]))
    where = f"Python {version} at {sys.executable}"
    if error.name == "torch":
        return (
            f"expected a PyTorch job; found {where} without torch in use: give the pid of the training process itself"
        )
    return f"expected entropy-monitor in {where}; found {error}: pip install 'entropy-monitor[train]' there"
