"""The line of those who wait: by priority, and nobody starves."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moestro.config import SamplingParams
from moestro.engine.sampling import Sampler
from moestro.engine.sequence import Sequence
from moestro.engine.waiting import MOST_OVERTAKES, WaitingLine


def _sequence(number: int, priority: int = 0, prompt: tuple[int, ...] = (1,)) -> Sequence:
    params = SamplingParams()
    return Sequence(prompt_ids=list(prompt), sampling=params, sampler=Sampler(params), number=number, priority=priority)


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


def test_those_that_share_tokens_with_who_runs_come_first() -> None:
    prompts = [(1, 2, 3), (7, 8, 9), (1, 2, 9), (7, 8), (4096 + 7, 4096 + 8)]
    line = WaitingLine(alike=True)
    for number, prompt in enumerate(prompts):
        line.add(_sequence(number, prompt=prompt))
    line.add(_sequence(9, priority=1, prompt=(7, 8, 9)))
    running = [line.first()]  # nobody runs: the first that came
    assert running[0].number == 0
    line.start(running[0])
    assert line.first(running).number == 2
    assert line.first([_sequence(10, prompt=(9, 9, 8, 7))]).number == 1
    assert line.first([_sequence(10, prompt=(7, 8))]).number == 3  # among equals the first that came
    assert line.first([_sequence(10, prompt=(500,))]).number == 1
    arrival = WaitingLine()
    for number, prompt in enumerate(prompts):
        arrival.add(_sequence(number, prompt=prompt))
    assert arrival.first([_sequence(10, prompt=(7, 8))]).number == 0


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.booleans(), st.data())
def test_nobody_waits_for_more_than_a_bounded_number_of_others(
    priorities: list[int], alike: bool, data: st.DataObject
) -> None:
    """Whenever one starts, another of any priority may arrive, and any may leave."""
    line = WaitingLine(alike=alike)
    running = [_sequence(1000, prompt=(2, 3))]
    prompts = st.tuples(st.integers(0, 5), st.integers(0, 5))
    waiting = {number: _sequence(number, priority, data.draw(prompts)) for number, priority in enumerate(priorities)}
    for one in waiting.values():
        line.add(one)
    oldest, started = min(waiting), 0
    for number in range(len(priorities), len(priorities) + 120):
        first = line.first(running)
        assert first.number in waiting
        assert first is waiting[min(waiting)] or started < MOST_OVERTAKES
        assert started == MOST_OVERTAKES or first.priority == min(one.priority for one in waiting.values())
        line.start(first)
        del waiting[first.number]
        started += 1
        waiting[number] = _sequence(number, data.draw(st.integers(0, 3)), data.draw(prompts))
        line.add(waiting[number])
        if data.draw(st.booleans()) and len(waiting) > 1:
            gone = data.draw(st.sampled_from(sorted(waiting)))
            line.remove(waiting.pop(gone))
        if min(waiting) != oldest:
            oldest, started = min(waiting), 0
        assert len(line) == len(waiting)
