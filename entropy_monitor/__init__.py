"""See, live, how a neural network memorizes and compresses while it trains, and steer it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from entropy_monitor.store import Run, open_run

__all__ = ["Run", "__version__", "open_run"]

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    # Lazy, so that `import entropy_hooks` in a training job pays for nothing it does not use.
    if name in {"Run", "open_run"}:
        from entropy_monitor import store

        return getattr(store, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
