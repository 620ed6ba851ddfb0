"""MoE-Infinity taken apart: what of the published method brings how much, on recorded routing.

    python benchmarks/foresight_ablation.py TRACE [--judged N] [--slots 8,16] [--timed 8] [--out results.json]

Collections hold the requests that are learnt from and stay as they are. Hit rates are of the cache alone (equal slots,
no prefetch). Then the cache with and without the published prefetch, in virtual time: after each layer the absent
experts of all layers to come by p (1 - distance / layers), the best eight queued behind all demand, whether it pays or
not; and ours, which asks for the next layer's experts only and only where it pays.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from judging import Case, case_of, evenly, parser_of

from moestro.config import SimulateOptions
from moestro.policy import LRU
from moestro.policy.foresight import Foresight
from moestro.policy.keeping import KeepPolicy, make_keep_policy
from moestro.policy.keeping.eviction import WorthEviction
from moestro.policy.keeping.moe_infinity import MoEInfinity
from moestro.policy.observation import Routing, Shape
from moestro.policy.predictors import make_predictor
from moestro.policy.predictors.eamc import Matching
from moestro.policy.prefetch import Prefetcher, Slack
from moestro.simulate.simulation import expert_bytes_of, machine_of
from moestro.simulate.slots import SlotReplay
from moestro.simulate.timed import TimedReplay, TimedResult
from moestro.trace import EamCollection, Trace
from moestro.trace.eam import request_eam

MOST = 8


class Seldom(Matching):
    """Looks entries up less often than after each layer: after the last layer of each pass, or of the first alone."""

    def __init__(self, shape: Shape, collection: EamCollection, *, once: bool) -> None:
        super().__init__(shape, collection, nearest=1)
        self._once = once

    def observe(self, routing: Routing) -> list[tuple[int, bool]]:
        """As `Matching.observe`, but for most layers nothing changes."""
        before = {request: (one.entries_M, one.similarity_M) for request, one in self.followed.items()}
        changed = super().observe(routing)
        found = []
        for request, other in changed:
            last = routing.layer == self._shape.layers - 1
            entries_M, similarity_M = before[request]
            due = last and not (self._once and len(entries_M))
            if not due:
                self.followed[request].entries_M, self.followed[request].similarity_M = entries_M, similarity_M
            else:
                other = not np.array_equal(entries_M, self.followed[request].entries_M)
            found.append((request, other and due))
        return found


class Variant(MoEInfinity):
    """The published policy with parts of it changed."""

    def __init__(
        self, shape: Shape, collection: EamCollection, *, refine: str = "layer", decay: bool = True, nearest: int = 1
    ) -> None:
        super().__init__(shape, collection=collection, nearest=nearest)
        if refine != "layer":
            self._matching = Seldom(shape, collection, once=refine == "request")
        if not decay:
            self._decay_L1 = np.ones((shape.layers, 1))

    def shares(self) -> np.ndarray:
        """[L, E] pEAM, summed over the requests in flight."""
        return np.asarray(sum(self._part.values()))


class PublishedPrefetcher:
    """In the place of a `Prefetcher`: all layers to come, by probability times proximity, whether it pays or not."""

    def __init__(self, shape: Shape, policy: Variant, *, decay: bool) -> None:
        self._shape, self._policy, self._decay = shape, policy, decay

    def target(self, layer: int) -> int:
        """Of which layer outcomes are counted."""
        return (layer + 1) % self._shape.layers

    def judge(self, layer: int, counts_E: np.ndarray) -> None:
        """Outcomes change nothing."""

    def propose(self, layer: int, absent: Callable[[int], np.ndarray], _slack: Slack) -> list[tuple[int, int]]:
        """The best of the layers after this one."""
        layers, experts = self._shape.layers, self._shape.experts
        if layer == layers - 1:
            return []
        coming = np.arange(layer + 1, layers)
        chance_AE = self._policy.shares()[coming] + 1e-6
        if self._decay:
            chance_AE = chance_AE * (1 - (coming - layer) / layers)[:, None]
        chance_AE = np.where(np.stack([absent(one) for one in coming]), chance_AE, 0)
        best = np.argsort(-chance_AE, axis=None, kind="stable")[:MOST]
        return [(int(coming[one // experts]), int(one % experts)) for one in best if chance_AE.flat[one] > 0]


def collection_of(trace: Trace, *, aggregated: bool) -> EamCollection:
    """An entry for each request, or one for all."""
    eams = [request_eam(trace, request, decode=True) for request in range(trace.requests)]
    collection = EamCollection(trace.layers, trace.num_experts, capacity=max(len(eams), 1))
    for eam_LE in [np.sum(eams, axis=0)] if aggregated else eams:
        collection.insert(eam_LE)
    return collection


def main() -> None:
    parser = parser_of(__doc__ or "")
    parser.add_argument("--slots", default="8,16")
    parser.add_argument("--timed", type=int, default=8, help="requests replayed in time")
    parser.add_argument("--parts", default="caches,timed", help="what to measure")
    parser.add_argument("--links", default="2.6GB,25GB")
    parser.add_argument("--model-shape", default="2880x2880x4")
    options = parser.parse_args()
    case = case_of(options)
    slots = [int(one) for one in options.slots.split(",")]
    requests = collection_of(case.learned_from, aggregated=False)
    whole = collection_of(case.learned_from, aggregated=True)
    result: dict[str, Any] = {}
    if "caches" in options.parts:
        result["hit_rates"] = caches(case, slots, requests, whole)
    if "timed" in options.parts:
        result["timed"] = timed(case, options, slots, requests)
    case.save(result)


def caches(case: Case, slots: list[int], requests: EamCollection, whole: EamCollection) -> dict[str, list[float]]:
    shape = case.shape
    replay = SlotReplay(case.judged)
    policies: dict[str, Callable[[], KeepPolicy]] = {
        "as published": lambda: Variant(shape, requests),
        "one matrix of all requests": lambda: Variant(shape, whole),
        "matched once a token": lambda: Variant(shape, requests, refine="token"),
        "matched once a request": lambda: Variant(shape, requests, refine="request"),
        "eight nearest, not one": lambda: Variant(shape, requests, nearest=8),
        "its code's LFU instead": lambda: make_keep_policy("lfu", shape),
    }
    print(f"hit rates at {slots} slots")
    rates = {}
    for name, found in (("LRU", replay.lru(slots)), ("Belady", replay.belady(slots))):
        rates[name] = [one.hit_rate for one in found]
        print(f"{name:28s}", *(f"{rate:.4f}" for rate in rates[name]), flush=True)
    for name, make in policies.items():
        rates[name] = [one.hit_rate for one in replay.run(make(), slots)]
        print(f"{name:28s}", *(f"{rate:.4f}" for rate in rates[name]), flush=True)
    return rates


def timed(case: Case, options: argparse.Namespace, slots: list[int], requests: EamCollection) -> list[dict[str, Any]]:
    judged, rows = evenly(case.judged, options.timed), []
    print("slots, link: milliseconds a token, stalled, MB asked for + read ahead (wasted)")
    for count in slots:
        for link in options.links.split(","):
            for name, make in pairs(case.shape, requests).items():
                started = time.perf_counter()
                foresight = make()
                found = run(case, options, judged, count, link, foresight)
                rows.append({"slots": count, "link": link, "name": name, **figures(found)})
                shown = "{ms:8.2f} {stall_ms:8.2f} {demand_mb:7.1f} + {prefetch_mb:6.1f} ({wasted_mb:.1f})"
                seconds = time.perf_counter() - started
                print(f"{count:3d} {link:>6s} {name:44s}", shown.format(**rows[-1]), f"{seconds:4.0f} s", flush=True)
    return rows


def pairs(shape: Shape, requests: EamCollection) -> dict[str, Callable[[], Foresight | None]]:
    """Cache and prefetch, each published or not."""

    def published(*, decay: bool, lru: bool = False) -> Foresight:
        policy = Variant(shape, requests)
        eviction = WorthEviction(make_keep_policy("lru", shape) if lru else policy, shape)
        prefetcher: Any = PublishedPrefetcher(shape, policy, decay=decay)
        return Foresight(eviction, prefetcher=prefetcher, own_predictor=policy if lru else None)

    def ours() -> Foresight:
        predictor = make_predictor("eamc", shape, collection=requests)
        policy = WorthEviction(Variant(shape, requests), shape)
        return Foresight(policy, prefetcher=Prefetcher(shape, predictor), own_predictor=predictor)

    return {
        "LRU, no prefetch": lambda: None,
        "published cache, no prefetch": lambda: Foresight(WorthEviction(Variant(shape, requests), shape)),
        "the same without decay over layers": lambda: Foresight(
            WorthEviction(Variant(shape, requests, decay=False), shape)
        ),
        "LRU, published prefetch": lambda: published(decay=True, lru=True),
        "published cache and prefetch": lambda: published(decay=True),
        "the same, prefetch without decay over distance": lambda: published(decay=False),
        "published cache, ours where it pays": ours,
    }


def run(
    case: Case, options: argparse.Namespace, judged: Trace, slots: int, link: str, foresight: Foresight | None
) -> TimedResult:
    expert_bytes = expert_bytes_of(options.model_shape)
    return TimedReplay(
        judged,
        plane_bytes=[[expert_bytes]] * case.shape.layers,
        memory=slots * case.shape.layers * expert_bytes,
        machine=machine_of(SimulateOptions(slots="1", disk_bw=link), case.shape),
        policy=LRU() if foresight is None else foresight.eviction,
        foresight=foresight,
    ).run()


def figures(found: TimedResult) -> dict[str, float]:
    tokens = found.tokens
    return {
        "ms": 1e3 * found.time_per_token_s,
        "stall_ms": 1e3 * found.stats.stall_seconds / tokens,
        "demand_mb": found.carried.demand / tokens / 1e6,
        "prefetch_mb": found.carried.prefetch / tokens / 1e6,
        "wasted_mb": found.stats.wasted_bytes / tokens / 1e6,
    }


if __name__ == "__main__":
    main()
