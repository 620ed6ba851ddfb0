"""What a trace is like, in a few numbers: how much of it is there, and how often experts come again.

Shapes: N rows, L MoE layers, K experts per row, E experts per layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moestro.trace.eam import eam_of_rows
from moestro.trace.trace import Trace


@dataclass(frozen=True)
class Summary:
    """Of some rows of a trace.

    Attributes:
        prompt_rows, decode_rows: how many.
        used: mean share of a layer's experts that were used at all.
        repeated: mean share of a row's experts that the row before (of the same request) used too, same layer; None
            where no row has one before it.
        gini: mean over layers of the Gini coefficient of the experts' loads: 0 is alike, near 1 is all on a few.
    """

    prompt_rows: int
    decode_rows: int
    used: float
    repeated: float | None
    gini: float


def summarise(trace: Trace, request: int | None = None) -> Summary:
    """Of a whole trace, or of one request."""
    rows = slice(0, trace.rows) if request is None else trace.rows_of(request)
    counts_LE = eam_of_rows(trace.experts_NLK[rows], trace.num_experts)
    decoded = int(trace.decode_N[rows].sum())
    return Summary(
        prompt_rows=rows.stop - rows.start - decoded,
        decode_rows=decoded,
        used=float((counts_LE > 0).mean()),
        repeated=_repeated(trace, rows),
        gini=float(np.mean([_gini(counts_E) for counts_E in counts_LE])),
    )


def _repeated(trace: Trace, rows: slice) -> float | None:
    experts_NLK = trace.experts_NLK[rows]
    again = np.zeros(experts_NLK[1:].shape, dtype=bool)
    for pick in range(trace.picks):
        again |= experts_NLK[1:] == experts_NLK[:-1, :, pick, None]
    inner = np.ones(len(again), dtype=bool)
    starts = trace.offsets_R1[(trace.offsets_R1 > rows.start) & (trace.offsets_R1 < rows.stop)] - rows.start
    inner[starts - 1] = False
    return float(again[inner].mean()) if inner.any() else None


def _gini(counts_E: np.ndarray) -> float:
    sorted_E = np.sort(counts_E)
    experts = len(sorted_E)
    ranks_E = 2 * np.arange(1, experts + 1) - experts - 1
    return float((ranks_E * sorted_E).sum() / (experts * sorted_E.sum()))
