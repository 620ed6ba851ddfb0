"""Experts behind a page cache: small cases by hand."""

from __future__ import annotations

import numpy as np
import pytest

from moestro.simulate.page_cache import READ_AHEAD, replay_page_cache
from moestro.simulate.timed import Machine
from moestro.trace import Trace
from traces import random_trace


def rows(*ids: list[int]) -> Trace:
    """One layer, a request."""
    experts = np.array(ids, dtype=np.uint8)[:, None, :]
    return Trace(
        experts_NLK=experts,
        weights_NLK=np.full_like(experts, 255 // len(ids[0])),
        token_N=np.zeros(len(ids), dtype=np.int32),
        offsets_R1=np.array([0, len(ids)]),
        meta=({},),
        num_experts=8,
        decode_N=np.ones(len(ids), dtype=bool),
    )


def test_windows_are_read_while_the_one_before_is_computed_with() -> None:
    # Two windows, each 1 s; half a second of computing each: 1 + 1 + .5, as .5 of the second read is hidden.
    machine = Machine(bytes_per_s=READ_AHEAD / 0.75, latency_s=0.25, layer_s=0.125, expert_s=1.0)
    result = replay_page_cache(rows([0], [0]), expert_bytes=[2 * READ_AHEAD], memory=2 * READ_AHEAD, machine=machine)
    assert result.seconds == pytest.approx(0.125 + 2.5 + 0.125 + 1.0)
    assert result.stats.stall_seconds == pytest.approx(1.5)
    assert (result.stats.hits, result.stats.misses, result.carried.demand) == (1, 1, 2 * READ_AHEAD)


def test_a_slow_way_to_the_device_is_what_counts() -> None:
    machine = Machine(bytes_per_s=READ_AHEAD, device_bytes_per_s=READ_AHEAD / 3)
    result = replay_page_cache(rows([0]), expert_bytes=[READ_AHEAD], memory=READ_AHEAD, machine=machine)
    assert result.seconds == pytest.approx(3)


def test_what_was_used_longest_ago_leaves() -> None:
    machine = Machine(bytes_per_s=1e9)
    trace = rows([0], [1], [0], [2], [0], [1])  # 2 takes the place of 1
    result = replay_page_cache(trace, expert_bytes=[4096], memory=2 * 4096 + 100, machine=machine)
    assert (result.stats.hits, result.stats.misses) == (2, 4)


def test_requests_in_flight_share_reads() -> None:
    trace = random_trace(0, prompts=(0, 0), answers=(20, 20))
    machine = Machine(bytes_per_s=1e9, latency_s=1e-4)
    one, two = (
        replay_page_cache(trace, expert_bytes=[4096] * 3, memory=12 * 4096, machine=machine, concurrency=count)
        for count in (1, 2)
    )
    assert one.tokens == two.tokens == 40
    assert one.stats.hits + one.stats.misses == 40 * 3 * 2 > two.stats.hits + two.stats.misses
