"""The run store: the only place that knows zarr, files and URLs."""

from entropy_monitor.store.attempts import claim_attempt, find_attempt, list_attempts, read_attempt
from entropy_monitor.store.commands import (
    CommandRequest,
    acknowledge,
    acknowledged_numbers,
    issue_command,
    last_command,
    list_acknowledgements,
    list_commands,
    parse_command,
    read_acknowledgement,
    read_command_bytes,
    refusal,
)
from entropy_monitor.store.events import EventLog, event_id
from entropy_monitor.store.frame_reader import FrameReader
from entropy_monitor.store.frame_writer import FrameWriter
from entropy_monitor.store.frames import FrameData, FrameLayout, GroupLayout, list_commits, list_ranks, list_segments
from entropy_monitor.store.heartbeat import (
    DEAD_AFTER_S,
    PERIOD_S,
    STALE_AFTER_S,
    WATCHER,
    Liveness,
    liveness,
    read_heartbeat,
    read_trainer_heartbeats,
    write_heartbeat,
)
from entropy_monitor.store.lock import WatcherLock
from entropy_monitor.store.metrics import MetricsBlock, MetricsLayout, MetricsRow
from entropy_monitor.store.metrics_reader import MetricsReader, read_cursor, read_states, read_tail
from entropy_monitor.store.metrics_writer import MetricsWriter
from entropy_monitor.store.objects import Objects
from entropy_monitor.store.retention import Retention, trim_vanished_ranks
from entropy_monitor.store.run import CorruptFrameWarning, Run, create_run, open_run, was_deleted
from entropy_monitor.store.scalars import ScalarsReader, ScalarsWriter
from entropy_monitor.store.status import RunStatus, read_status

__all__ = [
    "DEAD_AFTER_S",
    "PERIOD_S",
    "STALE_AFTER_S",
    "WATCHER",
    "CommandRequest",
    "CorruptFrameWarning",
    "EventLog",
    "FrameData",
    "FrameLayout",
    "FrameReader",
    "FrameWriter",
    "GroupLayout",
    "Liveness",
    "MetricsBlock",
    "MetricsLayout",
    "MetricsReader",
    "MetricsRow",
    "MetricsWriter",
    "Objects",
    "Retention",
    "Run",
    "RunStatus",
    "ScalarsReader",
    "ScalarsWriter",
    "WatcherLock",
    "acknowledge",
    "acknowledged_numbers",
    "claim_attempt",
    "create_run",
    "event_id",
    "find_attempt",
    "issue_command",
    "last_command",
    "list_acknowledgements",
    "list_attempts",
    "list_commands",
    "list_commits",
    "list_ranks",
    "list_segments",
    "liveness",
    "open_run",
    "parse_command",
    "read_acknowledgement",
    "read_attempt",
    "read_command_bytes",
    "read_cursor",
    "read_heartbeat",
    "read_states",
    "read_status",
    "read_tail",
    "read_trainer_heartbeats",
    "refusal",
    "trim_vanished_ranks",
    "was_deleted",
    "write_heartbeat",
]
