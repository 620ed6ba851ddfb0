"""Replay in time: small cases by hand, and what must hold whatever the routing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.policy import LRU
from moestro.simulate.slots import SlotReplay
from moestro.simulate.timed import Machine, TimedReplay, TimedResult
from moestro.trace import Trace
from traces import random_trace

PLANE = 4096


def replay(trace: Trace, *, slots: int, machine: Machine, concurrency: int = 1) -> TimedResult:
    """With room for `slots` experts in all, least recently used first."""
    return TimedReplay(
        trace,
        plane_bytes=[[PLANE]] * trace.layers,
        memory=slots * PLANE,
        machine=machine,
        policy=LRU(),
        concurrency=concurrency,
    ).run()


def one_layer(*rows: list[int]) -> Trace:
    ids = np.array(rows, dtype=np.uint8)[:, None, :]
    weights = np.zeros_like(ids)
    weights[..., 0] = 255
    count = len(rows)
    return Trace(
        experts_NLK=ids,
        weights_NLK=weights,
        token_N=np.zeros(count, dtype=np.int32),
        offsets_R1=np.array([0, count]),
        meta=({},),
        num_experts=8,
        decode_N=np.ones(count, dtype=bool),
    )


def test_a_hit_is_computed_while_a_miss_is_read() -> None:
    machine = Machine(bytes_per_s=PLANE, layer_s=0.25, expert_s=0.5)  # a read takes a second
    # Both are read, one after the other, and computed as they come: 0.25 + 1 + 1 + 0.5.
    first = replay(one_layer([0, 1]), slots=3, machine=machine)
    assert first.seconds == pytest.approx(2.75)
    assert first.stats.stall_seconds == pytest.approx(1.5)
    # Then 1 is there and is computed while 2 is read: 0.25 + 1 + 0.5.
    both = replay(one_layer([0, 1], [1, 2]), slots=3, machine=machine)
    assert both.seconds == pytest.approx(2.75 + 1.75)
    assert (both.stats.hits, both.stats.misses, both.carried.demand) == (1, 3, 3 * PLANE)


def test_with_room_for_all_only_the_first_use_is_read() -> None:
    trace = random_trace(3, prompts=(0,), answers=(40,))
    result = replay(trace, slots=24, machine=Machine(bytes_per_s=1e6))
    distinct = sum(len(np.unique(trace.experts_NLK[:, layer])) for layer in range(3))
    assert result.stats.misses == distinct
    assert result.carried.demand == distinct * PLANE


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 500), concurrency=st.integers(1, 3), slots=st.integers(8, 24))
def test_time_is_computing_and_stalls(seed: int, concurrency: int, slots: int) -> None:
    trace = random_trace(seed, prompts=(4, 0, 2), answers=(5, 7, 3))
    machine = Machine(bytes_per_s=2e6, latency_s=1e-3, layer_s=2e-3, expert_s=1e-3)
    result = replay(trace, slots=slots, machine=machine, concurrency=concurrency)
    accesses = result.stats.hits + result.stats.misses
    passes = len(SlotReplay(trace, concurrency=concurrency)._passes)
    computing = accesses * machine.expert_s + passes * 3 * machine.layer_s
    assert result.seconds == pytest.approx(computing + result.stats.stall_seconds)
    assert result.carried.demand == result.stats.misses * PLANE == result.stats.bytes_read
    assert result.tokens == trace.rows


def test_one_layer_has_the_hits_of_the_yardstick() -> None:
    """With a single layer one cache for the model and equal slots per layer are the same thing."""
    trace = random_trace(5, prompts=(0,), answers=(60,), layers=1)
    (lru,) = SlotReplay(trace).lru([4])
    result = replay(trace, slots=4, machine=Machine(bytes_per_s=1e6))
    # Those of one pass are of one age: which of them leaves first may differ, how many hits on average does not.
    assert abs(result.stats.hits - lru.hits) <= 0.1 * lru.accesses
