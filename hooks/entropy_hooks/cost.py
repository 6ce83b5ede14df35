"""What sampling costs the job: sampled steps against the steps between them, which pass our hooks by.

The figure is a median of paired differences, so that a slow spell of the machine, an evaluation between two steps or a
drift in the length of sequences does not count as ours.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from entropy_hooks.meter import Meter

Clock = Literal["hooks", "cpu", "wall"]
"""Our own code on the training thread, all of the training thread's CPU time, or real time (the device's on CUDA)."""
CLOCKS: tuple[Clock, ...] = ("hooks", "cpu", "wall")

_PAIRS = 64
"""Newest sampled steps that the figure is taken from."""
_PLAIN = 32
"""Newest steps between two sampled ones that are compared with."""
_WARM_UP = 2
"""Sampled steps that are left out: they allocate buffers and find out which hooks are needed."""
_MIN_PAIRS = 4
"""Fewer differences than this have no spread to speak of."""
_DEVIATIONS = 1.4826 * 1.2533
"""Standard error of a median, from the median absolute deviation, for normal noise: this over the root of n."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one sampled step costs on one clock."""

    seconds: float
    """Added to a sampled step."""
    std_error_s: float
    step_s: float
    """Length of a step that is not sampled."""
    num_pairs: int

    def fraction(self, every: int) -> float:
        """Share of training time, when each `every`-th step is sampled.

        Returns:
            The fraction.
        """
        return self.seconds / (every * self.step_s) if self.step_s > 0 else math.nan

    def fraction_error(self, every: int) -> float:
        """Standard error of `fraction`.

        Returns:
            The error.
        """
        return self.std_error_s / (every * self.step_s) if self.step_s > 0 else math.nan


class StepCosts:
    """Is told of each optimizer step as it ends; owned by the training thread, read by any."""

    def __init__(self, read: Callable[[], tuple[float, float, float]], device: torch.device) -> None:
        self._read = read
        """Gives the three clocks' seconds, see `host_clocks`."""
        self._device_clock = DeviceClock(device) if device.type == "cuda" else None
        self._last: tuple[float, float, float] | None = None
        self._plain: deque[tuple[float, float, float]] = deque(maxlen=_PLAIN)
        """Steps since the last sampled one."""
        self._pairs: dict[Clock, deque[tuple[float, float]]] = {clock: deque(maxlen=_PAIRS) for clock in CLOCKS}
        """Added seconds and the length of the steps before, newest last."""
        self._num_sampled = 0

    def step(self, *, sampled: bool) -> None:
        """A step has ended, all our work for it included."""
        now = self._read()
        last, self._last = self._last, now
        if self._device_clock is not None:
            for device_sampled, seconds in self._device_clock.step(sampled=sampled):
                self._take_device(device_sampled, seconds)
        if last is None:
            return
        lengths = (now[0] - last[0], now[1] - last[1], now[2] - last[2])
        if not sampled:
            self._plain.append(lengths)
            return
        self._num_sampled += 1
        if self._plain and self._num_sampled > _WARM_UP:
            typical = [statistics.median(clock) for clock in zip(*self._plain, strict=True)]
            for clock, of_sampled, of_plain in zip(CLOCKS, lengths, typical, strict=True):
                if clock != "wall" or self._device_clock is None:
                    # Of our own code what is always done stands in both; its share is one of all the time there is.
                    step_s = typical[2] if clock == "hooks" else of_plain
                    self._pairs[clock].append((of_sampled - of_plain, step_s))
        self._plain.clear()

    @property
    def headline(self) -> Clock:
        """The clock that says most: other processes cannot lengthen CPU time, and a GPU's work is not in it."""
        return "cpu" if self._device_clock is None else "wall"

    def cost(self, clock: Clock) -> Cost | None:
        """What a sampled step costs.

        Returns:
            The cost; None before four sampled steps could be compared with others.
        """
        pairs = list(self._pairs[clock])
        if len(pairs) < _MIN_PAIRS:
            return None
        added = [seconds for seconds, _ in pairs]
        median = statistics.median(added)
        spread = statistics.median(abs(seconds - median) for seconds in added)
        return Cost(
            seconds=median,
            std_error_s=_DEVIATIONS * spread / math.sqrt(len(added)),
            step_s=statistics.median(length for _, length in pairs),
            num_pairs=len(added),
        )

    def _take_device(self, sampled: bool, seconds: float) -> None:
        clock = self._device_clock
        assert clock is not None
        if not sampled:
            clock.plain.append(seconds)
        else:
            if clock.plain and self._num_sampled > _WARM_UP:
                self._pairs["wall"].append((seconds - (median := statistics.median(clock.plain)), median))
            clock.plain.clear()


class DeviceClock:
    """Lengths of steps on a CUDA device, by events that nobody waits for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: deque[tuple[torch.cuda.Event, bool]] = deque(maxlen=_PLAIN)
        self.plain: deque[float] = deque(maxlen=_PLAIN)

    def step(self, *, sampled: bool) -> list[tuple[bool, float]]:
        """Mark the end of a step in the device's queue.

        Returns:
            Steps that the device has ended meanwhile: whether each was sampled, and its seconds.
        """
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._events.append((event, sampled))
        done: list[tuple[bool, float]] = []
        while len(self._events) > 1 and self._events[1][0].query():
            before, _ = self._events.popleft()
            after, was_sampled = self._events[0]
            done.append((was_sampled, before.elapsed_time(after) / 1e3))
        return done


def host_clocks(meter: Meter) -> Callable[[], tuple[float, float, float]]:
    """The clocks of the training thread.

    Returns:
        A function that reads them, in the order of `CLOCKS`.
    """

    def read() -> tuple[float, float, float]:
        return meter.spent_s, time.thread_time(), time.perf_counter()

    return read


@dataclass(frozen=True, slots=True, kw_only=True)
class Overhead:
    """The share of training time that observing takes, as it is shown."""

    percent: float | None
    error_percent: float | None
    """Standard error; None where the share was read off our own clock alone."""
    num_pairs: int
    """Sampled steps that were compared with others."""
    source: str
    """On which clock, and how."""


_SOURCES: dict[Clock, str] = {
    "hooks": "time in our own code",
    "cpu": "training thread's CPU time, against bypassed steps",
    "wall": "step time, against bypassed steps",
}


def overhead(costs: StepCosts, meter: Meter, every: int, clock: Clock | None = None) -> Overhead:
    """State the overhead.

    Args:
        costs: what sampled steps cost.
        meter: time in our own code.
        every: how often a step is sampled.
        clock: on which clock; None takes the device's on CUDA and the training thread's CPU time elsewhere.

    Returns:
        The overhead; where nothing could be compared yet, the share of real time spent in our own code, a lower bound.
    """
    chosen = clock or costs.headline
    cost = costs.cost(chosen)
    if cost is None:
        return Overhead(percent=meter.overhead_percent, error_percent=None, num_pairs=0, source=_SOURCES["hooks"])
    return Overhead(
        percent=round(100 * cost.fraction(every), 4),
        error_percent=round(100 * cost.fraction_error(every), 4),
        num_pairs=cost.num_pairs,
        source=_SOURCES[chosen],
    )
