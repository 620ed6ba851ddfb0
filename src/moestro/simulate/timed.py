"""Replay of a trace through the plane cache of the runtime, over a virtual link: time per token, bytes, stalls.

Shapes: B rows of a pass, L MoE layers, E experts, K experts per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moestro.keys import PlaneExtent, PlaneKey
from moestro.memory.arena import Arena, extent_bytes_for
from moestro.memory.plane_cache import PlaneCache
from moestro.memory.planes import CacheStats
from moestro.policy.base import EvictionPolicy
from moestro.policy.foresight import Foreseen, Foresight
from moestro.policy.observation import Routing
from moestro.policy.predictors import LooksAhead
from moestro.policy.prefetch import SlackMeter
from moestro.simulate.link import LinkBytes, VirtualLink
from moestro.simulate.passes import Pass, passes
from moestro.simulate.routings import routings, tell_gates
from moestro.trace.trace import Trace


@dataclass(frozen=True, kw_only=True)
class Machine:
    """How long things take: bytes per second and latency of reads, bytes per second onward to a device (0: experts are
    computed where they are read to), computing a layer of a pass without its experts, and one expert of it."""

    bytes_per_s: float
    latency_s: float = 0.0
    device_bytes_per_s: float = 0.0
    layer_s: float = 0.0
    expert_s: float = 0.0


@dataclass(frozen=True)
class TimedResult:
    """What a replay took. `tokens` are rows of the trace."""

    tokens: int
    seconds: float
    stats: CacheStats
    carried: LinkBytes
    foreseen: Foreseen

    @property
    def time_per_token_s(self) -> float:
        return self.seconds / max(self.tokens, 1)


class TimedReplay:
    """One replay. `plane_bytes`: of each layer, the sizes of the planes of an expert; `memory`: bytes of the arena;
    `gates` is told the trace's lookahead."""

    def __init__(
        self,
        trace: Trace,
        *,
        plane_bytes: Sequence[Sequence[int]],
        memory: int,
        machine: Machine,
        policy: EvictionPolicy,
        foresight: Foresight | None = None,
        gates: LooksAhead | None = None,
        concurrency: int = 1,
    ) -> None:
        self._trace, self._machine, self._concurrency = trace, machine, concurrency
        self._gates = gates
        self._plane_bytes, self._foresight = plane_bytes, foresight
        self._link = VirtualLink(machine.bytes_per_s, machine.latency_s, machine.device_bytes_per_s)
        sizes = sorted({nbytes for layer in plane_bytes for nbytes in layer})
        self._cache = PlaneCache(
            arena=Arena(memory, extent_bytes_for(sizes), sizes),
            buffer=_NoBytes(),
            engine=self._link,
            policy=policy,
            locate=self._locate,
        )
        self._meter = SlackMeter()
        # As in the runtime, where a pass of one row is lent slots for what it may lack if experts take one each.
        one_slot = len(sizes) == 1 and all(len(layer) == 1 for layer in plane_bytes)
        self._lends = one_slot and foresight is not None and foresight.fetches

    def run(self) -> TimedResult:
        """Replay the whole trace, from an empty cache."""
        for one in passes(self._trace, concurrency=self._concurrency):
            self._pass(one)
        return TimedResult(
            tokens=len(self._trace.experts_NLK),
            seconds=self._link.clock(),
            stats=self._cache.stats,
            carried=self._link.carried,
            foreseen=Foreseen() if self._foresight is None else self._foresight.foreseen,
        )

    def _pass(self, one: Pass) -> None:
        foresight = self._foresight
        if foresight is not None:
            for request in one.begins:
                foresight.begin(request)
        self._cache.give_up(self._plane_bytes[0][0] if self._lends and len(one.rows_B) == 1 else 0)
        for routing in routings(self._trace, one):
            self._layer(one, routing)
        if foresight is not None:
            for request in one.ends:
                foresight.end(request)

    def _layer(self, one: Pass, routing: Routing) -> None:
        layer, machine = routing.layer, self._machine
        self._link.pass_time(machine.layer_s)
        self._meter.routed(self._link.clock())
        used = np.flatnonzero(routing.counts_E)
        if self._foresight is not None:
            self._foresight.observe(routing)
        tell_gates(self._gates, self._trace, one, layer)
        planes = range(len(self._plane_bytes[layer]))
        chains = [tuple((layer, expert, plane) for plane in planes) for expert in used.tolist()]
        with self._cache.stream(chains) as batches:
            reading = batches.reading
            self._propose(layer, reading=reading)
            served_s = self._link.clock()
            for batch in batches:
                served_s = self._link.clock()
                self._link.pass_time(machine.expert_s * len(batch))
        self._meter.served(served_s, read=reading)

    def _propose(self, layer: int, *, reading: bool) -> None:
        foresight = self._foresight
        if foresight is None or foresight.prefetcher is None:
            return
        target = (layer + 1) % len(self._plane_bytes)
        read_s = self._link.seconds_for(sum(self._plane_bytes[target]))
        proposed = foresight.propose(layer, self._meter.slack(read_s, reading=reading))
        if proposed:
            self._cache.prefetch(
                [(where, expert, plane) for where, expert in proposed for plane in range(len(self._plane_bytes[where]))]
            )

    def _locate(self, key: PlaneKey) -> PlaneExtent:
        layer, _, plane = key
        return PlaneExtent(_NOWHERE, 0, self._plane_bytes[layer][plane], 0)


_NOWHERE = Path()


class _NoBytes:
    def view(self, _offset: int, _nbytes: int) -> memoryview:
        return memoryview(b"")
