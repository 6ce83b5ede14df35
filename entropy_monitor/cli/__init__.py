"""Command line: one file a verb."""

from entropy_monitor.cli.app import run_command

__all__ = ["run_command"]
