"""One layer of experts during calibration: who is routed where, each expert's share, and the combined outputs.

Sequences come in a fixed order: the calibration windows, then the plain copy of the short sequence, then one copy of it
for each layer, whose experts are at the lowest level in that layer alone.

Shapes: R rows of all sequences, T rows of some, H hidden, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moestro.calibration.expert import ExpertResult, ExpertRows, spread_rows
from moestro.calibration.stream import LayerRows

SAMPLE_ROWS = 1024
"""Rows that stand for the whole layer where an expert has few of its own."""


@dataclass(frozen=True)
class _Part:
    """Rows of one role that are routed to an expert: their places among all rows and their router weights."""

    places_T: torch.Tensor
    weights_T: torch.Tensor


class LayerBatch:
    """The rows of all sequences in one layer. `windows` of them are for calibration."""

    def __init__(self, layer: int, rows: Sequence[LayerRows], windows: int) -> None:
        sizes = [len(one.hidden_TH) for one in rows]
        self._hidden_RH = torch.cat([one.hidden_TH for one in rows]).float()
        self._index_RK = torch.cat([one.index_TK for one in rows])
        self._weights_RK = torch.cat([one.weights_TK for one in rows])
        self._output_RH = torch.zeros_like(self._hidden_RH)
        self._sizes = sizes
        self._short = sizes[windows]
        self._own = sum(sizes[:windows])
        # Copies of later layers are still equal to the plain one: their outputs are copied in the end.
        low_copy = windows + 1 + layer
        self._low = sum(sizes[:low_copy]), sum(sizes[: low_copy + 1])

    @property
    def sample(self) -> torch.Tensor:
        """Calibration rows [S, H] of the layer, evenly spread."""
        return spread_rows(self._hidden_RH[: self._own], SAMPLE_ROWS)

    @property
    def is_finite(self) -> bool:
        """Whether the rows are numbers."""
        return bool(self._hidden_RH.isfinite().all())

    def rows_of(self, expert: int) -> ExpertRows:
        """What an expert has to compute."""
        own, raw, low = self._parts(expert)
        hidden = self._hidden_RH
        return ExpertRows(hidden[own.places_T], own.weights_T, hidden[raw.places_T], hidden[low.places_T])

    def add(self, expert: int, result: ExpertResult) -> None:
        """Add an expert's weighted outputs. Experts come in ascending order, so that sums have one order."""
        for part, output_TH in zip(self._parts(expert), (result.own_TH, result.raw_TH, result.low_TH), strict=True):
            self._output_RH[part.places_T] += output_TH * part.weights_T.unsqueeze(1)

    def outputs(self) -> list[torch.Tensor]:
        """The outputs of every sequence."""
        plain_TH = self._output_RH[self._own : self._own + self._short]
        for start in range(self._low[1], len(self._output_RH), self._short):
            self._output_RH[start : start + self._short] = plain_TH
        return list(torch.split(self._output_RH, self._sizes))

    def _parts(self, expert: int) -> tuple[_Part, _Part, _Part]:
        start, end = self._low
        spans = ((0, self._own), (self._own, start), (start, end))
        own, raw, low = (self._part(expert, first, last) for first, last in spans)
        return own, raw, low

    def _part(self, expert: int, first: int, last: int) -> _Part:
        places_T, choices_T = (self._index_RK[first:last] == expert).nonzero(as_tuple=True)
        places_T = places_T + first
        return _Part(places_T, self._weights_RK[places_T, choices_T])
