"""What the runtime tells its policy of every layer, and what it reads ahead because of it.

Shapes: T rows of a step, H hidden width, K experts per row, E experts per layer, C candidates of a gate.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moestro.config import RuntimeOptions
from moestro.foresight import NETS_FILE, load_nets, worth_their_bytes
from moestro.memory.plane_cache import PlaneCache
from moestro.memory.planes import Chain
from moestro.memory.transfer import TransferEngine
from moestro.policy.choice import (
    ENSEMBLE,
    LEARNED,
    VALUE,
    check_names,
    make_choice,
    needs_collection,
    needs_gates,
    needs_nets,
)
from moestro.policy.foresight import Foreseen, Foresight
from moestro.policy.observation import RequestRows, Routing, Shape
from moestro.policy.prefetch import SlackMeter
from moestro.runtime.history import History, history_bytes
from moestro.runtime.levels import LayerLevels
from moestro.runtime.lookahead import Gates
from moestro.store.layout import Layout
from moestro.store.reader import Store

_WITHOUT_PREDICTOR = "lrfu"
_MEASURE_EVERY = 64


@dataclass(frozen=True)
class Chosen:
    """What a model runs with; `predictor` is empty where there is none."""

    policy: str
    predictor: str
    prefetch: bool

    @staticmethod
    def of(options: RuntimeOptions, *, nets_bytes: int, expert_bytes: int) -> Chosen:
        """What the options mean for a store whose nets (0: it has none) and experts take so many bytes.

        `auto` is the best that can be had. Raises RequestError for names that do not exist.
        """
        check_names(options.policy, options.predictor, more=("auto",))
        policy, predictor = options.policy, options.predictor
        if predictor == "auto":
            learned = nets_bytes > 0 and worth_their_bytes(nets_bytes, expert_bytes)
            predictor = LEARNED if learned else ENSEMBLE if policy == VALUE else ""
        if policy == "auto":
            policy = VALUE if predictor else _WITHOUT_PREDICTOR
        return Chosen(policy, predictor, options.prefetch == "on" and predictor != "")

    @property
    def by_history(self) -> bool:
        """Whether past requests have a part in it."""
        return needs_collection(self.policy, self.predictor, prefetch=self.prefetch)


def stored_nets_bytes(store: Path) -> int:
    """Size of the learned predictor in a store, 0 where there is none."""
    nets = store / NETS_FILE
    return nets.stat().st_size if nets.exists() else 0


def foresight_bytes(
    options: RuntimeOptions, shape: Shape, *, nets_bytes: int, expert_bytes: int, step_rows: int
) -> int:
    """Bytes that foresight takes: nets, what is kept of requests in flight and past, and what gates say of a step."""
    chosen = Chosen.of(options, nets_bytes=nets_bytes, expert_bytes=expert_bytes)
    total = shape.layers * shape.experts * (_LEVELS_PER_EXPERT + _PER_EXPERT * (1 + options.max_sequences))
    if needs_nets(chosen.policy, chosen.predictor, prefetch=chosen.prefetch):
        total += nets_bytes
    if needs_gates(chosen.predictor, prefetch=chosen.prefetch):
        total += step_rows * (_PER_SCORE * shape.experts + _PER_CANDIDATE * shape.picks)
    if options.learn == "on" or chosen.by_history:
        total += history_bytes(shape, step_rows=step_rows, max_sequences=options.max_sequences)
    return total


def open_history(options: RuntimeOptions, chosen: Chosen, store: Store, shape: Shape) -> History | None:
    """Past requests, of the store's file unless nothing is to be learned; None where nobody asks for them.

    Raises:
        TraceError: as `History`.
    """
    if options.learn != "on" and not chosen.by_history:
        return None
    return History(shape, store=None if options.learn == "off" else store.path, model=store.manifest.source.fingerprint)


def make_foresight(chosen: Chosen, store: Path, shape: Shape, history: History | None) -> Foresight:
    """Raises TraceError when the store's learned predictor is missing or damaged."""
    nets = None
    if needs_nets(chosen.policy, chosen.predictor, prefetch=chosen.prefetch):
        nets = load_nets(store / NETS_FILE, shape)
    collection = None if history is None else history.collections.decode
    choice = make_choice(
        chosen.policy, chosen.predictor, shape, prefetch=chosen.prefetch, nets=nets, collection=collection
    )
    return choice.foresight(prefetch=chosen.prefetch)


class LayerForesight:
    """Drives a `Foresight` by the real clock: `step`, then for each layer `routed`, `asked` and `served`.

    `gates` are asked for the next layers' candidates, if there are any; `levels`, if there are any, say which planes of
    an expert are worth reading ahead, and `also` which planes of variants go with it.
    """

    def __init__(
        self,
        foresight: Foresight,
        planes: PlaneCache,
        chains: Sequence[Sequence[Chain]],
        layouts: Sequence[Layout],
        transfers: TransferEngine,
        gates: Gates | None = None,
    ) -> None:
        self._foresight, self._planes, self._chains, self._transfers = foresight, planes, chains, transfers
        self._chain_bytes = [sum(plane.nbytes for plane in layout.planes) for layout in layouts]
        self._gates = gates
        self._meter = SlackMeter()
        self.requests: Sequence[RequestRows] = ()
        self.levels: LayerLevels | None = None
        self.also: Callable[[int, int], Chain] | None = None
        self._begun: set[int] = set()
        self._seconds_per_byte = 0.0
        self._asked = 0

    @property
    def foreseen(self) -> Foreseen:
        """What prefetching has done so far."""
        return self._foresight.foreseen

    def step(self, requests: Sequence[RequestRows]) -> None:
        """A forward pass over rows of these requests begins."""
        self.requests = requests
        for rows in requests:
            if rows.request not in self._begun:
                self._begun.add(rows.request)
                self._foresight.begin(rows.request)

    def end(self, request: int) -> None:
        """Nothing more comes of a request, whether it ever came this far or not."""
        if request in self._begun:
            self._begun.remove(request)
            self._foresight.end(request)

    def routed(self, routing: Routing) -> None:
        """A layer has routed; its planes are asked for next."""
        self._meter.routed(time.perf_counter())
        self._foresight.observe(routing)

    def passed(self, routing: Routing) -> None:
        """A layer has routed, and was computed from planes that nobody had to be asked for."""
        self._foresight.observe(routing)

    def asked(self, layer: int, hidden_TH: torch.Tensor, *, reading: bool) -> None:
        """All planes of the layer, whose experts take `hidden_TH`, have been asked for: read ahead what is worth it."""
        if self._foresight.prefetcher is None:
            return
        if self._gates is not None:
            for ahead, ids_TC in self._gates.candidates(layer, hidden_TH):
                self._foresight.lookahead(layer, ahead, ids_TC)
        target = (layer + 1) % len(self._chains)
        slack = self._meter.slack(self._read_seconds(target), reading=reading)
        chains = self._chains[target]
        levels = self.levels
        proposed = [
            chains[expert] if levels is None else levels.worth_reading(target, expert)
            for _, expert in self._foresight.propose(layer, slack)
            if expert < len(chains)
        ]
        if self.also is not None:
            proposed = [(*chain, *self.also(target, chain[0][1])) for chain in proposed]
        if proposed:
            self._planes.prefetch([key for chain in proposed for key in chain])

    def served(self, *, reading: bool) -> None:
        """Planes of the layer are in memory; the last call is what counts."""
        self._meter.served(time.perf_counter(), read=reading)

    def _read_seconds(self, layer: int) -> float:
        """Of an expert of the layer, by what reads took so far; 0 before the first."""
        if self._asked % _MEASURE_EVERY == 0:
            stats = self._transfers.stats
            self._seconds_per_byte = stats.busy_seconds / stats.bytes_read if stats.bytes_read else 0.0
        self._asked += 1
        return self._seconds_per_byte * self._chain_bytes[layer]


_PER_SCORE, _PER_CANDIDATE = 16, 96
"""Bytes for each row of a step: of every expert a score, its sorted copy and a mark; of a candidate (twice the picks)
its id, in all the places where it is compared."""

_PER_EXPERT = 64
"""Bytes that a policy keeps of each expert, and of each expert for each request: a dozen small numbers at most."""

_LEVELS_PER_EXPERT = 192
"""What is kept of an expert's levels: a few numbers for each of at most five."""
