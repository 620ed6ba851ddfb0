"""Models of tens of thousands of experts can be simulated."""

from __future__ import annotations

import numpy as np
import pytest

from moestro.policy.choice import Choice, make_choice
from moestro.policy.observation import Shape
from moestro.simulate.slots import SlotReplay
from moestro.simulate.timed import Machine, TimedReplay
from moestro.trace import Trace

SHAPE = Shape(layers=30, experts=2048, picks=1)


@pytest.fixture(scope="module")
def switch() -> Trace:
    """Decoded rows as Switch-c-2048 would route them, each layer going around a pool of 8 experts."""
    rng = np.random.default_rng(0)
    pool_LP = rng.random((SHAPE.layers, SHAPE.experts)).argsort(axis=1)[:, :8]
    ids_NL = pool_LP[np.arange(SHAPE.layers), np.arange(16)[:, None] % 8]
    return Trace(
        experts_NLK=ids_NL[:, :, None].astype(np.uint16),
        weights_NLK=np.full((16, SHAPE.layers, 1), 255, np.uint8),
        token_N=np.zeros(16, np.int32),
        offsets_R1=np.array([0, 8, 16]),
        meta=({}, {}),
        num_experts=SHAPE.experts,
        decode_N=np.ones(16, bool),
    )


@pytest.mark.parametrize("policy", ["lrfu", "moe_infinity", "value"])
def test_tens_of_thousands_of_experts(switch: Trace, policy: str) -> None:
    def contender() -> Choice:
        return make_choice(policy, "ensemble", SHAPE, prefetch=True, nets=None)

    replay = SlotReplay(switch)
    (found,), (belady,) = replay.run(contender().policy, [8]), replay.belady([8])
    assert found == belady
    assert found.hits == 8 * SHAPE.layers
    foresight = contender().foresight(prefetch=True)
    timed = TimedReplay(
        switch,
        plane_bytes=[[4096]] * SHAPE.layers,
        memory=8 * SHAPE.layers * 4096,
        machine=Machine(bytes_per_s=1e9, layer_s=1e-4),
        policy=foresight.eviction,
        foresight=foresight,
    ).run()
    assert timed.stats.hits + timed.stats.misses == 16 * SHAPE.layers
