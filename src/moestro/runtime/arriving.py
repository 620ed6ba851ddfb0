"""A layer's experts in one compiled call: those in memory first, the others as their planes come.

Coming back to the interpreter for each that has arrived costs about as much as computing it, as all that it touches has
been washed out of the processor's caches by the weights.

Shapes: T rows of the batch, K experts per row, P = T * K places of the output, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moestro import _native
from moestro.memory.tickets import Notice


@dataclass(frozen=True, slots=True)
class Found:
    """The weighted sum [T, H]; (begin, end, experts) of what was computed at once, and (begin, end, index of the chain
    that came, begin of its read) of waits. Seconds since the call began, but for reads: as of `time.perf_counter`."""

    sum_TH: torch.Tensor
    computed: Sequence[tuple[float, float, int]]
    waited: Sequence[tuple[float, float, int, float]]


class Arriving:
    """The chains of a stream that tells it of them (`memory.planes.Told`), taken as experts of a layer.

    Meant for one stream after another.
    """

    def __init__(self, arena: int) -> None:
        """Offsets of planes are from the address `arena`."""
        self._arena = arena
        self._arrivals = _native.Arrivals()
        self._experts: Sequence[int] = ()
        self._turn = 0

    def begin(self, experts: Sequence[int]) -> None:
        """The chains of the next stream are those of these experts, or groups of rows by expert and level."""
        self._turn, self._experts = self._arrivals.begin(), experts

    def whole(self, index: int, offsets: tuple[int, ...]) -> None:
        self._arrivals.come(self._turn, self._experts[index], self._addresses(offsets))

    def notice(self, index: int, offsets: tuple[int, ...]) -> Notice:
        return self._arrivals, self._turn, self._experts[index], self._addresses(offsets)

    def _addresses(self, offsets: tuple[int, ...]) -> list[int]:
        arena = self._arena
        return [arena + offset for offset in offsets]

    def failed(self) -> None:
        self._arrivals.fail()

    def compute(
        self, known: _native.KnownExperts, hidden_TH: torch.Tensor, groups_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> Found | None:
        """What comes of it once all have come; None when one could not be read."""
        rows, picks = groups_TK.shape
        sum_TH, out_PH = torch.empty_like(hidden_TH), torch.empty(rows * picks, hidden_TH.shape[1])
        inputs = (hidden_TH.data_ptr(), groups_TK.data_ptr(), weights_TK.data_ptr())
        course = known.run_arriving(*inputs, rows, picks, out_PH.data_ptr(), sum_TH.data_ptr(), self._arrivals)
        if course is None:
            return None
        computed, waited = course
        place_of = self._experts.index
        return Found(
            sum_TH, computed, [(begun, ended, place_of(expert), read) for begun, ended, expert, read in waited]
        )
