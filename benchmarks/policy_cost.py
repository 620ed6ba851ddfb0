"""What a decision costs: microseconds per layer of one decoded row, for every keep policy and predictor.

    python benchmarks/policy_cost.py [--passes 200] [--repeats 3] [NAME ...]

Routing is random but skewed (a slowly changing favourite set per layer), the same for all. A keep policy is timed over
`observe` and `worth`, a predictor over `observe` and one `forecast` of the next layer. Prints the median and the spread
of the repeats, each with fresh objects, after a warm-up of a quarter of the passes. The second shape has as many
experts as the largest Switch transformer published.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np

from moestro.policy.keeping import KEEP_POLICIES, make_keep_policy
from moestro.policy.knowledge import needs
from moestro.policy.observation import RequestRows, Routing, Shape
from moestro.policy.predictors import PREDICTORS, make_predictor

SHAPES = {"48 x 128, top 8": Shape(48, 128, 8), "30 x 2048, top 1": Shape(30, 2048, 1)}
REQUEST = 1


def routings(shape: Shape, passes: int) -> list[Routing]:
    """One row per layer and pass; three picks in four from 4 K favourites, which change every 50 passes."""
    rng = np.random.default_rng(0)
    rows = [RequestRows(REQUEST, 0, 1, decode=True)]
    made = []
    for step in range(passes):
        if step % 50 == 0:
            favourites_LF = rng.permuted(np.tile(np.arange(shape.experts), (shape.layers, 1)), axis=1)
        for layer in range(shape.layers):
            scores_E = rng.random(shape.experts)
            scores_E[favourites_LF[layer, : 4 * shape.picks]] += 1.5 * rng.random(4 * shape.picks)
            ids_1K = np.argsort(-scores_E)[None, : shape.picks]
            weights_1K = np.sort(rng.dirichlet(np.ones(shape.picks)))[None, ::-1].astype(np.float32)
            made.append(Routing.of(layer, ids_1K, weights_1K, rows, experts=shape.experts))
    return made


def keep_cost(name: str, shape: Shape, work: list[Routing], warm: int) -> float:
    """Microseconds per layer."""
    policy = make_keep_policy(name, shape)
    policy.begin(REQUEST)

    def step(routing: Routing) -> None:
        policy.observe(routing)
        policy.worth(routing.layer)

    return timed(step, work, warm)


def predictor_cost(name: str, shape: Shape, work: list[Routing], warm: int) -> float:
    """Microseconds per layer."""
    predictor = make_predictor(name, shape)
    predictor.begin(REQUEST)

    def step(routing: Routing) -> None:
        predictor.observe(routing)
        predictor.forecast((routing.layer + 1) % shape.layers)

    return timed(step, work, warm)


def timed(step: Callable[[Routing], None], work: list[Routing], warm: int) -> float:
    for routing in work[:warm]:
        step(routing)
    start = time.perf_counter()
    for routing in work[warm:]:
        step(routing)
    return (time.perf_counter() - start) * 1e6 / (len(work) - warm)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--passes", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    every = [(name, keep_cost) for name, factory in KEEP_POLICIES.items() if not needs(factory)]
    every += [(name, predictor_cost) for name, factory in PREDICTORS.items() if not needs(factory)]
    every.append(("ensemble", predictor_cost))
    for title, shape in SHAPES.items():
        work = routings(shape, args.passes)
        print(f"{title}: us per layer, median (least to most)")
        for name, cost in every:
            if args.names and name not in args.names:
                continue
            took = [cost(name, shape, work, len(work) // 4) for _ in range(args.repeats)]
            print(f"  {name:16s} {statistics.median(took):7.1f} ({min(took):.1f} to {max(took):.1f})", flush=True)


if __name__ == "__main__":
    main()
