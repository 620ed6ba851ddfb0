"""Hit rates with equal slots: against plain lists, and Belady's rule against every choice that there is."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.policy.observation import Routing
from moestro.simulate.slots import SlotReplay
from moestro.trace import Trace
from traces import random_trace


def uses(trace: Trace, layer: int) -> list[set[int]]:
    return [set(row.tolist()) for row in trace.experts_NLK[:, layer]]


def lru_hits(accesses: list[set[int]], slots: int) -> int:
    """The textbook's, the lowest number leaving first among those of one pass."""
    held: dict[int, int] = {}
    hits = 0
    for now, used in enumerate(accesses):
        hits += len(used & held.keys())
        held.update(dict.fromkeys(used, now))
        while len(held) > max(slots, len(used)):
            del held[min(held, key=lambda expert: (held[expert], expert))]
    return hits


def most_hits(accesses: list[set[int]], slots: int) -> int:
    """The best of all ways to keep experts, when what a pass uses is admitted."""
    best: dict[frozenset[int], int] = {frozenset(): 0}
    for used in accesses:
        after: dict[frozenset[int], int] = {}
        for held, hits in best.items():
            others = held - used
            room = min(max(slots - len(used), 0), len(others))
            for kept in combinations(sorted(others), room):
                state = frozenset(used | set(kept))
                after[state] = max(after.get(state, 0), hits + len(used & held))
        best = after
    return max(best.values())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), slots=st.integers(2, 6))
def test_lru_and_belady(seed: int, slots: int) -> None:
    trace = random_trace(seed, prompts=(0, 0), answers=(7, 5), layers=2, experts=6, picks=2)
    replay = SlotReplay(trace)
    (lru,), (belady,) = replay.lru([slots]), replay.belady([slots])
    layers = [uses(trace, layer) for layer in range(2)]
    assert lru.hits == sum(lru_hits(one, slots) for one in layers)
    assert belady.hits == sum(most_hits(one, slots) for one in layers)
    assert lru.accesses == belady.accesses == replay.accesses().sum() == 2 * 12 * 2
    # The first pass finds nothing, and what a pass finds depends on those before it alone.
    (first,) = SlotReplay(trace.select([0])).lru([slots])
    assert first.hits_P[0] == 0
    assert lru.hits_P[:7].tolist() == first.hits_P.tolist()


class Oldest:
    """A policy that keeps what was used last, as it is told."""

    def __init__(self, layers: int, experts: int) -> None:
        self.last_LE = np.full((layers, experts), -1)
        self.now = 0
        self.log: list[tuple[str, int]] = []

    def begin(self, request: int) -> None:
        self.log.append(("begin", request))

    def end(self, request: int) -> None:
        self.log.append(("end", request))

    def observe(self, routing: Routing) -> None:
        self.now += routing.layer == 0
        self.last_LE[routing.layer, routing.counts_E > 0] = self.now

    def loaded(self, layer: int, expert: int) -> None:
        raise AssertionError((layer, expert))

    evicted = loaded

    def worth(self, _layer: int) -> np.ndarray:
        return self.last_LE


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), concurrency=st.integers(1, 4))
def test_a_policy_is_told_what_happens_and_asked_what_to_keep(seed: int, concurrency: int) -> None:
    trace = random_trace(seed, prompts=(3, 0, 2), answers=(4, 6, 3))
    replay = SlotReplay(trace, concurrency=concurrency)
    policy = Oldest(3, 8)
    assert replay.run(policy, [2, 3, 5, 8]) == replay.lru([2, 3, 5, 8])
    assert sorted(policy.log) == sorted([(what, request) for what in ("begin", "end") for request in range(3)])


def test_whoever_holds_all_misses_only_once() -> None:
    trace = random_trace(1, prompts=(0,), answers=(50,), experts=8)
    (all_held,) = SlotReplay(trace).lru([8])
    assert all_held.accesses - all_held.hits == sum(len(set().union(*uses(trace, layer))) for layer in range(3))
