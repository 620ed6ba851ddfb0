"""What must hold for every policy and predictor while experts are read ahead, whatever the routing."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.foresight import TrainingOptions, train
from moestro.keys import PlaneKey
from moestro.memory.plane_cache import PlaneCache
from moestro.policy import Evictable, Need
from moestro.policy.choice import make_choice, policy_names
from moestro.policy.foresight import Foresight
from moestro.policy.observation import Routing, Shape
from moestro.policy.predictors import PREDICTORS
from moestro.policy.predictors.net import Nets
from moestro.policy.prefetch import Slack
from moestro.simulate.timed import Machine, TimedReplay
from moestro.trace import Trace
from traces import random_trace

SHAPE = Shape(3, 8, 2)
SIZES = [[1 << 19], [1 << 19, 1 << 20], [1 << 20]]
"""Of planes: small beside an arena's extents, as they are at run time."""
LARGEST = 3 << 19
PREDICTOR_NAMES = [*PREDICTORS, "ensemble", "ensemble+gate+learned"]
# Every policy with the predictor that knows most, and every predictor with the policy that goes by it.
PAIRS = [*((policy, "ensemble+gate") for policy in policy_names()), *(("value", name) for name in PREDICTOR_NAMES)]


@cache
def _nets() -> tuple[Nets, Nets]:
    return train(random_trace(9, prompts=(0,), answers=(300,)), TrainingOptions(epochs=1, width=4))


class Watched(Foresight):
    """Notes every decision, checks it, and has gates that say the same whenever the past is the same."""

    def __init__(self, policy: str, predictor: str, *, idle_s: float = 9.0) -> None:
        made = make_choice(policy, predictor, SHAPE, prefetch=True, nets=_nets()).foresight(prefetch=True)
        own = made._told[0] if len(made._told) > 1 else None
        super().__init__(made.eviction, prefetcher=made.prefetcher, own_predictor=own)  # type: ignore[arg-type]
        self._idle_s = idle_s
        self._past = 0
        self.decisions: list[tuple[Any, ...]] = []
        self.observed: list[int] = []  # how many decisions there were before each layer routed

    def observe(self, routing: Routing) -> None:
        self.observed.append(len(self.decisions))
        super().observe(routing)
        self._past = hash((self._past, routing.experts_TK.tobytes()))
        rng = np.random.default_rng(abs(self._past))
        ids_TC = rng.random((len(routing.experts_TK), SHAPE.experts)).argsort(axis=1)[:, :4]
        self.lookahead(routing.layer, 1, ids_TC)

    def propose(self, layer: int, slack: Slack) -> list[tuple[int, int]]:
        proposed = super().propose(layer, Slack(slack.read_s, self._idle_s * slack.read_s))
        self.decisions.append(("ahead", *proposed))
        return proposed


class Books:
    """The policy as a plane cache sees it, every call checked and noted."""

    def __init__(self, watched: Watched, memory: int) -> None:
        self._watched, self._memory = watched, memory
        self.held: dict[PlaneKey, int] = {}

    def on_load(self, key: PlaneKey, nbytes: int) -> None:
        assert key not in self.held, "fetched while resident or on its way"
        self.held[key] = nbytes
        assert sum(self.held.values()) <= self._memory
        self._watched.decisions.append(("load", key))
        self._watched.eviction.on_load(key, nbytes)

    def on_use(self, key: PlaneKey) -> None:
        self._watched.eviction.on_use(key)

    def on_evict(self, key: PlaneKey) -> None:
        del self.held[key]
        self._watched.decisions.append(("evict", key))
        self._watched.eviction.on_evict(key)

    def victim(self, need: Need, evictable: Evictable) -> PlaneKey | None:
        key = self._watched.eviction.victim(need, evictable)
        assert key is None or key in evictable
        return key

    def victims(self, count: int, evictable: Evictable) -> list[PlaneKey]:
        keys = self._watched.eviction.victims(count, evictable)
        assert len(keys) == len(set(keys)) <= count
        assert all(key in evictable for key in keys)
        return keys

    def worths(self) -> np.ndarray | None:
        return self._watched.eviction.worths()


def _replay(trace: Trace, watched: Watched, *, memory: int, concurrency: int = 1) -> TimedReplay:
    replay = TimedReplay(
        trace,
        plane_bytes=SIZES,
        memory=memory,
        machine=Machine(bytes_per_s=1e8, layer_s=0.01, expert_s=0.003),
        policy=Books(watched, memory),
        foresight=watched,
        concurrency=concurrency,
    )
    replay.run()
    return replay


@pytest.mark.parametrize(("policy", "predictor"), PAIRS, ids=lambda name: name)
@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    experts=st.integers(6, 20),
    concurrency=st.integers(1, 3),
    idle_s=st.sampled_from([0.3, 1.0, 9.0]),
)
def test_nothing_in_use_leaves_and_nothing_comes_twice(
    policy: str, predictor: str, seed: int, experts: int, concurrency: int, idle_s: float
) -> None:
    trace = random_trace(seed, prompts=(4, 0, 2), answers=(7, 9, 5))
    watched = Watched(policy, predictor, idle_s=idle_s)
    with pytest.MonkeyPatch.context() as patch:
        drop = PlaneCache._drop

        def check_and_drop(cache: PlaneCache, plane: Any, **how: bool) -> None:
            assert plane.leases == 0, "a plane in use lost its slot"
            drop(cache, plane, **how)

        patch.setattr(PlaneCache, "_drop", check_and_drop)
        replay = _replay(trace, watched, memory=experts * LARGEST, concurrency=concurrency)
    stats = replay._cache.stats
    assert stats.hits + stats.misses > 0
    assert 0 <= watched.foreseen.useful <= min(watched.foreseen.needed, watched.foreseen.made)
    assert stats.late_stall_seconds <= stats.stall_seconds


@pytest.mark.parametrize(("policy", "predictor"), PAIRS, ids=lambda name: name)
def test_no_peeking(policy: str, predictor: str) -> None:
    """Another future, the same loads, evictions and prefetches until it begins."""
    past = 30
    trace = random_trace(1, prompts=(0,), answers=(50,))
    order_N = np.arange(50)
    order_N[past:] = order_N[past:][::-1]
    shuffled = Trace(**{**vars(trace), "experts_NLK": trace.experts_NLK[order_N]})
    seen = []
    for one in (trace, shuffled):
        watched = Watched(policy, predictor)
        _replay(one, watched, memory=9 * LARGEST)
        seen.append(watched)
    # What the last layer of the past proposes is the last decision before the future.
    until = [watched.observed[past * SHAPE.layers] for watched in seen]
    assert until[0] == until[1]
    assert seen[0].decisions[: until[0]] == seen[1].decisions[: until[1]]
    assert seen[0].decisions != seen[1].decisions
    assert any(kind == "ahead" and proposed for kind, *proposed in seen[0].decisions)
