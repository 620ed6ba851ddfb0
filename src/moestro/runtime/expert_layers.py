"""How the experts of one layer are computed from planes that have arrived: raw, packed, or with transformers' function.

Shapes: T rows of the batch, R rows of a group, J groups that arrived, H hidden, I expert width, G = I or 2I, P places
of the output (with E: planes of a chain), E experts of the layer.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import repeat
from typing import Protocol

import numpy as np
import torch
from torch import nn

from moestro import _native
from moestro.kernels.base import ExpertDeltaSpec, ExpertSpec, Kernels
from moestro.kernels.shapes import native_expert_delta
from moestro.runtime.deltas import ChangedExperts, Pieces, add_pieces, expert_deltas, is_low_rank
from moestro.runtime.expert_mlp import activate, expert_mlp
from moestro.runtime.expert_spec import ExpertMatrices, expert_matrices, expert_spec
from moestro.runtime.grouping import Grouping
from moestro.runtime.slots import SlotViews
from moestro.store.layout import Layout

Arrived = Sequence[tuple[int, tuple[int, ...]]]
"""(group of a `Grouping`, byte offsets of its planes in the arena) of the chains that a stream hands out together."""


class LayerExperts(Protocol):
    """How the experts of one layer are computed once their planes are there."""

    @property
    def known(self) -> _native.KnownExperts | None:
        """Those that can be computed from where their planes last arrived; None where that is never so."""
        ...

    def held(self) -> np.ndarray | None:
        """What `hold` has been told: addresses [E, P], 0 behind planes in memory; None where it is of no use."""
        ...

    def levelled(self, bits: Sequence[int]) -> _native.KnownExperts | None:
        """Groups of a `Grouping` by these levels, for a call that is told where their planes lie; None as above."""
        ...

    def compute(
        self,
        arrived: Arrived,
        rows: Grouping,
        hidden_TH: torch.Tensor,
        out_PH: torch.Tensor,
        pieces: Pieces | None = None,
    ) -> None:
        """Write the unweighted output of each arrived group into its places of `out_PH`. `pieces`, of each of them, are
        what variants add."""
        ...

    def learn(self, expert: int, offsets: tuple[int, ...]) -> None:
        """All planes of this expert are in memory, at these byte offsets in the arena."""
        ...

    def hold(self, experts: Sequence[int], offsets: Sequence[tuple[int, ...]]) -> None:
        """The planes of these experts that are in memory, from the first on, at these byte offsets in the arena."""
        ...

    def forget(self, expert: int | None = None, plane: int = 0) -> None:
        """This plane of an expert is not where it was; None: those of any; those of variants are."""
        ...

    def forget_delta(self, expert: int, variant: int) -> None:
        """The plane of a variant is not where it was."""
        ...

    def entered(self, variant: int, changed: ChangedExperts) -> None:
        """A variant has this number from now on."""
        ...

    def left(self, variant: int) -> None:
        """None has this number."""
        ...


class StreamedExperts:
    """Those that are asked for anew at every step."""

    known: None = None

    def levelled(self, bits: Sequence[int]) -> None:
        pass

    def learn(self, expert: int, offsets: tuple[int, ...]) -> None:
        pass

    def hold(self, experts: Sequence[int], offsets: Sequence[tuple[int, ...]]) -> None:
        pass

    def held(self) -> None:
        pass

    def forget(self, expert: int | None = None, plane: int = 0) -> None:
        pass

    def forget_delta(self, expert: int, variant: int) -> None:
        pass

    def entered(self, variant: int, changed: ChangedExperts) -> None:
        pass

    def left(self, variant: int) -> None:
        pass


class RawExperts(StreamedExperts):
    """Experts in their stored type, one after another, with the activation of transformers' module."""

    def __init__(self, kernels: Kernels, module: nn.Module, views: SlotViews, layer: int) -> None:
        self._kernels, self._module, self._views, self._layer = kernels, module, views, layer

    def compute(
        self,
        arrived: Arrived,
        rows: Grouping,
        hidden_TH: torch.Tensor,
        out_PH: torch.Tensor,
        pieces: Pieces | None = None,
    ) -> None:
        for (group, (offset,)), some in zip(arrived, pieces or repeat(()), strict=False):
            views = self._views.at(self._layer, offset)
            hidden_RH = hidden_TH[torch.from_numpy(rows.rows_of(group))]
            output_RH = expert_mlp(self._kernels, self._module, views, hidden_RH, some)
            out_PH[torch.from_numpy(rows.places_of(group))] = output_RH


class PackedExperts:
    """Quantised experts whose whole MLP the kernels know: one call for all that have arrived. `one_by_one` computes
    those with deltas that compiled experts do not know."""

    def __init__(
        self,
        kernels: Kernels,
        spec: ExpertSpec,
        arena: torch.Tensor,
        one_by_one: PackedExpertsWithModule,
        *,
        layer: int,
        level: int,
        experts: int,
    ) -> None:
        self._kernels, self._spec, self._layer, self._level = kernels, spec, layer, level
        self._one_by_one = one_by_one
        self._deltas: dict[int, np.ndarray] = {}  # of each variant: addresses [E], 0: not known, -1: there is none
        self._arena = arena.data_ptr()
        self._known_EP = np.zeros((experts, _CHAIN_PLANES), dtype=np.int64)
        self.known = kernels.known_experts(spec, self._known_EP, [level])
        self._held_EP = np.zeros_like(self._known_EP)
        self._levelled: _native.KnownExperts | None = None
        self._levelled_EP = self._known_EP

    def levelled(self, bits: Sequence[int]) -> _native.KnownExperts | None:
        if self._levelled is None:
            self._levelled_EP = np.zeros((len(bits) * len(self._known_EP), _CHAIN_PLANES), dtype=np.int64)
            self._levelled = self._kernels.known_experts(self._spec, self._levelled_EP, bits)
        return self._levelled

    def compute(
        self,
        arrived: Arrived,
        rows: Grouping,
        hidden_TH: torch.Tensor,
        out_PH: torch.Tensor,
        pieces: Pieces | None = None,
    ) -> None:
        if pieces is not None and any(is_low_rank(piece.spec) for some in pieces for piece in some):
            # Rows of a forward pass on the general path are all one variant's, so how an expert is computed depends on
            # the variant alone.
            changed = [place for place, some in enumerate(pieces) if some]
            others = [place for place, some in enumerate(pieces) if not some]
            self._one_by_one.compute(
                [arrived[place] for place in changed], rows, hidden_TH, out_PH, [pieces[place] for place in changed]
            )
            arrived, pieces = [arrived[place] for place in others], None
            if not arrived:
                return
        base = self._arena
        addresses = [[*[base + offset for offset in offsets], *_ABSENT[len(offsets) :]] for _, offsets in arrived]
        planes_JP = np.array(addresses, dtype=np.int64)
        groups = [group for group, _ in arrived]
        if self.known is not None:
            self._note(groups, planes_JP, rows)
        jobs = rows.jobs(groups, planes_JP)
        deltas = None
        if pieces is not None:
            deltas = expert_deltas(pieces, jobs.starts)
            if self.known is not None:
                self._note_deltas(groups, pieces, rows)
        self._kernels.experts(self._spec, jobs, hidden_TH, out_PH, deltas)

    def _note(self, groups: Sequence[int], planes_JP: np.ndarray, rows: Grouping) -> None:
        """Where the exact ones are, which is all that is ever taken from what is known."""
        whole = [place for place, group in enumerate(groups) if rows.bits_of(group) == self._level]
        self._known_EP[[rows.expert_of(groups[place]) for place in whole]] = planes_JP[whole]

    def _note_deltas(self, groups: Sequence[int], pieces: Pieces, rows: Grouping) -> None:
        for group, some in zip(groups, pieces, strict=True):
            for piece in some:
                self._deltas[piece.variant][rows.expert_of(group)] = piece.address

    def entered(self, variant: int, changed: ChangedExperts) -> None:
        if self.known is None:
            return
        specs = [changed.spec(self._layer, expert) for expert in range(len(self._known_EP))]
        nothing = ExpertDeltaSpec(None, None, 0, 0)
        spec = next((one for one in specs if one is not None), nothing)
        if is_low_rank(spec):
            spec = nothing  # never asked for: addresses of such planes are never noted
        addresses_E = np.array([-1 if one is None else 0 for one in specs], dtype=np.int64)
        self._deltas[variant] = addresses_E
        self.known.set_deltas(variant, native_expert_delta(spec), addresses_E.ctypes.data)

    def left(self, variant: int) -> None:
        if self.known is not None:
            self.known.set_deltas(variant, None, 0)
            del self._deltas[variant]

    def forget_delta(self, expert: int, variant: int) -> None:
        addresses_E = self._deltas.get(variant)
        if addresses_E is not None:
            addresses_E[expert] = 0

    def learn(self, expert: int, offsets: tuple[int, ...]) -> None:
        self._known_EP[expert, : len(offsets)] = [self._arena + offset for offset in offsets]

    def held(self) -> np.ndarray:
        return self._held_EP

    def hold(self, experts: Sequence[int], offsets: Sequence[tuple[int, ...]]) -> None:
        base = self._arena
        for expert, places in zip(experts, offsets, strict=True):
            self._held_EP[expert] = [*[base + place for place in places], *_ABSENT[len(places) :]]

    def forget(self, expert: int | None = None, plane: int = 0) -> None:
        self._known_EP[slice(None) if expert is None else expert] = 0
        if expert is not None:
            self._held_EP[expert, plane:] = 0


class PackedExpertsWithModule(StreamedExperts):
    """Quantised experts with an activation that only transformers' module knows, one after another."""

    def __init__(self, kernels: Kernels, module: nn.Module, matrices: ExpertMatrices, arena: torch.Tensor) -> None:
        self._kernels, self._module, self._matrices = kernels, module, matrices
        self._bytes = arena

    def compute(
        self,
        arrived: Arrived,
        rows: Grouping,
        hidden_TH: torch.Tensor,
        out_PH: torch.Tensor,
        pieces: Pieces | None = None,
    ) -> None:
        matrices = self._matrices
        for (group, offsets), some in zip(arrived, pieces or repeat(()), strict=False):
            planes, level = tuple(self._bytes.data_ptr() + offset for offset in offsets), rows.bits_of(group)
            hidden_RH = hidden_TH[torch.from_numpy(rows.rows_of(group))]
            up_bias = self._bias(matrices.up_bias, offsets[0], matrices.up.rows)
            up_RG = self._kernels.packed_linear(hidden_RH, matrices.up, planes, level, up_bias)
            add_pieces(self._kernels, some, "up", hidden_RH, up_RG)
            down_bias = self._bias(matrices.down_bias, offsets[0], matrices.down.rows)
            activated_RI = activate(self._module, up_RG).contiguous()
            output_RH = self._kernels.packed_linear(activated_RI, matrices.down, planes, level, down_bias)
            add_pieces(self._kernels, some, "down", activated_RI, output_RH)
            out_PH[torch.from_numpy(rows.places_of(group))] = output_RH

    def _bias(self, offset: int | None, plane: int, size: int) -> torch.Tensor | None:
        if offset is None:
            return None
        start = plane + offset
        return self._bytes[start : start + 4 * size].view(torch.float32)


_CHAIN_PLANES = 4
"""Most planes of a chain."""

_ABSENT = (0,) * _CHAIN_PLANES


def packed_layer(
    kernels: Kernels,
    module: nn.Module,
    layout: Layout,
    arena: torch.Tensor,
    *,
    level: int,
    experts: int,
    layer: int = 0,
) -> LayerExperts:
    """The way to compute quantised experts with the activation of `module`. `layout` ends at the plane of `level`."""
    matrices = expert_matrices(layout)
    spec = expert_spec(matrices, module)
    one_by_one = PackedExpertsWithModule(kernels, module, matrices, arena)
    if spec is not None:
        return PackedExperts(kernels, spec, arena, one_by_one, layer=layer, level=level, experts=experts)
    _say_once(type(module))
    return one_by_one


def _say_once(kind: type) -> None:
    if kind not in _said:
        _said.add(kind)
        logging.getLogger("moestro").warning(
            "The kernels do not know the activation of %s: its experts are computed one by one with the function of "
            "transformers, which is slower.",
            kind.__name__,
        )


_said: set[type] = set()
