"""Hit rates with equal slots in every layer, prefetch off, every miss admitted: the yardstick that policies share.

A pass's accesses of a layer are its distinct experts; an access is a hit when the expert was resident before the pass.
What is kept afterwards are the experts of the pass and, of those that were resident, the ones of most worth. A policy's
worth does not depend on what is resident, so one replay serves any number of sizes.

Shapes: P passes, B rows of a pass, L MoE layers, E experts, K experts per row, S cache sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from moestro.policy.keeping.base import KeepPolicy
from moestro.policy.observation import Routing
from moestro.simulate.oracle import last_uses, next_uses
from moestro.simulate.passes import Pass, passes
from moestro.trace.trace import Trace

Worth = Callable[[int, Pass], np.ndarray]
"""(number of the pass, the pass) -> worth [L, E] of keeping each expert, each layer's row as of its own visit."""


@dataclass(frozen=True)
class SlotResult:
    """`hits` of `accesses` with `slots` experts of each layer resident."""

    slots: int
    hits: int
    accesses: int

    @property
    def hit_rate(self) -> float:
        return self.hits / max(self.accesses, 1)


class SlotReplay:
    """A trace laid out as passes, to be replayed with any policy."""

    def __init__(self, trace: Trace, *, concurrency: int = 1) -> None:
        self._trace = trace
        self._passes = list(passes(trace, concurrency=concurrency))
        layers = trace.experts_NLK.shape[1]
        self._uses_PLE = np.zeros((len(self._passes), layers, trace.num_experts), dtype=bool)
        for index, one in enumerate(self._passes):
            experts_LX = trace.experts_NLK[one.rows_B].transpose(1, 0, 2).reshape(layers, -1)
            np.put_along_axis(self._uses_PLE[index], experts_LX.astype(np.int64), True, axis=1)

    def lru(self, slots: Sequence[int]) -> list[SlotResult]:
        """Least recently used. Among those of one pass the lowest number leaves first."""
        last_PLE = last_uses(self._uses_PLE)
        return self._run(lambda index, _: last_PLE[index], slots)

    def belady(self, slots: Sequence[int]) -> list[SlotResult]:
        """The most hits that any policy can have under these rules."""
        next_PLE = next_uses(self._uses_PLE)
        return self._run(lambda index, _: -next_PLE[index], slots)

    def run(self, policy: KeepPolicy, slots: Sequence[int]) -> list[SlotResult]:
        """Those of a policy, which is told what it would be told at run time."""
        layers, experts = self._uses_PLE.shape[1:]
        trace = self._trace
        worth_LE = np.empty((layers, experts), dtype=np.float64)

        def worth(_index: int, one: Pass) -> np.ndarray:
            for request in one.begins:
                policy.begin(request)
            experts_BLK, weights_BLK = trace.experts_NLK[one.rows_B], trace.weights_NLK[one.rows_B] / np.float32(255)
            for layer in range(layers):
                ids_BK = experts_BLK[:, layer].astype(np.int64)
                policy.observe(Routing.of(layer, ids_BK, weights_BLK[:, layer], one.requests, experts=experts))
                worth_LE[layer] = policy.worth(layer)[layer]
            for request in one.ends:
                policy.end(request)
            return worth_LE

        return self._run(worth, slots)

    def _run(self, worth: Worth, slots: Sequence[int]) -> list[SlotResult]:
        _, layers, experts = self._uses_PLE.shape
        resident_SLE = np.zeros((len(slots), layers, experts), dtype=bool)
        hits_S = np.zeros(len(slots), dtype=np.int64)
        for index, one in enumerate(self._passes):
            used_LE = self._uses_PLE[index]
            hits_S += np.count_nonzero(resident_SLE & used_LE, axis=(1, 2))
            order_LE = _from_most_worth(worth(index, one), used_LE)
            for size, resident_LE in zip(slots, resident_SLE, strict=True):
                resident_LE |= used_LE
                _keep_first(resident_LE, order_LE, size)
        accesses = int(np.count_nonzero(self._uses_PLE))
        return [SlotResult(size, int(hits), accesses) for size, hits in zip(slots, hits_S, strict=True)]


def _from_most_worth(worth_LE: np.ndarray, used_LE: np.ndarray) -> np.ndarray:
    """Expert ids [L, E]: those used now first, then by falling worth, the higher number first among equals."""
    return np.argsort(np.where(used_LE, np.inf, worth_LE), axis=1, kind="stable")[:, ::-1]


def _keep_first(resident_LE: np.ndarray, order_LE: np.ndarray, size: int) -> None:
    """Of each layer's residents only the first `size` in this order stay."""
    sorted_LE = np.take_along_axis(resident_LE, order_LE, axis=1)
    sorted_LE &= np.cumsum(sorted_LE, axis=1) <= size
    np.put_along_axis(resident_LE, order_LE, sorted_LE, axis=1)
