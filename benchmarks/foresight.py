"""Hit rates of every policy on recorded routing, and recall of every predictor one layer ahead.

    python benchmarks/foresight.py TRACE [--slots 4,8,16,24] [--policies lru,...] [--predictors ensemble,...]
                                         [--requests N] [--concurrency C] [--out results.json]

Every other request is for learning (the learned predictor is trained on them, the others see them go by), the rest are
judged. Hit rates: equal slots in every layer, prefetch off, every miss admitted, the cache kept warm over requests.
Recall: of the experts that a layer then uses, those among the likeliest K and 2 K, once the layer before has routed.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from moestro.foresight import TrainingOptions, train
from moestro.policy.choice import Choice, make_choice, needs_nets, policy_names
from moestro.policy.observation import Routing, Shape
from moestro.policy.predictors.net import Nets
from moestro.simulate.fit import fit
from moestro.simulate.passes import passes
from moestro.simulate.slots import SlotReplay
from moestro.trace import Trace

PREDICTORS = "popularity,recency,previous-token,previous-layer,eamc,ensemble,learned,ensemble+learned"


def main() -> None:
    options = arguments()
    trace = Trace.load(options.trace)
    requests = np.arange(min(trace.requests, options.requests or trace.requests))
    learned_from, judged = trace.select(requests[::2]), trace.select(requests[1::2])
    shape = Shape(trace.layers, trace.num_experts, trace.picks)
    result: dict[str, object] = {"trace": options.trace.name, "learned_from": learned_from.rows, "judged": judged.rows}
    started = time.perf_counter()
    nets = train(learned_from, TrainingOptions(epochs=options.epochs, width=options.width))
    result["training_s"] = round(time.perf_counter() - started, 1)
    print(f"trained on {learned_from.rows} rows in {result['training_s']} s, judging on {judged.rows}")
    slots = [int(one) for one in options.slots.split(",")]
    result["hit_rates"] = hit_rates(options, shape, learned_from, judged, nets, slots)
    result["recall"] = recalls(options, shape, learned_from, judged, nets)
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def hit_rates(
    options: argparse.Namespace,
    shape: Shape,
    learned_from: Trace,
    judged: Trace,
    nets: tuple[Nets, Nets],
    slots: list[int],
) -> dict[str, list[float]]:
    replay = SlotReplay(judged, concurrency=options.concurrency)
    lru, belady = replay.lru(slots), replay.belady(slots)
    rates = {"belady": [one.hit_rate for one in belady]}
    print(f"hit rates at {options.slots} slots; share of the way from LRU to Belady; seconds")
    print(f"{'belady':18s}", " ".join(f"{one.hit_rate:.4f}" for one in belady))
    for name in filter(None, options.policies.split(",")):
        started = time.perf_counter()
        choice = choose(name, shape, nets, learned_from)
        found = replay.run(choice.policy, slots)
        rates[name] = [one.hit_rate for one in found]
        gaps = [
            (one.hits - least.hits) / max(most.hits - least.hits, 1)
            for one, least, most in zip(found, lru, belady, strict=True)
        ]
        shown = " ".join(f"{one.hit_rate:.4f}" for one in found), " ".join(f"{gap:6.3f}" for gap in gaps)
        print(f"{name:18s}", *shown, f"{time.perf_counter() - started:6.1f}", flush=True)
    return rates


def choose(name: str, shape: Shape, nets: tuple[Nets, Nets], learned_from: Trace) -> Choice:
    predictor = "learned"
    known = nets if needs_nets(name, predictor, prefetch=False) else None
    choice = make_choice(name, predictor, shape, prefetch=False, nets=known)
    fit(choice, learned_from)
    return choice


def recalls(
    options: argparse.Namespace, shape: Shape, learned_from: Trace, judged: Trace, nets: tuple[Nets, Nets]
) -> dict[str, list[float]]:
    found = {}
    print("recall one layer ahead when fetching K and 2 K; seconds")
    for name in filter(None, options.predictors.split(",")):
        started = time.perf_counter()
        choice = make_choice("lru", name, shape, prefetch=True, nets=nets if "learned" in name.split("+") else None)
        fit(choice, learned_from)
        found[name] = recall(choice, shape, judged)
        shown = " ".join(f"{one:.4f}" for one in found[name])
        print(f"{name:18s}", shown, f"{time.perf_counter() - started:6.1f}", flush=True)
    return found


def recall(choice: Choice, shape: Shape, judged: Trace) -> list[float]:
    """Over decoded rows, all layers but the first."""
    predictor, hits, asked = choice.predictor, np.zeros(2), 0
    assert predictor is not None
    for one in passes(judged):
        for request in one.begins:
            predictor.begin(request)
        ids_BLK = judged.experts_NLK[one.rows_B].astype(np.int64)
        weights_BLK = judged.weights_NLK[one.rows_B] / np.float32(255)
        for layer in range(shape.layers):
            routing = Routing.of(layer, ids_BLK[:, layer], weights_BLK[:, layer], one.requests, experts=shape.experts)
            if layer and one.requests[0].decode:
                likely = np.argsort(-predictor.forecast(layer, 1), kind="stable")
                used_E = routing.counts_E > 0
                hits += [used_E[likely[: shape.picks]].sum(), used_E[likely[: 2 * shape.picks]].sum()]
                asked += int(used_E.sum())
            predictor.observe(routing)
        for request in one.ends:
            predictor.end(request)
    return (hits / max(asked, 1)).tolist()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--slots", default="4,8,16,24")
    parser.add_argument("--policies", default=",".join(policy_names()))
    parser.add_argument("--predictors", default=PREDICTORS)
    parser.add_argument("--requests", type=int, default=0, help="the first so many of the trace (0: all)")
    parser.add_argument("--concurrency", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
