"""Hit rates with equal slots in every layer, prefetch off, every miss admitted: the yardstick that policies share.

A pass's accesses of a layer are its distinct experts; an access is a hit when the expert was resident before the pass.
What is kept afterwards are the experts of the pass and, of those that were resident, the ones of most worth. A policy's
worth does not depend on what is resident, so one replay serves any number of sizes.

Shapes: P passes, B rows of a pass, U experts that a pass uses (number `layer x E + expert`), L MoE layers, E experts,
K experts per row, S cache sizes, V layers of caches that hold too much.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from moestro.policy.keeping.base import KeepPolicy
from moestro.policy.predictors import LooksAhead
from moestro.simulate.oracle import last_uses, next_uses
from moestro.simulate.passes import passes
from moestro.simulate.routings import routings, tell_gates
from moestro.trace.trace import Trace

_ONE_BY_ONE = 8
"""So many victims of a layer are looked for one after another; for more all are put in order."""


@dataclass(frozen=True)
class SlotResult:
    """`hits` of `accesses` with `slots` experts of each layer resident; `hits_P` those of each pass."""

    slots: int
    hits: int
    accesses: int
    hits_P: np.ndarray = field(compare=False, repr=False)

    @property
    def hit_rate(self) -> float:
        return self.hits / max(self.accesses, 1)


class SlotReplay:
    """A trace laid out as passes, to be replayed with any policy."""

    def __init__(self, trace: Trace, *, concurrency: int = 1) -> None:
        self._trace = trace
        self._passes = list(passes(trace, concurrency=concurrency))
        first_L1 = np.arange(trace.layers)[:, None] * trace.num_experts
        self._used_PU = [np.unique(trace.experts_NLK[one.rows_B] + first_L1) for one in self._passes]

    def lru(self, slots: Sequence[int]) -> list[SlotResult]:
        """Least recently used. Among those of one pass the lowest number leaves first."""
        return self._run(last_uses(self._used_PU, self._experts), slots)

    def belady(self, slots: Sequence[int]) -> list[SlotResult]:
        """The most hits that any policy can have under these rules."""
        return self._run((-next_X for next_X in next_uses(self._used_PU, self._experts)), slots)

    def run(self, policy: KeepPolicy, slots: Sequence[int], *, gates: LooksAhead | None = None) -> list[SlotResult]:
        """Those of a policy, which is told what it would be told at run time; `gates` is told the trace's lookahead."""
        return self._run(self._worths(policy, gates), slots)

    def accesses(self) -> np.ndarray:
        """[P] how many experts each pass uses."""
        return np.array([len(used_U) for used_U in self._used_PU])

    @property
    def _experts(self) -> int:
        return self._trace.layers * self._trace.num_experts

    def _worths(self, policy: KeepPolicy, gates: LooksAhead | None) -> Iterator[np.ndarray]:
        """After each pass the worth of keeping each expert, each layer's as of its own visit."""
        trace = self._trace
        worth_LE = np.empty((trace.layers, trace.num_experts), dtype=np.float64)
        for one in self._passes:
            for request in one.begins:
                policy.begin(request)
            for routing in routings(trace, one):
                policy.observe(routing)
                tell_gates(gates, trace, one, routing.layer)
                worth_LE[routing.layer] = policy.worth(routing.layer)[routing.layer]
            for request in one.ends:
                policy.end(request)
            yield worth_LE.reshape(-1)

    def _run(self, worths: Iterator[np.ndarray], slots: Sequence[int]) -> list[SlotResult]:
        layers, experts = self._trace.layers, self._trace.num_experts
        resident_SX = np.zeros((len(slots), self._experts), dtype=bool)
        held_SL = np.zeros((len(slots), layers), dtype=np.int64)
        slots_S1 = np.array(slots)[:, None]
        hits_SP = np.zeros((len(slots), len(self._used_PU)), dtype=np.int64)
        for index, (used_U, worth_X) in enumerate(zip(self._used_PU, worths, strict=True)):
            hit_SU = resident_SX[:, used_U]
            hits_SP[:, index] = np.count_nonzero(hit_SU, axis=1)
            resident_SX[:, used_U] = True
            cache_M, missed_M = np.nonzero(~hit_SU)
            np.add.at(held_SL, (cache_M, used_U[missed_M] // experts), 1)
            if (held_SL > slots_S1).any():
                resident_SLE = resident_SX.reshape(len(slots), layers, experts)
                _shrink(resident_SLE, held_SL, slots_S1, _kept_first(worth_X, used_U).reshape(layers, experts))
        accesses = sum(map(len, self._used_PU))
        return [
            SlotResult(size, int(hits_P.sum()), accesses, hits_P) for size, hits_P in zip(slots, hits_SP, strict=True)
        ]


def _kept_first(worth_X: np.ndarray, used_U: np.ndarray) -> np.ndarray:
    """[X] the worth of each expert, those used now above all others."""
    worth_X = worth_X.astype(np.float64)
    worth_X[used_U] = np.finfo(np.float64).max
    return worth_X


def _shrink(resident_SLE: np.ndarray, held_SL: np.ndarray, slots_S1: np.ndarray, worth_LE: np.ndarray) -> None:
    """The residents of least worth leave where there are too many, the lowest number first among equals."""
    cache_V, layer_V = np.nonzero(held_SL > slots_S1)
    over_V = (held_SL - slots_S1)[cache_V, layer_V]
    worth_VE = np.where(resident_SLE[cache_V, layer_V], worth_LE[layer_V], np.inf)
    if over_V.max() > _ONE_BY_ONE:
        rank_VE = np.argsort(np.argsort(worth_VE, axis=1, kind="stable"), axis=1, kind="stable")
        resident_SLE[cache_V, layer_V] &= rank_VE >= over_V[:, None]
    else:
        for turn in range(int(over_V.max())):
            rows_V = np.flatnonzero(over_V > turn)
            least_V = worth_VE[rows_V].argmin(axis=1)
            worth_VE[rows_V, least_V] = np.inf
            resident_SLE[cache_V[rows_V], layer_V[rows_V], least_V] = False
    held_SL[cache_V, layer_V] -= over_V
