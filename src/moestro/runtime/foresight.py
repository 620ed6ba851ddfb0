"""What the runtime tells its policy of every layer, and what it reads ahead because of it.

Shapes: T rows of a step, H hidden width, K experts per row, E experts per layer, C candidates of a gate.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch

from moestro.config import RuntimeOptions
from moestro.foresight import NETS_FILE, load_nets, worth_their_bytes
from moestro.keys import PlaneKey
from moestro.memory.lending import Visit
from moestro.memory.plane_cache import PlaneCache
from moestro.memory.planes import Chain
from moestro.memory.tickets import PIECE_BYTES
from moestro.memory.transfer import TransferEngine
from moestro.policy.choice import (
    ENSEMBLE,
    GATE,
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
from moestro.policy.predictors.folded import state_bytes
from moestro.policy.prefetch import Slack, SlackMeter, Strain
from moestro.runtime.history import History, history_bytes
from moestro.runtime.levels import LayerLevels
from moestro.runtime.lookahead import Looks
from moestro.store.layout import Layout
from moestro.store.reader import Store

_WITHOUT_PREDICTOR = "lrfu"
_BARREN, _TRY_EVERY = 256, 16
"""After so many layers with nothing worth reading ahead, one step in so many looks whether there is again."""
_MEASURE_EVERY = 64
_MEASURE_BYTES = 16
"""What reads take is looked at every so many layers, over so many experts at least: the disk changes."""


@dataclass(frozen=True)
class Chosen:
    """What a model runs with: `predictor` is what the policy goes by, `ahead` what is read ahead by; empty: nothing."""

    policy: str
    predictor: str
    ahead: str

    @staticmethod
    def of(options: RuntimeOptions, *, nets_bytes: int, expert_bytes: int, gates: bool) -> Chosen:
        """What the options mean for a store whose nets (0: it has none) and experts take so many bytes.

        `auto` is the best that can be had; `gates`: whether those of the model can be asked early. What is to be kept
        is asked of histories, as a gate sees nothing but this token; what is read ahead, of gates.
        Raises RequestError for names that do not exist.
        """
        check_names(options.policy, options.predictor, more=("auto",))
        policy, predictor = options.policy, options.predictor
        if predictor == "auto":
            learned = nets_bytes > 0 and worth_their_bytes(nets_bytes, expert_bytes)
            predictor = LEARNED if learned else ENSEMBLE if policy == VALUE else ""
        if policy == "auto":
            policy = VALUE if predictor else _WITHOUT_PREDICTOR
        ahead = GATE if options.predictor == "auto" and gates else predictor
        return Chosen(policy, predictor, ahead if options.prefetch != "off" else "")

    @property
    def by_history(self) -> bool:
        """Whether past requests have a part in it."""
        return needs_collection(self.policy, self.predictor, prefetch=False) or (
            self.ahead != "" and needs_collection(VALUE, self.ahead, prefetch=True)
        )

    @property
    def by_nets(self) -> bool:
        """Whether the nets of the learned predictor have a part in it."""
        return needs_nets(self.policy, self.predictor, prefetch=False) or needs_nets(VALUE, self.ahead, prefetch=True)


def stored_nets_bytes(store: Path) -> int:
    """Size of the learned predictor in a store, 0 where there is none."""
    nets = store / NETS_FILE
    return nets.stat().st_size if nets.exists() else 0


def foresight_bytes(
    options: RuntimeOptions, shape: Shape, *, nets_bytes: int, expert_bytes: int, step_rows: int
) -> int:
    """Bytes that foresight takes: nets, what is kept of requests in flight and past, and what gates say of a step."""
    chosen = Chosen.of(options, nets_bytes=nets_bytes, expert_bytes=expert_bytes, gates=True)
    total = shape.layers * shape.experts * (_LEVELS_PER_EXPERT + _PER_EXPERT * (1 + options.max_sequences))
    if chosen.by_nets:
        # Twice: what is kept of requests moves when there are more of them than ever.
        total += nets_bytes + 2 * (1 + options.max_sequences) * state_bytes(shape, nets_bytes)
    if needs_gates(chosen.ahead):
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
    if chosen.by_nets:
        nets = load_nets(store / NETS_FILE, shape)
    collection = None if history is None else history.collections.decode
    prefetch = chosen.ahead != ""
    choice = make_choice(
        chosen.policy,
        chosen.predictor,
        shape,
        prefetch=prefetch,
        nets=nets,
        collection=collection,
        ahead=chosen.ahead,
    )
    return choice.foresight(prefetch=prefetch)


class Spared:
    """The planes of some experts, by layer, as a container of keys. Shape: bool [E] for each layer."""

    def __init__(self, experts: dict[int, np.ndarray]) -> None:
        self._experts = experts

    def add(self, layer: int, ids: np.ndarray, experts: int) -> None:
        """These, of a layer of so many."""
        mask_E = np.zeros(experts, dtype=bool)
        mask_E[ids] = True
        self._experts[layer] = mask_E

    def __contains__(self, key: object) -> bool:
        layer, expert, _ = cast(PlaneKey, key)
        mask_E = self._experts.get(layer)
        return mask_E is not None and bool(mask_E[expert])


class LayerForesight:
    """Drives a `Foresight` by the real clock: `step`, then for each layer `routed`, `asked` and `served`, or `passed`.

    `gates` are asked for the next layers' candidates, if there are any, so many as `candidates` says; `levels`, if any,
    say which planes of an expert are worth reading ahead, and `also` which planes of variants go with it. `awaited` is
    the layer of which planes have been asked for ahead, until that has routed; -1: none. `reads_ahead` says whether the
    step under way asks for any: where that was not worth it for long, it is tried now and then only. A read keeps one
    of so many `cores` from computing, as long as nothing else is known, and asking keeps all. Steps that fetch by
    themselves (`lend`) read ahead where `fetches_ahead`.
    """

    def __init__(
        self,
        foresight: Foresight,
        planes: PlaneCache,
        chains: Sequence[Sequence[Chain]],
        layouts: Sequence[Layout],
        transfers: TransferEngine,
        gates: Looks | None = None,
        *,
        picks: int,
        cores: int,
        fetches_ahead: bool,
    ) -> None:
        self._fetches_ahead = fetches_ahead
        self._picks, self._strain = picks, Strain(1 / cores)
        self.candidates = min(2 * picks, *(len(one) for one in chains))
        self._foresight, self._planes, self._chains, self._transfers = foresight, planes, chains, transfers
        self._chain_bytes = [sum(plane.nbytes for plane in layout.planes) for layout in layouts]
        self.gates = gates
        self._meter = SlackMeter()
        self.requests: Sequence[RequestRows] = ()
        self.levels: LayerLevels | None = None
        self.also: Callable[[int, int], Chain] | None = None
        self.awaited = -1
        self.reads_ahead = foresight.prefetcher is not None
        self._steps, self._barren = 0, 0  # so far; and layers since one was found worth it
        self._begun: set[int] = set()
        self._piece_share = [_piece_share(layout) for layout in layouts]
        self._measured = 0.0, 0  # seconds and bytes of reads, when they were looked at last
        self._seconds_per_byte = 0.0
        self._work_s = 0.0  # of asking for an expert ahead, all that goes with it included
        self._asked = 0
        self._slacks: list[Slack] = []  # of a step that fetches: after layers that have nothing to read, that have

    @property
    def foreseen(self) -> Foreseen:
        """What prefetching has done so far."""
        return self._foresight.foreseen

    def step(self, requests: Sequence[RequestRows]) -> None:
        """A forward pass over rows of these requests begins."""
        self.requests = requests
        self._steps += 1
        asks = self._barren < _BARREN or self._steps % _TRY_EVERY == 0
        self.reads_ahead = asks and self._foresight.prefetcher is not None
        for rows in requests:
            if rows.request not in self._begun:
                self._begun.add(rows.request)
                self._foresight.begin(rows.request)

    def telling(self, rows: int) -> int:
        """Where one of so many first candidates of the next layer's gate is absent, a step of so many rows has to be
        told of it; 0: nothing is asked for ahead."""
        prefetcher = self._foresight.prefetcher
        if not self.reads_ahead or prefetcher is None:
            return 0
        return prefetcher.telling(self._picks) if rows == 1 else self._picks

    def end(self, request: int) -> None:
        """Nothing more comes of a request, whether it ever came this far or not."""
        if request in self._begun:
            self._begun.remove(request)
            self._foresight.end(request)

    @property
    def fetches(self) -> bool:
        """Whether reading ahead can be left to who fetches (`lend`)."""
        return self._foresight.fetches

    def hurry(self) -> None:
        """The step under way comes back for what has to be read only: it reads ahead where `fetches_ahead`."""
        if not self._fetches_ahead:
            self.reads_ahead, self.awaited = False, -1

    def lend(self) -> tuple[list[int], list[int]]:
        """The step under way is left to fetch by itself, and to read ahead within limits of `_native.Fetching`."""
        prefetcher, asks = self._foresight.prefetcher, self.reads_ahead
        self.reads_ahead, self.awaited = False, -1
        if prefetcher is None or not asks or not self._fetches_ahead:
            return [], []
        self._slacks = [self._slack(1 % len(self._chains), reading=reading, asking=False) for reading in (False, True)]
        idle, reading = prefetcher.places(self.candidates, self._slacks)
        return (idle, reading) if any(idle + reading) else ([], [])

    def fetched(self, routing: Routing, visit: Visit, served: float) -> None:
        """A layer has routed and fetched what it lacked, which came until `served`."""
        self._meter.routed(visit.routed)
        self._foresight.observe(routing)
        self._meter.served(served, read=visit.reading)

    def computed(self, seconds: float, *, reading_s: float) -> None:
        """A layer that waited for nothing took so long, with reads ahead of so long beside it."""
        self._strain.layer(seconds, reading_s)

    def looked(self, visit: Visit, experts: Sequence[int]) -> None:
        """What the layer visited last did about the next one: it read `experts` ahead."""
        self._barren = 0 if experts else self._barren + 1
        self._foresight.made(visit.layer, visit.candidates, experts, self._slacks[visit.reading])

    def routed(self, routing: Routing) -> None:
        """A layer has routed; its planes are asked for next."""
        self._meter.routed(time.perf_counter())
        self._foresight.observe(routing)

    def passed(self, routing: Routing) -> None:
        """A layer has routed, and was computed from planes that nobody had to be asked for."""
        self._meter.passed()
        self._foresight.passed(routing)

    def asked(self, layer: int, hidden_TH: torch.Tensor, *, reading: bool, used_E: np.ndarray | None = None) -> None:
        """All planes of the layer, whose experts take `hidden_TH`, have been asked for: read ahead what is worth it.

        `used_E`: those of the layer that nobody keeps in place, but which must stay. What the next layer's gate would
        pick stays as well.
        """
        self.awaited = -1
        if not self.reads_ahead:
            return
        start = time.perf_counter()
        target = (layer + 1) % len(self._chains)
        spared = Spared({} if used_E is None else {layer: used_E})
        if self.gates is not None:
            for ahead, ids_TC in self.gates.candidates(layer, hidden_TH):
                self._foresight.lookahead(layer, ahead, ids_TC)
                if ahead == 1:
                    spared.add(target, ids_TC[:, : self._picks].ravel(), len(self._chains[target]))
        slack = self._slack(target, reading=reading)
        chains = self._chains[target]
        levels = self.levels
        proposed = [
            chains[expert] if levels is None else levels.worth_reading(target, expert)
            for _, expert in self._foresight.propose(layer, slack)
            if expert < len(chains)
        ]
        self._barren = 0 if proposed else self._barren + 1
        if self.also is not None:
            proposed = [(*chain, *self.also(target, chain[0][1])) for chain in proposed]
        if proposed:
            if self._planes.prefetch([key for chain in proposed for key in chain], spare=spared):
                self.awaited = target
            self._work_s += ((time.perf_counter() - start) / len(proposed) - self._work_s) / 32

    def served(self, *, reading: bool, at: float | None = None) -> None:
        """Planes of the layer are in memory, since `at` by `time.perf_counter` (None: now); the last call counts."""
        self._meter.served(time.perf_counter() if at is None else at, read=reading)

    def _slack(self, layer: int, *, reading: bool, asking: bool = True) -> Slack:
        """For experts of the layer, by what reads took of late; with what `asking` takes."""
        read_s = self._read_seconds(layer)
        piece_s = read_s * (1.0 if self._planes.joined else self._piece_share[layer])
        work_s = self._work_s * asking + max(self._strain.part, 0.0) * read_s
        return self._meter.slack(read_s, reading=reading, piece_s=piece_s, work_s=work_s)

    def _read_seconds(self, layer: int) -> float:
        """Of an expert of the layer; 0 before any was read."""
        if self._asked % _MEASURE_EVERY == 0:
            stats = self._transfers.stats
            busy_s, nbytes = self._measured
            if stats.bytes_read - nbytes >= _MEASURE_BYTES * self._chain_bytes[layer]:
                self._seconds_per_byte = (stats.busy_seconds - busy_s) / (stats.bytes_read - nbytes)
                self._measured = stats.busy_seconds, stats.bytes_read
        self._asked += 1
        return self._seconds_per_byte * self._chain_bytes[layer]


def _piece_share(layout: Layout) -> float:
    """The part of an expert that is read at once when nobody waits for it."""
    sizes = [plane.nbytes for plane in layout.planes]
    return min(1.0, max(*sizes, PIECE_BYTES) / sum(sizes))


_PER_SCORE, _PER_CANDIDATE = 16, 96
"""Bytes for each row of a step: of every expert a score, its sorted copy and a mark; of a candidate (twice the picks)
its id, in all the places where it is compared."""

_PER_EXPERT = 64
"""Bytes that a policy keeps of each expert, and of each expert for each request: a dozen small numbers at most."""

_LEVELS_PER_EXPERT = 320
"""What is kept of an expert's levels: a few numbers for each of at most five, and where its planes lie."""
