"""Where the time of a run goes: parts that exclude each other and add up, and events for a timeline if one is wanted.

One thread computes. It enters and leaves parts like brackets, and every moment belongs to the part entered last, so
that the parts add up to the time between the outermost brackets whatever is measured within them. A bracket takes two
looks at the clock and a few list operations (under a microsecond); without a timeline only the sums are kept.
"""

from __future__ import annotations

import enum
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from moestro.keys import PlaneKey

Clock = Callable[[], float]
"""Seconds since whenever, never going back; asked by several threads."""


class Part(enum.IntEnum):
    """What a moment is spent on. Waiting is for planes, with nothing to compute meanwhile.

    Waiting is `QUEUE` until the read begins that ends the wait, `READ` from then on; `LATE` where that read was queued
    ahead of the demand. `DENSE` is attention and all matrices but the routed experts', `POLICY` observing, choosing
    levels, victims and what is read ahead, with the plane cache's bookkeeping, and `PYTHON` all that lies between.
    """

    DENSE = 0
    EXPERTS = 1
    DEMAND_QUEUE = 2
    DEMAND_READ = 3
    LATE_QUEUE = 4
    LATE_READ = 5
    POLICY = 6
    PYTHON = 7


@dataclass(frozen=True)
class EventKind:
    """How a timeline shows events of a kind: in which lane, under which name, with which values."""

    lane: str
    name: str
    values: tuple[str, ...]


_PASS, _COMPUTE, _DECIDE = "forward pass and layers", "experts' compute", "policy, plane cache, waiting"
LANES = (_PASS, _COMPUTE, _DECIDE)
"""Lanes of the computing thread; lanes of threads that read come after them."""


class Event(enum.Enum):
    """Kinds of events. Names may hold values; values whose names end in `_s` are seconds."""

    STEP = EventKind(_PASS, "step", ())
    FORWARD = EventKind(_PASS, "forward pass", ("rows", "requests"))
    DENSE = EventKind(_PASS, "dense, to experts of layer {to_layer:.0f}", ("from_layer", "to_layer", "experts_s"))
    HEAD = EventKind(_PASS, "head", ("rows",))
    GENERAL = EventKind(_PASS, "transformers' layers", ())
    LAYER = EventKind(_PASS, "experts of layer {layer:.0f}", ("layer", "rows"))
    SAMPLE = EventKind(_PASS, "sample", ("tokens",))
    EXPERTS = EventKind(_COMPUTE, "layer {layer:.0f}", ("layer", "experts"))
    COMBINE = EventKind(_COMPUTE, "combine", ("layer",))
    KNOWN = EventKind(_COMPUTE, "layer {layer:.0f}, all in memory", ("layer", "rows"))
    BEGIN = EventKind(_DECIDE, "begin pass", ())
    CHOOSE = EventKind(_DECIDE, "observe and choose", ("layer",))
    ASK = EventKind(_DECIDE, "ask for planes", ("layer", "experts"))
    WAIT = EventKind(_DECIDE, "wait", ("late", "queue_s"))
    READ = EventKind(
        "",
        "plane {plane:.0f} of expert {expert:.0f} of layer {layer:.0f}",
        ("layer", "expert", "plane", "bytes", "urgent", "queue_s"),
    )


EVENTS = tuple(Event)
_NUMBER = {event: number for number, event in enumerate(EVENTS)}
_VALUES = max(len(event.value.values) for event in Event)
_STRIDE = 4 + _VALUES
_NOTHING = tuple((0.0,) * (_VALUES - count) for count in range(_VALUES + 1))


class Timeline:
    """Events as they happen, at most `limit` of them (80 bytes each); `dropped` counts what came after.

    Any thread may add to it. A lane is a number: of `LANES`, or beyond them of the threads that read, as they appear.
    """

    def __init__(self, begun: float, *, limit: int = 200_000) -> None:
        self.begun = begun
        self.limit = limit
        self.dropped = 0
        self.readers = 0
        self._rows = array("d")
        self._lane_of_thread: dict[int, int] = {}
        self._ended_in_lane: dict[int, float] = {}
        self._lock = threading.Lock()

    def add(self, event: Event, begun: float, ended: float, values: tuple[float, ...]) -> None:
        """Something that the computing thread did."""
        self._add(LANES.index(event.value.lane), event, begun, ended, values)

    def add_read(self, begun: float, ended: float, values: tuple[float, ...]) -> None:
        """A read of the thread that calls. Of planes read in one request, each begins where the one before ended."""
        thread = threading.get_ident()
        lane = self._lane_of_thread.get(thread)
        if lane is None:
            with self._lock:
                lane = self._lane_of_thread[thread] = len(LANES) + self.readers
                self.readers += 1
        begun, self._ended_in_lane[lane] = max(begun, self._ended_in_lane.get(lane, begun)), ended
        self._add(lane, Event.READ, begun, ended, values)

    def _add(self, lane: int, event: Event, begun: float, ended: float, values: tuple[float, ...]) -> None:
        row = (lane, _NUMBER[event], begun, ended, *values, *_NOTHING[len(values)])
        with self._lock:
            if len(self._rows) >= self.limit * _STRIDE:
                self.dropped += 1
            else:
                self._rows.extend(row)

    def __len__(self) -> int:
        return len(self._rows) // _STRIDE

    def __iter__(self) -> Iterator[tuple[int, EventKind, float, float, dict[str, float]]]:
        """(lane, kind, begin and end in seconds, values by name), in the order in which they ended."""
        for first in range(0, len(self._rows), _STRIDE):
            lane, number, begun, ended, *values = self._rows[first : first + _STRIDE]
            kind = EVENTS[int(number)].value
            yield int(lane), kind, begun, ended, dict(zip(kind.values, values, strict=False))


class Spans:
    """The brackets of one computing thread.

    Attributes:
        seconds: of each `Part`, so far.
        wall_seconds: between outermost brackets, so far.
        timeline: is told of events, if there is one.
    """

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        self.clock = clock
        self.seconds = [0.0] * len(Part)
        self.wall_seconds = 0.0
        self.timeline: Timeline | None = None
        self._open: list[tuple[Part, float]] = []
        self._since = 0.0

    def begin(self, part: Part) -> None:
        """What follows is this, until `end`."""
        now = self.clock()
        if self._open:
            self.seconds[self._open[-1][0]] += now - self._since
        self._open.append((part, now))
        self._since = now

    def end(self, event: Event | None = None, *values: float) -> None:
        """The innermost part ends; the timeline shows it as `event`, if given."""
        now = self.clock()
        part, begun = self._open.pop()
        self.seconds[part] += now - self._since
        self._since = now
        if not self._open:
            self.wall_seconds += now - begun
        if event is not None:
            self.note(event, begun, now, *values)

    def note(self, event: Event, begun: float, ended: float, *values: float) -> None:
        """Something that was measured otherwise, for the timeline alone."""
        if self.timeline is not None:
            self.timeline.add(event, begun, ended, values)

    @contextmanager
    def within(self, part: Part, event: Event | None = None, *values: float) -> Iterator[None]:
        """A bracket that an exception closes too, with all that were opened inside of it."""
        depth = len(self._open)
        self.begin(part)
        try:
            yield
        finally:
            while len(self._open) > depth + 1:
                self.end()
            self.end(event, *values)

    def give(self, part: Part, seconds: float) -> None:
        """So much of the innermost part, measured otherwise, was this."""
        self.seconds[part] += seconds
        self.seconds[self._open[-1][0]] -= seconds

    def waited(self, start: float, begun: float, end: float, *, late: bool) -> None:
        """The computing thread waited from `start` to `end` for a read that began at `begun`."""
        queue_s = min(max(begun - start, 0.0), end - start)
        self.give(Part.LATE_QUEUE if late else Part.DEMAND_QUEUE, queue_s)
        self.give(Part.LATE_READ if late else Part.DEMAND_READ, end - start - queue_s)
        self.note(Event.WAIT, start, end, late, queue_s)

    def read(self, key: PlaneKey, nbytes: int, submitted: float, begun: float, ended: float, *, ahead: bool) -> None:
        """A read ended, in the thread that calls; `nbytes` is 0 where it failed."""
        timeline = self.timeline
        if timeline is not None:
            timeline.add_read(begun, ended, (*key, nbytes, not ahead, begun - submitted))
