"""Hit rates of every policy on recorded routing, and recall and calibration of every predictor one layer ahead.

    python benchmarks/foresight.py TRACE [--slots 4,8,16,24] [--policies lru,value/ensemble,...] [--judged N]
                                         [--predictors ensemble,...] [--concurrency C] [--out results.json]
                                         [--learn TRACE] [--nets FILE] [--plot reliability.svg]

Every other request is for learning (the learned predictor is trained on them, the others see them go by), the rest are
judged; or all of --learn is for learning. Hit rates: equal slots in every layer, prefetch off, every miss admitted, the
cache kept warm over requests. A policy goes by a predictor with a slash: value/ensemble (value alone: learned).
Recall: of the experts that a layer of decoded tokens then uses, those among as many of the likeliest, and among twice
as many, once the layer before has routed.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from judging import COLOURS, Case, case_of, new_figure, parser_of, save_figure, tidy

from moestro.policy.choice import policy_names
from moestro.simulate.passes import passes
from moestro.simulate.routings import gates_of, routings, tell_gates
from moestro.simulate.slots import SlotReplay

PREDICTORS = "popularity,recency,previous-token,previous-layer,eamc,ensemble,learned,ensemble+learned"
BINS = 20


def main() -> None:
    options = arguments()
    case = case_of(options)
    result: dict[str, Any] = {
        "trace": options.trace.name,
        "learned_from": case.learned_from.rows,
        "judged": case.judged.rows,
        "concurrency": options.concurrency,
        "hit_rates": hit_rates(case, [int(one) for one in options.slots.split(",")]),
        "recall": recalls(case),
    }
    case.save(result)
    if options.plot is not None:
        draw(result["recall"], options.plot)


def hit_rates(case: Case, slots: list[int]) -> dict[str, list[float]]:
    replay = SlotReplay(case.judged, concurrency=case.options.concurrency)
    lru, belady = replay.lru(slots), replay.belady(slots)
    rates = {"belady": [one.hit_rate for one in belady]}
    print(f"hit rates at {slots} slots; share of the way from LRU to Belady; seconds")
    print(f"{'belady':22s}", " ".join(f"{one.hit_rate:.4f}" for one in belady))
    for name in filter(None, case.options.policies.split(",")):
        started = time.perf_counter()
        policy, _, predictor = name.partition("/")
        choice = case.fitted(policy, predictor or "learned", prefetch=False)
        found = replay.run(choice.policy, slots, gates=gates_of(choice, predictor, case.judged))
        rates[name] = [one.hit_rate for one in found]
        gaps = [
            (one.hits - least.hits) / max(most.hits - least.hits, 1)
            for one, least, most in zip(found, lru, belady, strict=True)
        ]
        shown = " ".join(f"{one.hit_rate:.4f}" for one in found), " ".join(f"{gap:6.3f}" for gap in gaps)
        print(f"{name:22s}", *shown, f"{time.perf_counter() - started:6.1f}", flush=True)
    return rates


def recalls(case: Case) -> dict[str, dict[str, Any]]:
    found = {}
    print("recall one layer ahead when fetching as many as are used, and twice as many; calibration error; seconds")
    for name in filter(None, case.options.predictors.split(",")):
        started = time.perf_counter()
        one = found[name] = recall(case, name)
        shown = f"{one['once']:.4f} {one['twice']:.4f} {one['error']:.4f}"
        print(f"{name:22s}", shown, f"{time.perf_counter() - started:6.1f}", flush=True)
    return found


def recall(case: Case, name: str) -> dict[str, Any]:
    """Over passes of decoded rows alone, all layers but the first."""
    judged, choice = case.judged, case.fitted("lru", name, prefetch=True)
    predictor, gates = choice.predictor, gates_of(choice, name, judged)
    assert predictor is not None
    hits, asked, reliability_3B = np.zeros(2), 0, np.zeros((3, BINS))
    for one in passes(judged, concurrency=case.options.concurrency):
        for request in one.begins:
            predictor.begin(request)
        decode = all(rows.decode for rows in one.requests)
        for routing in routings(judged, one):
            if routing.layer and decode:
                chance_E = predictor.forecast(routing.layer, 1)
                used_E = routing.counts_E > 0
                count = int(np.count_nonzero(used_E))
                likely = np.argsort(-chance_E, kind="stable")
                hits += [used_E[likely[:count]].sum(), used_E[likely[: 2 * count]].sum()]
                asked += count
                bin_E = np.minimum((chance_E * BINS).astype(np.int64), BINS - 1)
                for total_B, weight_E in zip(reliability_3B, (chance_E, used_E, None), strict=True):
                    total_B += np.bincount(bin_E, weight_E, minlength=BINS)
            predictor.observe(routing)
            tell_gates(gates, judged, one, routing.layer)
        for request in one.ends:
            predictor.end(request)
    once, twice = (hits / max(asked, 1)).tolist()
    forecast_B, used_B, count_B = reliability_3B
    error = float(np.abs(forecast_B - used_B).sum() / max(count_B.sum(), 1))
    return {"once": once, "twice": twice, "error": error, "reliability": reliability_3B.tolist()}


def draw(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Share of experts used over what was forecast, and how often so much was forecast."""
    figure = new_figure(9, 3.8)
    came, often = figure.subplots(1, 2)
    came.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=1, label="as forecast")
    for colour, (name, one) in zip(COLOURS * 2, found.items(), strict=False):
        forecast_B, used_B, count_B = map(np.array, one["reliability"])
        seen = count_B >= 500
        mean_B = forecast_B[seen] / count_B[seen]
        label = f"{name} (off by {one['error']:.3f})"
        came.plot(mean_B, used_B[seen] / count_B[seen], "o-", markersize=3, color=colour, linewidth=1, label=label)
        often.semilogy(mean_B, count_B[seen] / count_B.sum(), "o-", markersize=3, color=colour, linewidth=1, label=name)
    tidy(came, "what came true", "forecast probability of use", "share used")
    tidy(often, "how often it was forecast", "forecast probability of use", "share of forecasts")
    save_figure(figure, path)


def arguments() -> argparse.Namespace:
    parser = parser_of(__doc__ or "")
    parser.add_argument("--slots", default="4,8,16,24")
    parser.add_argument("--policies", default=",".join(policy_names()))
    parser.add_argument("--predictors", default=PREDICTORS)
    parser.add_argument("--plot", type=Path, help="SVG or PNG of how forecasts came true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
