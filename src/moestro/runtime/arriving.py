"""A layer's experts in one compiled call: those in memory first, the others as their planes come.

Handing each batch that has come back to the interpreter costs more than computing it does, as everything the interpreter
touches has been washed out of the processor's caches by the weights.

Shapes: T rows of the batch, K experts per row, P = T * K places of the output, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moestro import _native

Moments = list[tuple[float, float, int]]
"""(begin, end, number): seconds since a call began."""


class Arriving:
    """The chains of a stream that tells it of them (`memory.planes.Told`), taken as experts of a layer.

    Meant for one stream after another.
    """

    def __init__(self, arena: int) -> None:
        """Offsets of planes are from the address `arena`."""
        self._arena = arena
        self._arrivals = _native.Arrivals()
        self._experts: Sequence[int] = ()

    def begin(self, experts: Sequence[int]) -> None:
        """The chains of the next stream are those of these experts."""
        self._arrivals.clear()
        self._experts = experts

    def whole(self, index: int, offsets: tuple[int, ...]) -> None:
        arena = self._arena
        self._arrivals.come(self._experts[index], [arena + offset for offset in offsets])

    def failed(self) -> None:
        self._arrivals.fail()

    def compute(
        self, known: _native.KnownExperts, hidden_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> tuple[torch.Tensor, Moments, Moments] | None:
        """The weighted sum [T, H], once all have come; None when one could not be read.

        The moments are when so many experts were computed, and when it was waited until the chain of an index came.
        """
        rows, picks = index_TK.shape
        sum_TH, out_PH = torch.empty_like(hidden_TH), torch.empty(rows * picks, hidden_TH.shape[1])
        inputs = (hidden_TH.data_ptr(), index_TK.data_ptr(), weights_TK.data_ptr())
        course = known.run_arriving(*inputs, rows, picks, out_PH.data_ptr(), sum_TH.data_ptr(), self._arrivals)
        if course is None:
            return None
        computed, waited = course
        return sum_TH, computed, [(begun, ended, self._experts.index(expert)) for begun, ended, expert in waited]
