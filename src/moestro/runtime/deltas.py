"""What rows of variants add to a layer's experts: which planes that takes, and on which rows of a group each applies.

Shapes: R rows of a group, K inputs, N outputs, S stretches of rows of one group that run on one variant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from moestro.kernels.base import ExpertDeltas, ExpertDeltaSpec, Kernels
from moestro.keys import FIRST_DELTA
from moestro.memory.planes import Chain
from moestro.quant.low_rank import LowRankRegion
from moestro.runtime.batch import Run
from moestro.runtime.grouping import Grouping


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows `first` to `end` (not included) of a group, of the variant of this number, have the delta of `spec`, whose
    plane lies at `address`."""

    variant: int
    spec: ExpertDeltaSpec
    first: int
    end: int
    address: int


Pieces = Sequence[Sequence[Piece]]
"""Those of each group that has arrived."""


class ChangedExperts(Protocol):
    """What a variant has of experts."""

    def spec(self, layer: int, expert: int) -> ExpertDeltaSpec | None:
        """What is in the delta plane of an expert; None: it has none, because the expert did not change."""
        ...


class StepDeltas:
    """Of one forward pass, layer by layer: `chains`, then `arrived` for what comes of them."""

    def __init__(self, runs: Sequence[Run], changed: Sequence[ChangedExperts], arena: int) -> None:
        """`changed` are the variants of the runs, `arena` is the address that planes' offsets count from."""
        assert len(runs) == len(changed)
        self.runs = tuple(runs)
        self._changed, self._arena = tuple(changed), arena
        self._bounds = np.array([run.first for run in runs])
        self._base: list[int] = []
        self._stretches: dict[int, list[tuple[int, ExpertDeltaSpec, int, int]]] = {}

    def chains(self, layer: int, rows: Grouping, wanted: Sequence[Chain]) -> list[Chain]:
        """The chains of the groups in use, with the delta planes that their rows need."""
        self._base, self._stretches = [len(chain) for chain in wanted], {}
        more: dict[int, list[tuple[int, int, int]]] = {}
        for group, number, first, end in rows.stretches(self._bounds):
            expert = rows.expert_of(group)
            spec = self._changed[number].spec(layer, expert)
            if spec is not None:
                variant = self.runs[number].variant
                self._stretches.setdefault(group, []).append((variant, spec, first, end))
                key = (layer, expert, FIRST_DELTA + variant)
                more.setdefault(group, []).append(key)
        return [(*chain, *more.get(group, ())) for group, chain in zip(rows.used, wanted, strict=True)]

    def arrived(
        self, rows: Grouping, batch: Sequence[tuple[int, tuple[int, ...]]]
    ) -> tuple[list[tuple[int, tuple[int, ...]]], Pieces]:
        """Of (place among the groups in use, offsets): (group, offsets of the base's planes), and groups' pieces."""
        arrived, pieces = [], []
        for place, offsets in batch:
            group, base = rows.used[place], self._base[place]
            arrived.append((group, offsets[:base]))
            stretches = self._stretches.get(group, ())
            pieces.append(
                [
                    Piece(*stretch, self._arena + offset)
                    for stretch, offset in zip(stretches, offsets[base:], strict=True)
                ]
            )
        return arrived, pieces

    def also(self, layer: int, expert: int) -> Chain:
        """The delta plane of an expert that rows of the step are likely to need if they need the expert: where they are
        of several variants, nobody knows of which."""
        if len(self.runs) > 1:
            return ()
        return tuple(
            (layer, expert, FIRST_DELTA + run.variant)
            for run, changed in zip(self.runs, self._changed, strict=True)
            if changed.spec(layer, expert) is not None
        )

    def rows_of(self, variant: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of these rows that run on a variant."""
        run = next(one for one in self.runs if one.variant == variant)
        return rows[(rows >= run.first) & (rows < run.end)]


def is_low_rank(spec: ExpertDeltaSpec) -> bool:
    """Whether the deltas are products of thin matrices, which compiled experts do not know."""
    return isinstance(spec.up or spec.down, LowRankRegion)


def add_pieces(
    kernels: Kernels, pieces: Sequence[Piece], which: Literal["up", "down"], x_RK: torch.Tensor, y_RN: torch.Tensor
) -> None:
    """Add the deltas of one projection to the outputs of its base."""
    for piece in pieces:
        region = piece.spec.up if which == "up" else piece.spec.down
        if region is not None:
            address = piece.address + (piece.spec.up_at if which == "up" else piece.spec.down_at)
            kernels.add_delta(x_RK[piece.first : piece.end], region, address, y_RN[piece.first : piece.end])


def expert_deltas(pieces: Pieces, starts: NDArray[np.int32]) -> ExpertDeltas | None:
    """What kernels are told of the pieces of jobs whose rows begin at `starts`; None where there are none."""
    found = [(job, piece) for job, some in enumerate(pieces) for piece in some]
    if not found:
        return None
    numbers: dict[int, int] = {}
    specs: list[ExpertDeltaSpec] = []
    for _, piece in found:
        if id(piece.spec) not in numbers:
            numbers[id(piece.spec)] = len(specs)
            specs.append(piece.spec)
    jobs_D = np.array([job for job, _ in found], dtype=np.int32)
    begin_D = starts[jobs_D]
    return ExpertDeltas(
        specs=tuple(specs),
        jobs=jobs_D,
        firsts=begin_D + np.array([piece.first for _, piece in found], dtype=np.int32),
        ends=begin_D + np.array([piece.end for _, piece in found], dtype=np.int32),
        spec=np.array([numbers[id(piece.spec)] for _, piece in found], dtype=np.int32),
        planes=np.array([piece.address for _, piece in found], dtype=np.int64),
    )
