"""The routed experts of a step: rows grouped by expert, chains of planes streamed, outputs combined in fixed order.

Shapes: T rows of the batch, L layers, E experts of a layer, K experts per row, P = T * K places of the output,
H hidden.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import nn

from moestro import _native
from moestro.errors import PlaneReadError
from moestro.hf.skeleton import Skeleton, is_experts_module
from moestro.kernels.base import ExpertSpec, Kernels
from moestro.keys import PlaneKey
from moestro.memory.plane_cache import PlaneCache
from moestro.memory.planes import Chain
from moestro.policy.observation import Routing
from moestro.runtime.batch import PackedBatch
from moestro.runtime.expert_mlp import activate, expert_mlp
from moestro.runtime.expert_spec import ExpertMatrices, expert_matrices, expert_spec, is_raw
from moestro.runtime.foresight import LayerForesight
from moestro.runtime.grouping import Grouping
from moestro.runtime.levels import LayerLevels
from moestro.runtime.narrow import plain
from moestro.runtime.read_order import ReadOrder
from moestro.runtime.slots import SlotViews
from moestro.spans import Event, Part, Spans
from moestro.store.layout import Layout

Arrived = Sequence[tuple[int, tuple[int, ...]]]
"""(group of a `Grouping`, byte offsets of its planes in the arena) of the chains that a stream hands out together."""


KNOWN_ROWS = 16
"""Most rows of a step whose experts are computed without asking the plane cache: with more, what it costs is little."""


class LayerExperts(Protocol):
    """How the experts of one layer are computed once their planes are there."""

    @property
    def known(self) -> _native.KnownExperts | None:
        """Those that can be computed from where their planes last arrived; None where that is never so."""
        ...

    def compute(self, arrived: Arrived, rows: Grouping, hidden_TH: torch.Tensor, out_PH: torch.Tensor) -> None:
        """Write the unweighted output of each arrived group into its places of `out_PH`."""
        ...

    def forget(self, expert: int | None = None) -> None:
        """Planes of this expert (None: of any) are not where they were."""
        ...


class RoutedExperts:
    """The experts of all layers over one plane cache.

    Where nothing is read ahead, layers know where planes lie: a few rows whose planes are all in memory go past the
    cache, whose bookkeeping costs up to 0.3 ms a layer when a step's weights have just washed it out of the processor's
    caches. So may whoever is given `known`, if it says so (`count_known`). Policies hear of the routing all the same.

    Attributes:
        counts_LE: rows routed to each expert so far.
        seconds: time spent here so far, waiting for planes included.
        chains: of each layer, the planes of each expert.
        foresight: is told of every layer whose planes are asked for, if there is one.
        levels: chooses the levels of rows that need not be exact, if there is one.
        spans: where the time of all this goes; the whole model's, once it is open.
        order: says in which order they are read; None: as they are asked for.
        known: by layer, experts that can be computed where they lie; None where none ever can.
    """

    def __init__(
        self,
        planes: PlaneCache,
        layers: Sequence[LayerExperts],
        chains: Sequence[Sequence[Chain]],
        *,
        level: int,
    ) -> None:
        assert len(layers) == len(chains)
        self.planes = planes
        planes.on_gone = self._gone
        self.counts_LE = np.zeros((len(chains), max(len(one) for one in chains)), dtype=np.int64)
        self.seconds = 0.0
        self.foresight: LayerForesight | None = None
        self.levels: LayerLevels | None = None
        self.spans = Spans()
        self.order: ReadOrder | None = None
        self._level = level
        self.known = tuple(one.known for one in layers)
        self._layers = tuple(layers)
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
                return self._streamed(layer, hidden_TH, index_TK, weights_TK, owners) if sum_TH is None else sum_TH
        finally:
            self.seconds += time.perf_counter() - started

    def step(self, batch: PackedBatch) -> None:
        """A forward pass begins."""
        if self.levels is None:
            return
        self.levels.step(batch)
        if self.levels.everywhere and self.levels.lossy:
            for one in self._layers:
                one.forget()  # what is known is computed at the exact level

    def _gone(self, key: PlaneKey) -> None:
        layer, expert, _ = key
        self._layers[layer].forget(expert)

    def count_known(self, first: int, index_LTK: np.ndarray, weights_LTK: np.ndarray) -> None:
        """Count the rows of layers from number `first` on that have been computed from `known`."""
        layers, experts = len(index_LTK), self.counts_LE.shape[1]
        numbers = index_LTK.reshape(layers, -1) + experts * np.arange(layers)[:, None]
        counts_LE = np.bincount(numbers.ravel(), minlength=layers * experts).reshape(layers, experts)
        self.counts_LE[first : first + layers] += counts_LE
        self.planes.count_hits(int(np.count_nonzero(counts_LE)))
        foresight = self.foresight
        if foresight is not None:
            self.spans.begin(Part.POLICY)
            for layer, routed in enumerate(zip(index_LTK, weights_LTK, counts_LE, strict=True), start=first):
                index_TK, weights_TK, counts_E = routed
                counts_E = counts_E[: len(self.chains[layer])]
                foresight.passed(Routing(layer, index_TK, weights_TK, foresight.requests, counts_E))
            self.spans.end()

    def _from_known(
        self, layer: int, hidden_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor | None:
        """The weighted sum from planes that are known to be where they were; None when some are not."""
        known, (rows, picks) = self.known[layer], index_TK.shape
        if known is None or rows > KNOWN_ROWS:
            return None
        sum_TH, out_PH = torch.empty_like(hidden_TH), torch.empty(rows * picks, hidden_TH.shape[1])
        inputs = (hidden_TH.data_ptr(), index_TK.data_ptr(), weights_TK.data_ptr())
        self.spans.begin(Part.EXPERTS)
        computed = known.run(*inputs, rows, picks, out_PH.data_ptr(), sum_TH.data_ptr())
        self.spans.end(Event.KNOWN if computed else None, layer, rows)
        if not computed:
            return None
        self.count_known(layer, index_TK.numpy()[None], weights_TK.numpy()[None])
        return sum_TH

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
        used = rows.used
        shape = (index_TK.numel(), hidden_TH.shape[1])
        out_PH = torch.empty(shape) if rows.covers(shape[0]) else torch.zeros(shape)
        compute, foresight = self._layers[layer].compute, self.foresight
        spans.begin(Part.POLICY)
        order, counts_E = self.order, rows.counts_E
        arrange = None if order is None else order.of(wanted, counts_E, rows=len(index_TK))
        try:
            with self.planes.stream(wanted, arrange=arrange) as batches:
                reading = batches.reading
                if foresight is not None:
                    foresight.asked(layer, hidden_TH, reading=reading)
                for batch in batches:
                    if foresight is not None:
                        foresight.served(reading=reading)
                    spans.end(Event.ASK, layer, len(wanted))
                    spans.begin(Part.EXPERTS)
                    if order is not None:
                        order.computing()
                    compute([(used[index], offsets) for index, offsets in batch], rows, hidden_TH, out_PH)
                    if order is not None:
                        order.computed([rows.expert_of(used[index]) for index, _ in batch], counts_E)
                    spans.end(Event.EXPERTS, layer, len(batch))
                    spans.begin(Part.POLICY)
        except PlaneReadError as error:
            if error.key is not None:
                error.requests = owners(rows.rows_of_expert(error.key[1]))
            raise
        spans.end(Event.ASK, layer, 0)
        spans.begin(Part.EXPERTS)
        sum_TH = combine(out_PH, weights_TK)
        spans.end(Event.COMBINE, layer)
        return sum_TH

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


class StreamedExperts:
    """Those that are asked for anew at every step."""

    known: None = None

    def forget(self, expert: int | None = None) -> None:
        pass


def combine(out_PH: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    """Weighted sum [T, H] over k in ascending order: the same additions whatever is in the batch. fp32, contiguous."""
    tokens, picks = weights_TK.shape
    sum_TH = torch.empty((tokens, out_PH.shape[1]))
    _native.combine(out_PH.data_ptr(), weights_TK.data_ptr(), sum_TH.data_ptr(), tokens, picks, sum_TH.shape[1])
    return sum_TH


class RawExperts(StreamedExperts):
    """Experts in their stored type, one after another, with the activation of transformers' module."""

    def __init__(self, kernels: Kernels, module: nn.Module, views: SlotViews, layer: int) -> None:
        self._kernels, self._module, self._views, self._layer = kernels, module, views, layer

    def compute(self, arrived: Arrived, rows: Grouping, hidden_TH: torch.Tensor, out_PH: torch.Tensor) -> None:
        for group, (offset,) in arrived:
            views = self._views.at(self._layer, offset)
            hidden_RH = hidden_TH[torch.from_numpy(rows.rows_of(group))]
            out_PH[torch.from_numpy(rows.places_of(group))] = expert_mlp(self._kernels, self._module, views, hidden_RH)


class PackedExperts:
    """Quantised experts whose whole MLP the kernels know: one call for all that have arrived."""

    def __init__(
        self, kernels: Kernels, spec: ExpertSpec, arena: torch.Tensor, *, level: int, experts: int, know: bool
    ) -> None:
        self._kernels, self._spec, self._level = kernels, spec, level
        self._arena = arena.data_ptr()
        self._known_EP = np.zeros((experts, _CHAIN_PLANES), dtype=np.int64)
        self.known = kernels.known_experts(spec, self._known_EP, level) if know else None

    def compute(self, arrived: Arrived, rows: Grouping, hidden_TH: torch.Tensor, out_PH: torch.Tensor) -> None:
        base = self._arena
        addresses = [[*[base + offset for offset in offsets], *_ABSENT[len(offsets) :]] for _, offsets in arrived]
        planes_JP = np.array(addresses, dtype=np.int64)
        groups = [group for group, _ in arrived]
        if self.known is not None:
            self._note(groups, planes_JP, rows)
        self._kernels.experts(self._spec, rows.jobs(groups, planes_JP), hidden_TH, out_PH)

    def _note(self, groups: Sequence[int], planes_JP: np.ndarray, rows: Grouping) -> None:
        """Where the exact ones are, which is all that is ever taken from what is known."""
        whole = [place for place, group in enumerate(groups) if rows.bits_of(group) == self._level]
        self._known_EP[[rows.expert_of(groups[place]) for place in whole]] = planes_JP[whole]

    def forget(self, expert: int | None = None) -> None:
        self._known_EP[slice(None) if expert is None else expert] = 0


class PackedExpertsWithModule(StreamedExperts):
    """Quantised experts with an activation that only transformers' module knows, one after another."""

    def __init__(self, kernels: Kernels, module: nn.Module, matrices: ExpertMatrices, arena: torch.Tensor) -> None:
        self._kernels, self._module, self._matrices = kernels, module, matrices
        self._bytes = arena

    def compute(self, arrived: Arrived, rows: Grouping, hidden_TH: torch.Tensor, out_PH: torch.Tensor) -> None:
        matrices = self._matrices
        for group, offsets in arrived:
            planes, level = tuple(self._bytes.data_ptr() + offset for offset in offsets), rows.bits_of(group)
            hidden_RH = hidden_TH[torch.from_numpy(rows.rows_of(group))]
            up_bias = self._bias(matrices.up_bias, offsets[0], matrices.up.rows)
            up_RG = self._kernels.packed_linear(hidden_RH, matrices.up, planes, level, up_bias)
            down_bias = self._bias(matrices.down_bias, offsets[0], matrices.down.rows)
            activated_RI = activate(self._module, up_RG).contiguous()
            output_RH = self._kernels.packed_linear(activated_RI, matrices.down, planes, level, down_bias)
            out_PH[torch.from_numpy(rows.places_of(group))] = output_RH

    def _bias(self, offset: int | None, plane: int, size: int) -> torch.Tensor | None:
        if offset is None:
            return None
        start = plane + offset
        return self._bytes[start : start + 4 * size].view(torch.float32)


_CHAIN_PLANES = 4
"""Most planes of a chain."""

_ABSENT = (0,) * _CHAIN_PLANES


def open_experts(
    *,
    skeleton: Skeleton,
    kernels: Kernels,
    planes: PlaneCache,
    layouts: Sequence[Layout],
    level: int,
    arena: torch.Tensor,
    know: bool,
) -> RoutedExperts:
    """The experts of a model at a level.

    Args:
        layouts: of each MoE layer, up to the planes of `level`.
        arena: the bytes in which `planes` holds planes.
        know: whether experts in memory are computed without asking `planes`, which then reads nothing ahead.
    """
    views = SlotViews(arena_bytes=arena, layouts=layouts)
    modules = [module for module in skeleton.model.modules() if is_experts_module(module)]
    layers: list[LayerExperts] = []
    chains: list[list[Chain]] = []
    for layer, (module, layout) in enumerate(zip(modules, layouts, strict=True)):
        experts = range(skeleton.expert_layers[layer].num_experts)
        chains.append([tuple((layer, expert, plane) for plane in range(len(layout.planes))) for expert in experts])
        if is_raw(layout):
            layers.append(RawExperts(kernels, module, views, layer))
        else:
            layers.append(packed_layer(kernels, module, layout, arena, level=level, experts=len(experts), know=know))
    return RoutedExperts(planes, layers, chains, level=level)


def packed_layer(
    kernels: Kernels,
    module: nn.Module,
    layout: Layout,
    arena: torch.Tensor,
    *,
    level: int,
    experts: int,
    know: bool = False,
) -> LayerExperts:
    """The way to compute quantised experts with the activation of `module`. `layout` ends at the plane of `level`.

    With `know` it remembers where planes lie, and forgets what it is told to.
    """
    matrices = expert_matrices(layout)
    spec = expert_spec(matrices, module)
    if spec is not None:
        return PackedExperts(kernels, spec, arena, level=level, experts=experts, know=know)
    _say_once(type(module))
    return PackedExpertsWithModule(kernels, module, matrices, arena)


def _say_once(kind: type) -> None:
    if kind not in _said:
        _said.add(kind)
        logging.getLogger("moestro").warning(
            "The kernels do not know the activation of %s: its experts are computed one by one with the function of "
            "transformers, which is slower.",
            kind.__name__,
        )


_said: set[type] = set()
