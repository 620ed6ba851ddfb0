"""What a decision costs: microseconds per layer of one decoded row, for every keep policy and predictor.

    python benchmarks/policy_cost.py [--passes 200] [--repeats 3] [NAME ...]

Routing is random but skewed (a slowly changing favourite set per layer), the same for all. Of a policy: `observe` and
`worth`; with a quarter of the experts in memory also what choosing victims adds (and how many leave, per layer), and of
those that foresee what proposing experts to be read ahead adds. Of a predictor: `observe`, and a `forecast` of the next
layer. Nets are random: what they say does not change what they cost. Last, what is left where all experts are in memory
and layers are computed one by one (native passes tell no policy then). Median and 90th percentile of single layers, of
all repeats, each with fresh objects, after a warm-up of a quarter of the passes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

import numpy as np

from moestro.keys import PlaneKey
from moestro.policy import LRU, Need
from moestro.policy.choice import ENSEMBLE, LEARNED, VALUE, make_choice
from moestro.policy.foresight import Foresight
from moestro.policy.keeping import KEEP_POLICIES
from moestro.policy.knowledge import needs
from moestro.policy.observation import RequestRows, Routing, Shape
from moestro.policy.predictors import PREDICTORS
from moestro.policy.predictors.history import OWN, input_size
from moestro.policy.predictors.net import HORIZONS, Nets
from moestro.policy.prefetch import Slack

SHAPES = {
    "48 x 128, top 8": Shape(48, 128, 8),
    "24 x 32, top 4": Shape(24, 32, 4),
    "30 x 2048, top 1": Shape(30, 2048, 1),
}
REQUEST = 1
IN_MEMORY = 0.25
PLANE_BYTES = 4096
# A link that is idle for as long as two experts take.
SLACK = Slack(read_s=1.0, idle_s=2.0)

Step = Callable[[Routing], object]


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
            scores_E[favourites_LF[layer, : 4 * shape.picks]] += 1.5 * rng.random(min(4 * shape.picks, shape.experts))
            ids_1K = np.argsort(-scores_E)[None, : shape.picks]
            weights_1K = np.sort(rng.dirichlet(np.ones(shape.picks)))[None, ::-1].astype(np.float32)
            made.append(Routing.of(layer, ids_1K, weights_1K, rows, experts=shape.experts))
    return made


def random_nets(shape: Shape, horizons: int, *, width: int = 64) -> Nets:
    rng = np.random.default_rng(horizons)
    layers, experts, inputs = shape.layers, shape.experts, input_size(shape.experts)

    def normal(*sizes: int, spread: float) -> np.ndarray:
        return np.float32(spread) * rng.standard_normal(sizes, dtype=np.float32)

    return Nets(
        normal(layers, inputs, width, spread=inputs**-0.5),
        normal(layers, width, spread=0.1),
        normal(layers, width, horizons, experts, spread=width**-0.5),
        normal(layers, horizons, OWN, experts, spread=0.3),
        normal(layers, horizons, experts, spread=1.0),
    )


class Held:
    """Which planes may leave."""

    def __init__(self) -> None:
        self.keys: set[PlaneKey] = set()
        self.in_use: set[PlaneKey] = set()

    def __contains__(self, key: object) -> bool:
        return key in self.keys and key not in self.in_use

    def __iter__(self) -> Iterator[PlaneKey]:
        return iter(self.keys - self.in_use)

    def nbytes(self, _key: PlaneKey) -> int:
        return PLANE_BYTES


class Decisions:
    """A cache of one plane per expert, without bytes: what the runtime asks a policy, and how long that took."""

    def __init__(self, shape: Shape, foresight: Foresight) -> None:
        self._foresight, self._held = foresight, Held()
        self._most = int(IN_MEMORY * shape.layers * shape.experts)
        self.victims = 0
        foresight.begin(REQUEST)
        # Full from the start, as many of every layer: otherwise nothing would leave for the first hundred passes.
        for index in range(self._most):
            expert, layer = divmod(index, shape.layers)
            self._load((layer, expert, 0))

    def __call__(self, routing: Routing) -> int:
        """Nanoseconds."""
        start = time.perf_counter_ns()
        self._foresight.observe(routing)
        taken = time.perf_counter_ns() - start
        keys = [(routing.layer, expert, 0) for expert in routing.experts_TK[0].tolist()]
        self._held.in_use = set(keys)
        taken += sum(self._load(key) for key in keys if key not in self._held.keys)
        start = time.perf_counter_ns()
        ahead = self._foresight.propose(routing.layer, SLACK)
        taken += time.perf_counter_ns() - start
        return taken + sum(self._load((layer, expert, 0)) for layer, expert in ahead)

    def _load(self, key: PlaneKey) -> int:
        eviction, held = self._foresight.eviction, self._held
        start = time.perf_counter_ns()
        if len(held.keys) >= self._most:
            victim = eviction.victim(Need(key, PLANE_BYTES, urgent=True), held)
            assert victim is not None
            self.victims += 1
            eviction.on_evict(victim)
            held.keys.remove(victim)
        eviction.on_load(key, PLANE_BYTES)
        held.keys.add(key)
        return time.perf_counter_ns() - start


def timed(step: Step) -> Callable[[Routing], int]:
    def once(routing: Routing) -> int:
        start = time.perf_counter_ns()
        step(routing)
        return time.perf_counter_ns() - start

    return once


class Bench:
    """All that is measured with one shape, by name."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._nets = random_nets(shape, len(HORIZONS)), random_nets(shape, 1)
        self.makers: dict[str, Callable[[], Callable[[Routing], int]]] = {}
        plain = [name for name, factory in KEEP_POLICIES.items() if not needs(factory)]
        predictors = [name for name, factory in PREDICTORS.items() if not needs(factory)]
        for name in plain:
            self.makers[name] = lambda name=name: self._policy(name, LEARNED)
            self.makers[f"{name}, victims"] = lambda name=name: self._decisions(name, LEARNED, prefetch=False)
        for name in (LEARNED, ENSEMBLE):
            self.makers[f"{VALUE} ({name})"] = lambda name=name: self._policy(VALUE, name)
            for prefetch, what in ((False, "victims"), (True, "victims, prefetch")):
                self.makers[f"{VALUE} ({name}), {what}"] = lambda name=name, prefetch=prefetch: self._decisions(
                    VALUE, name, prefetch=prefetch
                )
        for name in (*predictors, LEARNED, ENSEMBLE):
            self.makers[f"predictor {name}"] = lambda name=name: self._predictor(name)
        self.makers["all in memory"] = self._whole

    def _policy(self, policy: str, predictor: str) -> Callable[[Routing], int]:
        made = make_choice(policy, predictor, self._shape, prefetch=False, nets=self._nets).policy
        made.begin(REQUEST)

        def step(routing: Routing) -> None:
            made.observe(routing)
            made.worth(routing.layer)

        return timed(step)

    def _decisions(self, policy: str, predictor: str, *, prefetch: bool) -> Callable[[Routing], int]:
        choice = make_choice(policy, predictor, self._shape, prefetch=prefetch, nets=self._nets)
        return Decisions(self._shape, choice.foresight(prefetch=prefetch))

    def _whole(self) -> Callable[[Routing], int]:
        """There is no foresight then, only least recently used, told of each expert that is asked for."""
        policy = LRU()
        for layer in range(self._shape.layers):
            for expert in range(self._shape.experts):
                policy.on_load((layer, expert, 0), PLANE_BYTES)

        def step(routing: Routing) -> None:
            for expert in routing.experts_TK[0].tolist():
                policy.on_use((routing.layer, expert, 0))

        return timed(step)

    def _predictor(self, name: str) -> Callable[[Routing], int]:
        predictor = make_choice("lru", name, self._shape, prefetch=True, nets=self._nets).predictor
        assert predictor is not None
        predictor.begin(REQUEST)

        def step(routing: Routing) -> None:
            predictor.observe(routing)
            predictor.forecast((routing.layer + 1) % self._shape.layers)

        return timed(step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="only what begins with one of these")
    parser.add_argument("--passes", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shapes", type=int, default=2, help="so many of: " + "; ".join(SHAPES))
    args = parser.parse_args()
    for title, shape in list(SHAPES.items())[: args.shapes]:
        work = routings(shape, args.passes)
        print(f"{title}: us per layer, median and 90th percentile")
        for name, make in Bench(shape).makers.items():
            if args.names and not name.startswith(tuple(args.names)):
                continue
            took: list[int] = []
            for _ in range(args.repeats):
                step = make()
                took += [step(routing) for routing in work][len(work) // 4 :]
            half, most = np.percentile(took, [50, 90]) / 1000
            left = f"  {step.victims / len(work):.2f} leave" if isinstance(step, Decisions) else ""
            print(f"  {name:36s} {half:7.1f} {most:7.1f}{left}", flush=True)


if __name__ == "__main__":
    main()
