"""Exceptions of entropy-monitor.

::

    EntropyMonitorError
    ├── RunNotFoundError        (FileNotFoundError)  there is nothing at this place
    ├── NotARunError            (ValueError)         there is something, but it is no run
    ├── CorruptRunError         (ValueError)         a run whose root metadata cannot be read
    ├── FrameGoneError          (LookupError)        retention removed the frame
    ├── CorruptFrameError       (ValueError)         a committed frame whose data cannot be read
    ├── CorruptMetricsError     (ValueError)         a metrics or scalars table that cannot be read
    ├── SegmentTakenError       (RuntimeError)       another writer owns this segment
    ├── WatcherRunningError     (RuntimeError)       a second watcher of one run
    ├── StoreError              (OSError)            disk full, read-only, unreachable
    ├── AttachError             (RuntimeError)       a running process that cannot be entered, or has not answered
    │   └── NoSuchProcessError  (ProcessLookupError) the process does not exist, or has ended
    └── ConfigError             (ValueError)         an option or a configuration file is wrong

Every message says what was expected, what was found, and the remedy.
"""

from __future__ import annotations

__all__ = [
    "AttachError",
    "ConfigError",
    "CorruptFrameError",
    "CorruptMetricsError",
    "CorruptRunError",
    "EntropyMonitorError",
    "FrameGoneError",
    "NoSuchProcessError",
    "NotARunError",
    "RunNotFoundError",
    "SegmentTakenError",
    "StoreError",
    "WatcherRunningError",
]


class EntropyMonitorError(Exception):
    """Base of every exception that entropy-monitor raises on purpose."""


class RunNotFoundError(EntropyMonitorError, FileNotFoundError):
    """Nothing exists at the place where a run was expected."""


class NotARunError(EntropyMonitorError, ValueError):
    """The place exists but holds no run."""


class CorruptRunError(EntropyMonitorError, ValueError):
    """The run's root metadata cannot be read."""


class FrameGoneError(EntropyMonitorError, LookupError):
    """Retention removed the frame before it was read."""


class CorruptFrameError(EntropyMonitorError, ValueError):
    """A frame is committed but its data are missing or fail their checksum."""


class CorruptMetricsError(EntropyMonitorError, ValueError):
    """A table of metrics or scalars cannot be read."""


class SegmentTakenError(EntropyMonitorError, RuntimeError):
    """Another writer owns the segment or has removed it: this writer must claim a fresh one."""


class WatcherRunningError(EntropyMonitorError, RuntimeError):
    """Another watcher measures this run."""


class ConfigError(EntropyMonitorError, ValueError):
    """An option or a configuration file is wrong."""


class StoreError(EntropyMonitorError, OSError):
    """The store cannot be read or written: disk full, read-only, unreachable."""


class AttachError(EntropyMonitorError, RuntimeError):
    """A running process cannot be entered, or has not answered."""


class NoSuchProcessError(AttachError, ProcessLookupError):
    """The process does not exist, or has ended."""
