"""The line of those who wait: by priority, and nobody starves."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moestro.config import SamplingParams
from moestro.engine.sampling import Sampler
from moestro.engine.sequence import Sequence
from moestro.engine.waiting import MOST_OVERTAKES, WaitingLine


def _sequence(number: int, priority: int) -> Sequence:
    params = SamplingParams()
    return Sequence(prompt_ids=[1], sampling=params, sampler=Sampler(params), number=number, priority=priority)


def test_lower_priorities_first_then_arrival() -> None:
    line = WaitingLine()
    for number, priority in enumerate([0, 5, -1, 0, 5, -1]):
        line.add(_sequence(number, priority))
    order = []
    while line:
        first = line.first()
        line.start(first)
        order.append(first.number)
    assert order == [2, 5, 0, 3, 1, 4]


def test_one_that_gave_way_has_its_old_place() -> None:
    line, gave_way = WaitingLine(), _sequence(0, 3)
    for number in (1, 2):
        line.add(_sequence(number, 3))
    line.add_back(gave_way)
    assert line.first() is gave_way


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.data())
def test_nobody_waits_for_more_than_a_bounded_number_of_others(priorities: list[int], data: st.DataObject) -> None:
    """Whenever one starts, another of any priority may arrive, and any may leave."""
    line = WaitingLine()
    waiting = {number: _sequence(number, priority) for number, priority in enumerate(priorities)}
    for one in waiting.values():
        line.add(one)
    oldest, started = min(waiting), 0
    for number in range(len(priorities), len(priorities) + 120):
        first = line.first()
        assert first.number in waiting
        assert first is waiting[min(waiting)] or started < MOST_OVERTAKES
        assert started == MOST_OVERTAKES or first.priority == min(one.priority for one in waiting.values())
        line.start(first)
        del waiting[first.number]
        started += 1
        waiting[number] = _sequence(number, data.draw(st.integers(0, 3)))
        line.add(waiting[number])
        if data.draw(st.booleans()) and len(waiting) > 1:
            gone = data.draw(st.sampled_from(sorted(waiting)))
            line.remove(waiting.pop(gone))
        if min(waiting) != oldest:
            oldest, started = min(waiting), 0
        assert len(line) == len(waiting)
