"""Several recordings of one model as one trace."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moestro.errors import TraceError
from moestro.trace.trace import Trace


def join(traces: Sequence[Trace]) -> Trace:
    """The requests of all traces, one trace after another. Lookahead is kept only where all have it.

    Raises:
        TraceError: the traces are of models of different shapes.
    """
    first = traces[0]
    if len(traces) == 1:
        return first
    for other in traces[1:]:
        shapes = [(one.layers, one.num_experts, one.picks) for one in (first, other)]
        if shapes[0] != shapes[1]:
            raise TraceError(
                f"{first.source} has {shapes[0]} layers, experts and experts per token, {other.source} {shapes[1]}: "
                "give traces of one model at a time."
            )
    ahead = [one.lookahead_NPLC for one in traces if one.lookahead_NPLC is not None]
    comparable = len(ahead) == len(traces) and len({one.shape[1:] for one in ahead}) == 1
    return Trace(
        experts_NLK=np.concatenate([one.experts_NLK for one in traces]),
        weights_NLK=np.concatenate([one.weights_NLK for one in traces]),
        token_N=np.concatenate([one.token_N for one in traces]),
        offsets_R1=np.cumsum([0, *np.concatenate([np.diff(one.offsets_R1) for one in traces])], dtype=np.int64),
        meta=tuple(meta for one in traces for meta in one.meta),
        num_experts=first.num_experts,
        decode_N=np.concatenate([one.decode_N for one in traces]),
        step_N=np.concatenate([_steps(one) for one in traces]),
        lookahead_NPLC=np.concatenate(ahead) if comparable else None,
        source=", ".join(one.source for one in traces),
    )


def _steps(trace: Trace) -> np.ndarray:
    """Those recorded, or one for each pass."""
    if trace.step_N is not None:
        return trace.step_N
    steps_N = np.empty(trace.rows, dtype=np.int32)
    for request in range(trace.requests):
        for number, one in enumerate(trace.passes(request)):
            steps_N[one.first : one.last] = number
    return steps_N
