"""What a storm did, and what it found."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class StormReport:
    """Counts of one storm; `violations` is empty when every promise was kept."""

    seed: int
    kills: Counter[str] = field(default_factory=Counter[str])
    attempts: int = 0
    frames_seen: int = 0
    frames_measured: int = 0
    frames_removed: int = 0
    frames_on_disk: int = 0
    rows: int = 0
    corrections: int = 0
    commands: int = 0
    answers: Counter[str] = field(default_factory=Counter[str])
    unanswered: int = 0
    applied: int = 0
    reads: int = 0
    corrupt: int = 0
    half_read: int = 0
    lost: int = 0
    seconds: float = 0.0
    violations: list[str] = field(default_factory=list[str])

    def lines(self) -> list[str]:
        """The figures as a table."""
        kills = ", ".join(f"{count} {what}" for what, count in sorted(self.kills.items()))
        answers = ", ".join(f"{count} {status}" for status, count in sorted(self.answers.items()))
        return [
            f"seed                 {self.seed}",
            f"kills                {sum(self.kills.values())} ({kills}) in {self.seconds:.0f} s",
            f"attempts             {self.attempts}",
            f"frames committed     {self.frames_seen} seen by the observer, {self.reads} read and checked by it",
            f"frames measured      {self.frames_measured} in {self.rows} rows, {self.corrections} of them corrections",
            f"frames removed       {self.frames_removed} by the ring; {self.frames_on_disk} are on disk",
            f"commands             {self.commands}, {self.unanswered} of {2 * self.commands} answers never given",
            f"answers              {sum(self.answers.values())} ({answers}), {self.applied} logged by the trainers",
            f"corrupt              {self.corrupt}",
            f"half-read            {self.half_read}",
            f"lost                 {self.lost}",
            *(f"VIOLATION            {text}" for text in self.violations),
        ]
