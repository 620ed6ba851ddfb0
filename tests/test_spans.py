"""Parts add up whatever happens between brackets; timelines keep what they are told, up to their limit."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moestro.spans import LANES, Event, Part, Spans, Timeline


class Clock:
    """Tells the time that it was set to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_moment_belongs_to_the_part_entered_last() -> None:
    clock = Clock()
    spans = Spans(clock)
    with spans.within(Part.PYTHON):
        clock.now += 1
        spans.begin(Part.DENSE)
        clock.now += 2
        spans.begin(Part.EXPERTS)
        clock.now += 4
        spans.end()
        clock.now += 8
        spans.give(Part.POLICY, 3)
        spans.end()
        clock.now += 16
    clock.now += 32
    with spans.within(Part.PYTHON):
        clock.now += 64
    assert spans.seconds[Part.PYTHON] == 1 + 16 + 64
    assert spans.seconds[Part.DENSE] == 2 + 8 - 3
    assert spans.seconds[Part.EXPERTS] == 4
    assert spans.seconds[Part.POLICY] == 3
    assert spans.wall_seconds == sum(spans.seconds) == 31 + 64


def test_an_exception_closes_what_was_opened_inside() -> None:
    clock = Clock()
    spans = Spans(clock)

    def fail() -> None:
        with spans.within(Part.PYTHON):
            spans.begin(Part.POLICY)
            spans.begin(Part.EXPERTS)
            clock.now += 5
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert spans.seconds[Part.EXPERTS] == spans.wall_seconds == 5
    with spans.within(Part.DENSE):
        clock.now += 1
    assert (spans.seconds[Part.DENSE], spans.wall_seconds) == (1, 6)


@pytest.mark.parametrize(
    ("begun", "late", "queue", "read"),
    [
        (104.0, False, 4.0, 3.0),
        (90.0, False, 0.0, 7.0),  # it was being read when the wait began
        (200.0, True, 7.0, 0.0),
        (102.0, True, 2.0, 5.0),
    ],
)
def test_waiting_is_queueing_until_the_read_begins(begun: float, late: bool, queue: float, read: float) -> None:
    clock = Clock()
    spans = Spans(clock)
    spans.begin(Part.POLICY)
    clock.now += 7
    spans.waited(100.0, begun, 107.0, late=late)
    clock.now += 1
    spans.end()
    parts = (Part.LATE_QUEUE, Part.LATE_READ) if late else (Part.DEMAND_QUEUE, Part.DEMAND_READ)
    assert [spans.seconds[part] for part in parts] == [queue, read]
    assert spans.seconds[Part.POLICY] == 1
    assert sum(spans.seconds) == spans.wall_seconds == 8


@given(st.lists(st.tuples(st.sampled_from([*Part, None]), st.integers(0, 9)), max_size=60))
def test_parts_add_up_to_the_time_within_brackets(steps: list[tuple[Part | None, int]]) -> None:
    clock = Clock()
    spans = Spans(clock)
    depth, wall = 0, 0
    for part, seconds in steps:
        if part is not None:
            spans.begin(part)
            depth += 1
        elif depth:
            spans.end()
            depth -= 1
        clock.now += seconds
        wall += seconds if depth else 0
    for _ in range(depth):
        spans.end()
    assert sum(spans.seconds) == pytest.approx(wall, abs=1e-9)
    assert spans.wall_seconds == pytest.approx(wall, abs=1e-9)


def test_without_a_timeline_nothing_is_kept_of_reads() -> None:
    spans = Spans()
    spans.read((0, 1, 2), 10, 0.0, 1.0, 2.0, ahead=False)
    assert sum(spans.seconds) == 0


def test_a_timeline_keeps_the_first_events_and_counts_the_others() -> None:
    clock = Clock()
    spans = Spans(clock)
    timeline = spans.timeline = Timeline(clock.now, limit=3)
    for layer in range(5):
        spans.begin(Part.EXPERTS)
        clock.now += 1
        spans.end(Event.EXPERTS, layer, 7)
    assert (len(timeline), timeline.dropped) == (3, 2)
    assert [(lane, begun, ended, values) for lane, _, begun, ended, values in timeline] == [
        (LANES.index("experts' compute"), 100 + layer, 101 + layer, {"layer": layer, "experts": 7})
        for layer in range(3)
    ]


def test_every_reading_thread_has_a_lane_of_its_own() -> None:
    spans = Spans()
    timeline = spans.timeline = Timeline(0.0)
    together = threading.Barrier(3)

    def read(expert: int) -> None:
        together.wait(timeout=10)  # all alive at once: idents of ended threads are given anew
        for plane in range(50):
            spans.read((1, expert, plane), 4096, 0.5, 1.0 + plane, 2.0 + plane, ahead=expert == 2)
        together.wait(timeout=10)

    threads = [threading.Thread(target=read, args=(expert,)) for expert in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events = list(timeline)
    assert timeline.readers == 3
    assert len(events) == 150
    lanes = {(lane, values["expert"]) for lane, _, _, _, values in events}
    assert {lane for lane, _ in lanes} == {len(LANES), len(LANES) + 1, len(LANES) + 2}
    assert len(lanes) == 3
    assert {values["urgent"] for *_, values in events if values["expert"] == 2} == {0}
    assert {values["queue_s"] for *_, values in events if values["plane"] == 4} == {4.5}
