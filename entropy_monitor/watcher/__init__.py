"""The watcher: follows committed frames, measures them, judges the regime, and advises or steers."""

from entropy_monitor.watcher.daemon import watch
from entropy_monitor.watcher.follow import JoinedStep, watch_frames

__all__ = ["JoinedStep", "watch", "watch_frames"]
