"""Replay in time: small cases by hand, and what must hold whatever the routing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.policy import LRU
from moestro.policy.foresight import Foreseen, Foresight
from moestro.policy.keeping import make_keep_policy
from moestro.policy.keeping.eviction import WorthEviction
from moestro.policy.observation import Shape
from moestro.policy.prefetch import Prefetcher, Slack
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


def test_stalls_by_cause() -> None:
    """A read ahead that comes too late is waited for as such; the rest of the waiting is for demand."""
    machine = Machine(bytes_per_s=PLANE, layer_s=0.25)  # a read takes a second
    shape = Shape(1, 8, 2)

    class Told:
        """Says that 2 and 3 come next, which holds at the second row alone."""

        begin = end = observe = staticmethod(lambda _: None)
        forecast = staticmethod(lambda _layer, _horizon: np.array([0, 0, 1, 1, 0, 0, 0, 0], np.float32))

    class Idle(Prefetcher):
        def propose(self, layer: int, absent_E: np.ndarray, _slack: Slack) -> list[tuple[int, int]]:
            return super().propose(layer, absent_E, Slack(1.0, 9.0))

    foresight = Foresight(WorthEviction(make_keep_policy("lru", shape), shape), prefetcher=Idle(shape, Told()))
    result = TimedReplay(
        one_layer([0, 1], [2, 3], [4, 5]),
        plane_bytes=[[PLANE]],
        memory=8 * PLANE,
        machine=machine,
        policy=foresight.eviction,
        foresight=foresight,
    ).run()
    # 0 and 1 are waited for two seconds; of the two read ahead meanwhile a quarter second is gone at the second row;
    # 4 and 5 were not foreseen.
    assert result.stats.late_stall_seconds == pytest.approx(1.75)
    assert result.stats.stall_seconds == pytest.approx(2 + 1.75 + 2)
    assert result.stats.late_prefetches == 2
    assert result.foreseen == Foreseen(needed=4, made=2, useful=2)
    assert (result.foreseen.recall, result.foreseen.precision) == (0.5, 1.0)


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
