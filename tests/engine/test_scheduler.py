"""Scheduling: prompts in chunks, decoding first, no request without the KV room to end."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from moestro.config import SamplingParams
from moestro.engine.prefixes import Prefixes
from moestro.engine.sampling import Sampler
from moestro.engine.scheduler import Scheduler
from moestro.engine.sequence import Sequence
from moestro.runtime.kv import KVPool, LayerKV, block_bytes

LAYERS = (LayerKV(heads=1, key_width=1, value_heads=1, value_width=1, gathered=False),)
NEVER: frozenset[int] = frozenset()


def _scheduler(blocks: int, max_sequences: int, step_rows: int, keep: bool = False) -> tuple[Scheduler, KVPool]:
    pool = KVPool(layers=LAYERS, blocks=blocks, buffer=torch.zeros(blocks * block_bytes(LAYERS), dtype=torch.uint8))
    return Scheduler(prefixes=Prefixes(pool, keep=keep), max_sequences=max_sequences, step_rows=step_rows), pool


def _sequence(number: int, prompt: int, new_tokens: int) -> Sequence:
    sampling = SamplingParams(max_tokens=new_tokens)
    return Sequence(number=number, prompt_ids=[number] * prompt, sampling=sampling, sampler=Sampler(sampling))


def test_a_long_prompt_is_cut_and_does_not_hold_up_decoding() -> None:
    scheduler, _ = _scheduler(blocks=20, max_sequences=2, step_rows=8)
    first, second = _sequence(0, 2, 9), _sequence(1, 20, 1)
    scheduler.add(first)
    scheduler.add(second)
    rows = []
    while second.finish_reason is None:
        scheduler.admit()
        batch, sampled = scheduler.next_step()
        scheduler.commit(batch)
        rows.append([(segment.request, len(segment.token_ids)) for segment in batch.segments])
        for sequence in sampled:
            sequence.append(5, NEVER)
        scheduler.retire()
    assert rows == [[(0, 2), (1, 6)], [(0, 1), (1, 7)], [(0, 1), (1, 7)]]


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20)), min_size=1, max_size=12),
    st.integers(1, 5),
    st.integers(4, 32),
)
def test_every_request_ends_with_its_tokens_and_all_blocks_come_back(
    shapes: list[tuple[int, int]], max_sequences: int, step_rows: int
) -> None:
    scheduler, pool = _scheduler(blocks=8, max_sequences=max_sequences, step_rows=max(step_rows, max_sequences))
    sequences = [_sequence(number, prompt, new) for number, (prompt, new) in enumerate(shapes)]
    for sequence in sequences:
        scheduler.add(sequence)
    for _ in range(10_000):
        if not scheduler.busy:
            break
        scheduler.admit()
        batch, sampled = scheduler.next_step()
        scheduler.commit(batch)
        assert batch.rows <= max(step_rows, max_sequences)
        assert len(batch.segments) <= max_sequences
        for sequence in sampled:
            sequence.append(1, NEVER)
        scheduler.retire()
    assert [len(sequence.token_ids) for sequence in sequences] == [new for _, new in shapes]
    assert pool.free_blocks == 8


def test_end_token_ends_a_request_and_is_not_part_of_it() -> None:
    sequence = _sequence(0, 3, 10)
    sequence.append(4, frozenset({9}))
    sequence.append(9, frozenset({9}))
    assert (sequence.token_ids, sequence.finish_reason) == ([4], "stop")


def test_dropping_a_request_frees_its_blocks() -> None:
    scheduler, pool = _scheduler(blocks=4, max_sequences=1, step_rows=8)
    running, waiting = _sequence(0, 3, 10), _sequence(1, 3, 10)
    scheduler.add(running)
    scheduler.add(waiting)
    scheduler.admit()
    scheduler.next_step()
    scheduler.drop(running)
    scheduler.drop(waiting)
    assert not scheduler.busy
    assert pool.free_blocks == 4


def test_a_step_that_did_not_go_through_comes_again() -> None:
    scheduler, _ = _scheduler(blocks=4, max_sequences=2, step_rows=8)
    scheduler.add(_sequence(0, 5, 3))
    scheduler.admit()
    first, _ = scheduler.next_step()
    scheduler.admit()
    again, sampled = scheduler.next_step()
    assert first.token_ids_T.tolist() == again.token_ids_T.tolist()
    assert first.positions_T.tolist() == again.positions_T.tolist()
    assert len(sampled) == 1


def _steps(scheduler: Scheduler, *, most: int = 1000) -> list[list[int]]:
    """Runs to the end; who was in each step."""
    steps = []
    while scheduler.busy and len(steps) < most:
        scheduler.admit()
        batch, sampled = scheduler.next_step()
        scheduler.commit(batch)
        for sequence in sampled:
            sequence.append(1, NEVER)
        scheduler.retire()
        steps.append([segment.request for segment in batch.segments])
    return steps


def test_a_lower_priority_takes_a_place_and_gives_it_back() -> None:
    scheduler, pool = _scheduler(blocks=40, max_sequences=1, step_rows=64, keep=True)
    slow = _sequence(0, 40, 8)
    slow.priority = 1
    scheduler.add(slow)
    _steps(scheduler, most=3)
    urgent, patient = _sequence(1, 3, 2), _sequence(2, 3, 2)
    patient.priority = 1
    scheduler.add(urgent)
    scheduler.add(patient)
    assert _steps(scheduler) == [[1], [1], [0], [0], [0], [0], [0], [2], [2]]
    assert slow.yielded
    assert (len(slow.token_ids), slow.reused) == (8, 0)
    assert pool.free_blocks == 38  # two full blocks of the first are kept


def test_one_gives_way_once_at_most() -> None:
    scheduler, _ = _scheduler(blocks=40, max_sequences=1, step_rows=64)
    slow = _sequence(0, 4, 6)
    slow.priority = 9
    scheduler.add(slow)
    _steps(scheduler, most=2)
    scheduler.add(_sequence(1, 4, 1))
    _steps(scheduler, most=2)
    scheduler.add(_sequence(2, 4, 1))
    assert _steps(scheduler) == [[0], [0], [0], [2]]


def test_requests_that_begin_alike_compute_it_once() -> None:
    scheduler, _ = _scheduler(blocks=40, max_sequences=3, step_rows=64, keep=True)
    alike = [_sequence(number, 0, 2) for number in range(3)]
    for one in alike:
        one.prompt_ids = [5] * 40
        scheduler.add(one)
    assert _steps(scheduler) == [[0], [0, 1, 2], [1, 2]]
    assert [one.reused for one in alike] == [0, 32, 32]
