"""The demo's own controller settings, written into its run as ``demo.toml`` for everybody to see.

The preset's patience suits runs of thousands of steps in which CE has flattened; a demo of some hundred steps is still
falling steeply, and would show one phase. So the demo asks for larger gains in less time, and compresses harder.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSettings:
    """Keyword arguments of `entropy_monitor.gapt.GateOptions`."""

    memorize_patience: int
    compress_patience: int
    tau_ce: float = 0.05
    """CE must fall by this share within `memorize_patience` steps, or the demo compresses."""
    weight: float = 0.1

    @classmethod
    def for_steps(cls, steps: int) -> DemoSettings:
        """Patience for a run of this length.

        Returns:
            The settings.
        """
        return cls(memorize_patience=max(10, round(0.07 * steps)), compress_patience=max(10, round(0.06 * steps)))

    def to_toml(self) -> str:
        """The settings as a configuration file of the watcher.

        Returns:
            TOML.
        """
        lines = [f"{name} = {value}" for name, value in asdict(self).items()]
        return "\n".join([f"# {(__doc__ or '').splitlines()[0]}", "[gapt]", *lines, ""])
