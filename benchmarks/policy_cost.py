"""What a decision costs: microseconds per layer of one decoded row, for every keep policy and predictor.

    python benchmarks/policy_cost.py [--passes 200] [--repeats 3] [NAME ...]

Routing is random but skewed (a slowly changing favourite set per layer), the same for all. Of a policy: `observe` and
`worth`; with a quarter of the experts in memory also what choosing victims adds (and how many leave, per layer), and of
those that foresee what proposing experts to be read ahead adds: by the nets, or by what the next layer's gate says (it
is right about three picks in four here). Of a predictor: `observe`, and a `forecast` of the next layer. Nets are as
wide as those of `moestro trace fit` and trained for some seconds on routing of the same kind. Last, what is left where
all experts are in memory and layers are computed one by one (native passes tell no policy then). Median and 90th
percentile of single layers, of all repeats, each with fresh objects, after a warm-up of a quarter of the passes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np

from moestro.foresight import train
from moestro.keys import PlaneKey
from moestro.policy import LRU, Need
from moestro.policy.choice import ENSEMBLE, GATE, LEARNED, VALUE, make_choice
from moestro.policy.foresight import Foresight
from moestro.policy.keeping import KEEP_POLICIES
from moestro.policy.knowledge import needs
from moestro.policy.observation import RequestRows, Routing, Shape
from moestro.policy.predictors import PREDICTORS
from moestro.policy.predictors.net import Nets
from moestro.policy.prefetch import Slack
from moestro.trace import Trace

SHAPES = {
    "48 x 128, top 8": Shape(48, 128, 8),
    "24 x 32, top 4": Shape(24, 32, 4),
    "30 x 2048, top 1": Shape(30, 2048, 1),
}
REQUEST = 1
IN_MEMORY = 0.25
PLANE_BYTES = 4096
TRAINED_ON = 512
# A link that is idle for as long as two experts take.
SLACK = Slack(read_s=1.0, idle_s=2.0)

Step = Callable[[Routing], object]


def routings(shape: Shape, passes: int, *, seed: int = 0) -> list[Routing]:
    """One row per layer and pass; three picks in four from 4 K favourites, which change every 50 passes."""
    rng = np.random.default_rng(seed)
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


def trained_nets(shape: Shape, work: list[Routing]) -> tuple[Nets, Nets]:
    """On these passes as one request."""
    passes = len(work) // shape.layers
    experts_NLK = np.stack([one.experts_TK[0] for one in work]).reshape(passes, shape.layers, shape.picks)
    weights_NLK = np.stack([one.weights_TK[0] for one in work]).reshape(passes, shape.layers, shape.picks)
    return train(
        Trace(
            experts_NLK=experts_NLK.astype(np.uint16),
            weights_NLK=np.round(255 * weights_NLK).astype(np.uint8),
            token_N=np.zeros(passes, np.int32),
            offsets_R1=np.array([0, passes]),
            meta=({},),
            num_experts=shape.experts,
            decode_N=np.ones(passes, bool),
        )
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

    def __init__(self, shape: Shape, foresight: Foresight, *, gates: dict[int, np.ndarray] | None = None) -> None:
        self._foresight, self._held, self._gates = foresight, Held(), gates
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
        said_1C = None if self._gates is None else self._gates.get(id(routing))
        start = time.perf_counter_ns()
        if said_1C is not None:
            self._foresight.lookahead(routing.layer, 1, said_1C)
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


def gates_of(work: list[Routing], experts: int) -> dict[int, np.ndarray]:
    """By the id of a layer's routing, what the next layer's gate says early: 2 K experts, the likeliest first."""
    rng = np.random.default_rng(1)
    said = {}
    for one, following in pairwise(work):
        right_K = following.experts_TK[0]
        wrong_E = np.setdiff1d(rng.permutation(experts), right_K)
        first_K = np.where(rng.random(len(right_K)) < 0.75, right_K, wrong_E[: len(right_K)])
        rest = np.setdiff1d(np.concatenate([right_K, wrong_E]), first_K)
        said[id(one)] = np.concatenate([first_K, rng.permutation(rest)[: len(right_K)]])[None]
    return said


class Bench:
    """All that is measured with one shape, by name."""

    def __init__(self, shape: Shape, work: list[Routing]) -> None:
        self._shape = shape
        self._nets = trained_nets(shape, routings(shape, TRAINED_ON, seed=1))
        self._gates = gates_of(work, shape.experts)
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
        self.makers[f"{VALUE} ({LEARNED}), victims, prefetch by {GATE}"] = self._by_gate
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

    def _by_gate(self) -> Callable[[Routing], int]:
        choice = make_choice(VALUE, LEARNED, self._shape, prefetch=True, nets=self._nets, ahead=GATE)
        return Decisions(self._shape, choice.foresight(prefetch=True), gates=self._gates)

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
        for name, make in Bench(shape, work).makers.items():
            if args.names and not name.startswith(tuple(args.names)):
                continue
            took: list[int] = []
            for _ in range(args.repeats):
                step = make()
                took += [step(routing) for routing in work][len(work) // 4 :]
            half, most = np.percentile(took, [50, 90]) / 1000
            left = f"  {step.victims / len(work):.2f} leave" if isinstance(step, Decisions) else ""
            print(f"  {name:42s} {half:7.1f} {most:7.1f}{left}", flush=True)


if __name__ == "__main__":
    main()
