"""The routed experts of a step: rows grouped by expert, chains of planes streamed, outputs combined in fixed order.

Shapes: T rows of the batch, L layers, E experts of a layer, K experts per row, P = T * K places of the output,
H hidden.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from moestro import _native
from moestro.errors import PlaneReadError
from moestro.keys import FIRST_DELTA, PlaneKey
from moestro.memory.plane_cache import PlaneCache
from moestro.memory.plane_stream import PlaneStream
from moestro.memory.planes import Chain
from moestro.policy.observation import Routing
from moestro.runtime.arriving import Arriving
from moestro.runtime.batch import PackedBatch
from moestro.runtime.deltas import StepDeltas
from moestro.runtime.expert_layers import LayerExperts
from moestro.runtime.foresight import LayerForesight
from moestro.runtime.grouping import Grouping
from moestro.runtime.levels import LayerLevels
from moestro.runtime.narrow import plain
from moestro.runtime.open_variant import OpenVariant
from moestro.runtime.read_order import ReadOrder
from moestro.spans import Event, Part, Spans

KNOWN_ROWS = 16
"""Most rows of a step whose experts are computed without asking the plane cache: with more, what it costs is little."""


class RoutedExperts:
    """The experts of all layers over one plane cache.

    Layers know where planes lie: a few rows whose planes are all in memory go past the cache, whose bookkeeping costs
    up to 0.3 ms a layer when a step's weights have just washed it out of the processor's caches. So may whoever is
    given `known`, if it says so (`count_known`). Policies hear of the routing all the same.

    Attributes:
        counts_LE: rows routed to each expert so far.
        seconds: time spent here so far, waiting for planes included.
        chains: of each layer, the planes of each expert.
        foresight: is told of every layer whose planes are asked for, if there is one.
        levels: chooses the levels of rows that need not be exact, if there is one.
        deltas: what rows of variants add in the forward pass under way; None where all are the base's.
        spans: where the time of all this goes; the whole model's, once it is open.
        order: says in which order they are read; None: as they are asked for.
        part_planes: has a slot for each plane, where planes of an expert share one; asked for before the first pass in
            which some row needs less than all of them.
        exact: whether what is known may be computed with, in the forward pass under way.
        known: by layer, experts that can be computed where they lie; None where none ever can.
    """

    def __init__(
        self,
        planes: PlaneCache,
        layers: Sequence[LayerExperts],
        chains: Sequence[Sequence[Chain]],
        *,
        level: int,
        arena: int,
    ) -> None:
        """`arena`: the address of the bytes in which `planes` holds planes."""
        assert len(layers) == len(chains)
        self.planes = planes
        planes.on_gone = self._gone
        self._arrived: deque[PlaneKey] = deque()  # planes read ahead, since they were last looked at
        planes.on_ahead = self._arrived.append
        self.counts_LE = np.zeros((len(chains), max(len(one) for one in chains)), dtype=np.int64)
        self.seconds = 0.0
        self.foresight: LayerForesight | None = None
        self.levels: LayerLevels | None = None
        self.deltas: StepDeltas | None = None
        self.spans = Spans()
        self.order: ReadOrder | None = None
        self.part_planes: Callable[[], None] | None = None
        self._level = level
        self.exact = True
        self.known = tuple(one.known for one in layers)
        self._layers = tuple(layers)
        self._arriving = Arriving(arena)
        self.chains = tuple(tuple(one) for one in chains)

    def __call__(
        self,
        layer: int,
        hidden_TH: torch.Tensor,
        index_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        owners: Callable[[np.ndarray], frozenset[int]],
    ) -> torch.Tensor:
        """Weighted sum [T, H] over each row's experts, in ascending k. `owners` tells whose requests rows are.

        Raises:
            PlaneReadError: a plane could not be read; the error names the requests that needed it.
        """
        started = time.perf_counter()
        try:
            with self.spans.within(Part.PYTHON, Event.LAYER, layer, len(index_TK)):
                hidden_TH, index_TK = hidden_TH.contiguous(), index_TK.to(torch.int64).contiguous()
                weights_TK = plain(weights_TK).to(torch.float32).contiguous()
                sum_TH = self._from_known(layer, hidden_TH, index_TK, weights_TK)
                if sum_TH is None:
                    sum_TH = self._streamed(layer, hidden_TH, index_TK, weights_TK, owners)
                    self._note_held(layer, index_TK.numpy())
                return sum_TH
        finally:
            self.seconds += time.perf_counter() - started

    def step(self, batch: PackedBatch, deltas: StepDeltas | None = None) -> None:
        """A forward pass begins."""
        self.deltas = deltas
        if self.foresight is not None:
            self.foresight.also = None if deltas is None else deltas.also
        if self.levels is None:
            return
        self.levels.step(batch)
        if self.levels.lossy and self.part_planes is not None and self.planes.joined:
            self.part_planes()
        self.exact = not (self.levels.everywhere and self.levels.lossy)
        if not self.exact:
            for one in self._layers:
                one.forget()  # what is known is computed at the exact level

    def learn(self) -> None:
        """Have layers know where the planes lie that were read ahead and have come. To be called before they are used,
        by the thread that has planes evicted."""
        while self._arrived:
            layer, expert, _ = self._arrived.popleft()
            self._note_held(layer, np.array([expert]))
            offsets = self.planes.offsets(self.chains[layer][expert])
            if offsets is not None and self.exact:
                self._layers[layer].learn(expert, offsets)

    def _note_held(self, layer: int, ids: np.ndarray) -> None:
        """Have the layer know which planes of these experts are in memory, where some may be without the others."""
        if self.levels is None or self.planes.joined:
            return
        chains = self.chains[layer]
        experts = [expert for expert in np.unique(ids).tolist() if expert < len(chains)]
        self._layers[layer].hold(experts, self.planes.parts([chains[expert] for expert in experts]))

    def _gone(self, key: PlaneKey) -> None:
        layer, expert, plane = key
        if plane < FIRST_DELTA:
            self._layers[layer].forget(expert, plane)
        else:
            self._layers[layer].forget_delta(expert, plane - FIRST_DELTA)

    def entered(self, variant: OpenVariant) -> None:
        """A variant has come into memory: rows of it may follow."""
        assert variant.slot is not None
        for one in self._layers:
            one.entered(variant.slot, variant)

    def leaving(self, variant: OpenVariant, *, is_gone: bool) -> None:  # noqa: ARG002
        """It leaves: no row of it may follow."""
        assert variant.slot is not None
        for one in self._layers:
            one.left(variant.slot)

    def held_by_level(self, layer: int) -> tuple[np.ndarray, _native.KnownExperts] | None:
        """Where a layer's planes in memory lie (`LayerExperts.held`), and its experts by level; None where they are not
        computed like that."""
        one, levels = self._layers[layer], self.levels
        levelled = None if levels is None or not levels.apart else one.levelled(levels.bits)
        held_EP = one.held()
        return None if held_EP is None or levelled is None else (held_EP, levelled)

    def count_known(
        self, first: int, index_LTK: np.ndarray, weights_LTK: np.ndarray, left_out_LTK: np.ndarray | None = None
    ) -> None:
        """Count the rows of layers from number `first` on that have been computed from `known`, or `held_by_level`."""
        counts_LE = self.count(first, index_LTK, left_out_LTK=left_out_LTK)
        foresight = self.foresight
        if foresight is not None:
            self.spans.begin(Part.POLICY)
            for routing in self.routings(first, index_LTK, weights_LTK, counts_LE):
                foresight.passed(routing)
            self.spans.end()

    def count(
        self, first: int, index_LTK: np.ndarray, *, fetched: int = 0, left_out_LTK: np.ndarray | None = None
    ) -> np.ndarray:
        """How many rows use each expert [L, E] of layers that go past the cache, but for those that were `fetched`.
        What a row has `left_out` is counted as routed, not as used."""
        layers, experts = len(index_LTK), self.counts_LE.shape[1]
        index_LP = index_LTK.reshape(layers, index_LTK[0].size if layers else 0)
        numbers_LP = index_LP + experts * np.arange(layers)[:, None]
        counts_X = np.bincount(numbers_LP.ravel(), minlength=layers * experts)
        used_X = counts_X
        if left_out_LTK is not None and left_out_LTK.any():
            used_X = counts_X - np.bincount(numbers_LP[left_out_LTK.reshape(layers, -1)], minlength=layers * experts)
        counts_LE = counts_X.reshape(layers, experts)
        self.counts_LE[first : first + layers] += counts_LE
        self.planes.used(first, used_X.reshape(layers, experts), fetched=fetched)
        return counts_LE

    def routings(
        self, first: int, index_LTK: np.ndarray, weights_LTK: np.ndarray, counts_LE: np.ndarray
    ) -> Iterator[Routing]:
        """Of layers from number `first` on, with what `count` says of them."""
        assert self.foresight is not None
        for layer, routed in enumerate(zip(index_LTK, weights_LTK, counts_LE, strict=True), start=first):
            index_TK, weights_TK, counts_E = routed
            counts_E = counts_E[: len(self.chains[layer])]
            yield Routing(layer, index_TK, weights_TK, self.foresight.requests, counts_E)

    def _from_known(
        self, layer: int, hidden_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor | None:
        """The weighted sum from planes that are known to be where they were; None when some are not."""
        known, (rows, picks) = self.known[layer], index_TK.shape
        if known is None or rows > KNOWN_ROWS:
            return None
        self.learn()
        runs = () if self.deltas is None else self.deltas.runs
        if not known.covers(index_TK.data_ptr(), rows, picks, runs):
            return None
        self._pass_by(layer, hidden_TH, index_TK.numpy(), weights_TK.numpy())
        sum_TH, out_PH = torch.empty_like(hidden_TH), torch.empty(rows * picks, hidden_TH.shape[1])
        inputs = (hidden_TH.data_ptr(), index_TK.data_ptr(), weights_TK.data_ptr())
        self.spans.begin(Part.EXPERTS)
        computed = known.run(*inputs, rows, picks, out_PH.data_ptr(), sum_TH.data_ptr(), runs)
        self.spans.end(Event.KNOWN, layer, rows)
        assert computed, "an expert was dropped between two looks"
        return sum_TH

    def _pass_by(self, layer: int, hidden_TH: torch.Tensor, index_TK: np.ndarray, weights_TK: np.ndarray) -> None:
        """Go past the cache with one layer; what is read ahead is asked for before it is computed."""
        foresight = self.foresight
        if foresight is None or not foresight.reads_ahead:
            self.count_known(layer, index_TK[None], weights_TK[None])
            return
        self.spans.begin(Part.POLICY)
        counts_LE = self.count(layer, index_TK[None])
        for routing in self.routings(layer, index_TK[None], weights_TK[None], counts_LE):
            foresight.routed(routing)
        foresight.asked(layer, hidden_TH, reading=False, used_E=counts_LE[0] > 0)
        foresight.served(reading=False)
        self.spans.end(Event.CHOOSE, layer)

    def _streamed(
        self,
        layer: int,
        hidden_TH: torch.Tensor,
        index_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        owners: Callable[[np.ndarray], frozenset[int]],
    ) -> torch.Tensor:
        spans = self.spans
        spans.begin(Part.POLICY)
        rows, wanted = self._grouped(layer, hidden_TH, index_TK.numpy(), weights_TK.numpy())
        spans.end(Event.CHOOSE, layer)
        self.counts_LE[layer, : len(rows.counts_E)] += rows.counts_E
        foresight, deltas, order = self.foresight, self.deltas, self.order
        if deltas is not None:
            wanted = deltas.chains(layer, rows, wanted)
        spans.begin(Part.POLICY)
        arrange = None if order is None else order.of(wanted, rows.counts_E, rows=len(index_TK))
        known, told = self._taken_as_known(layer, rows, len(index_TK)), None
        if known is not None:
            told = self._arriving
            told.begin(rows.used)
        try:
            with self.planes.stream(wanted, arrange=arrange, told=told) as batches:
                reading = batches.reading
                if foresight is not None:
                    foresight.asked(layer, hidden_TH, reading=reading)
                if known is not None and not batches.pending:
                    groups_TK = torch.from_numpy(rows.by_place())
                    sum_TH = self._as_they_come(layer, known, batches, hidden_TH, groups_TK, weights_TK)
                    if foresight is not None:
                        foresight.served(reading=reading, at=batches.last_arrival or None)
                    return sum_TH
                return self._in_batches(layer, batches, reading, rows, hidden_TH, weights_TK)
        except PlaneReadError as error:
            if error.key is not None:
                error.requests = owners(self._rows_that_need(error.key, rows))
            raise

    def _taken_as_known(self, layer: int, rows: Grouping, count: int) -> _native.KnownExperts | None:
        """What computes the groups of a layer's rows in one call, where something can: for few rows of the base."""
        by_time = self.order is not None and self.order.by_time
        if self.deltas is not None or by_time or count > KNOWN_ROWS:
            return None
        if rows.of_experts:
            return self.known[layer] if self.exact else None
        apart = self.levels is not None and self.levels.apart
        return self._layers[layer].levelled(rows.bits) if apart else None

    def _as_they_come(
        self,
        layer: int,
        known: _native.KnownExperts,
        batches: PlaneStream,
        hidden_TH: torch.Tensor,
        groups_TK: torch.Tensor,
        weights_TK: torch.Tensor,
    ) -> torch.Tensor:
        """The weighted sum, in one call that waits for what is on its way. The span of asking is open, and ends."""
        spans = self.spans
        spans.end(Event.ASK, layer, groups_TK.shape[1])
        spans.begin(Part.EXPERTS)
        began = spans.clock()
        found = self._arriving.compute(known, hidden_TH, groups_TK, weights_TK)
        if found is None:
            batches.fail()
        batches.settle()
        for begun, ended, index, read in found.waited:
            batches.waited(began + begun, began + ended, index, read)
        for begun, ended, experts in found.computed:
            spans.note(Event.EXPERTS, began + begun, began + ended, layer, experts)
        spans.end(Event.COMBINE, layer)
        return found.sum_TH

    def _in_batches(
        self,
        layer: int,
        batches: PlaneStream,
        reading: bool,
        rows: Grouping,
        hidden_TH: torch.Tensor,
        weights_TK: torch.Tensor,
    ) -> torch.Tensor:
        """The weighted sum, of one batch after another. The span of asking is open, and ends."""
        spans, foresight, deltas = self.spans, self.foresight, self.deltas
        order = self.order if self.order is not None and self.order.by_time else None
        used, compute = rows.used, self._layers[layer].compute
        shape = (weights_TK.numel(), hidden_TH.shape[1])
        out_PH = torch.empty(shape) if rows.covers(shape[0]) else torch.zeros(shape)
        for batch in batches:
            if foresight is not None:
                foresight.served(reading=reading)
            spans.end(Event.ASK, layer, len(used))
            spans.begin(Part.EXPERTS)
            if order is not None:
                order.computing()
            if deltas is None:
                compute([(used[index], offsets) for index, offsets in batch], rows, hidden_TH, out_PH)
            else:
                arrived, pieces = deltas.arrived(rows, batch)
                compute(arrived, rows, hidden_TH, out_PH, pieces)
            if order is not None:
                order.computed([rows.expert_of(used[index]) for index, _ in batch], rows.counts_E)
            spans.end(Event.EXPERTS, layer, len(batch))
            spans.begin(Part.POLICY)
        spans.end(Event.ASK, layer, 0)
        spans.begin(Part.EXPERTS)
        sum_TH = combine(out_PH, weights_TK)
        spans.end(Event.COMBINE, layer)
        return sum_TH

    def _rows_that_need(self, key: PlaneKey, rows: Grouping) -> np.ndarray:
        _, expert, plane = key
        found = rows.rows_of_expert(expert)
        if plane < FIRST_DELTA:
            return found
        assert self.deltas is not None
        return self.deltas.rows_of(plane - FIRST_DELTA, found)

    def _grouped(
        self, layer: int, hidden_TH: torch.Tensor, index_TK: np.ndarray, weights_TK: np.ndarray
    ) -> tuple[Grouping, list[Chain]]:
        """The rows by expert and level, and the chains of the groups in use. Tells the policies of the routing."""
        chains, foresight, levels = self.chains[layer], self.foresight, self.levels
        rows = Grouping(index_TK, len(chains), bits=(self._level,))
        requests = () if foresight is None else foresight.requests
        routing = Routing(layer, index_TK, weights_TK, requests, rows.counts_E)
        if foresight is not None:
            foresight.routed(routing)
        levels_TK = None if levels is None else levels.choose(routing, hidden_TH)
        if levels is None or levels_TK is None:
            return rows, [chains[expert] for expert in rows.used]
        rows = Grouping(index_TK, len(chains), bits=levels.bits, levels_TK=levels_TK)
        return rows, [levels.chain(layer, rows.expert_of(one), rows.level_of(one)) for one in rows.used]


def combine(out_PH: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    """Weighted sum [T, H] over k in ascending order: the same additions whatever is in the batch. fp32, contiguous."""
    tokens, picks = weights_TK.shape
    sum_TH = torch.empty((tokens, out_PH.shape[1]))
    _native.combine(out_PH.data_ptr(), weights_TK.data_ptr(), sum_TH.data_ptr(), tokens, picks, sum_TH.shape[1])
    return sum_TH
