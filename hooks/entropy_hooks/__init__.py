"""Hooks for the training process: `attach` observes a job, and steers it only when told to."""

from entropy_hooks.attach import attach
from entropy_hooks.listen import listen
from entropy_hooks.monitor import Monitor, MonitorStats

__all__ = ["Monitor", "MonitorStats", "attach", "listen"]
