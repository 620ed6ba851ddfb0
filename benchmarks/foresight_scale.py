"""Policies and the simulator with 61,440 experts, as many as Switch-c-2048 has: time a layer, memory.

    python benchmarks/foresight_scale.py [--requests N] [--policies lru,value/ensemble,...]

Routing is made up (a request draws from a pool of its own in each layer, popular experts are in more pools), so hit
rates say nothing; time and memory do not depend on it much.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np

from moestro.policy import LRU
from moestro.policy.choice import make_choice
from moestro.policy.observation import Shape
from moestro.simulate.slots import SlotReplay
from moestro.simulate.timed import Machine, TimedReplay
from moestro.trace import Trace

SHAPE = Shape(layers=30, experts=2048, picks=1)
TOKENS, POOL, EXPERT_BYTES = 64, 64, 12 << 20
SLOTS = (64, 256, 1024)
POLICIES = "lru,lfu,lrfu,hobbit,adapmoe,edgemoe,emoe,finemoe,moe_infinity,value/recency,value/eamc,value/ensemble"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--policies", default=POLICIES)
    options = parser.parse_args()
    trace = made_up(options.requests)
    visits = trace.rows * trace.layers
    print(
        f"{trace.rows} tokens; microseconds a layer: hit rates at {SLOTS}, and in time with {SLOTS[1]} of a layer; MiB"
    )
    replay = SlotReplay(trace)
    for name, run in (("LRU", replay.lru), ("Belady", replay.belady)):
        started = time.process_time()
        run(SLOTS)
        print(f"{name:16s} {1e6 * (time.process_time() - started) / visits:8.0f} {'':8s} {peak():6.0f}", flush=True)
    for name in options.policies.split(","):
        policy, _, predictor = name.partition("/")

        def make(policy: str = policy, predictor: str = predictor or "recency") -> tuple:
            choice = make_choice(policy, predictor, SHAPE, prefetch=bool(predictor), nets=None)
            return choice, choice.foresight(prefetch=bool(predictor))

        started = time.process_time()
        replay.run(make()[0].policy, SLOTS)
        slots_s, started = time.process_time() - started, time.process_time()
        in_time(trace, make()[1])
        timed_s = time.process_time() - started
        print(f"{name:16s} {1e6 * slots_s / visits:8.0f} {1e6 * timed_s / visits:8.0f} {peak():6.0f}", flush=True)


def in_time(trace: Trace, foresight) -> None:
    TimedReplay(
        trace,
        plane_bytes=[[EXPERT_BYTES]] * trace.layers,
        memory=SLOTS[1] * trace.layers * EXPERT_BYTES,
        machine=Machine(bytes_per_s=10e9, latency_s=1e-4, layer_s=1e-3, expert_s=1e-3),
        policy=LRU() if foresight is None else foresight.eviction,
        foresight=foresight,
    ).run()


def made_up(requests: int) -> Trace:
    """Decoded tokens of so many requests."""
    rng = np.random.default_rng(0)
    layers, experts, rows = SHAPE.layers, SHAPE.experts, requests * TOKENS
    popular_LE = rng.permuted(np.tile(np.arange(1, experts + 1) ** -0.8, (layers, 1)), axis=1)
    chance_LE = np.cumsum(popular_LE / popular_LE.sum(1, keepdims=True), axis=1)
    parts = []
    for _ in range(requests):
        pool_LP = np.stack([np.searchsorted(chance_E, rng.random(POOL)) for chance_E in chance_LE])
        parts.append(pool_LP[np.arange(layers), rng.integers(0, POOL, (TOKENS, layers))])
    ids_NLK = np.minimum(np.concatenate(parts), experts - 1)[:, :, None].astype(np.uint16)
    return Trace(
        experts_NLK=ids_NLK,
        weights_NLK=np.full(ids_NLK.shape, 255, np.uint8),
        token_N=np.zeros(rows, np.int32),
        offsets_R1=np.arange(0, rows + 1, TOKENS),
        meta=({},) * requests,
        num_experts=experts,
        decode_N=np.ones(rows, bool),
    )


def peak() -> float:
    """MiB that the process took at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
