"""Recorded routing in place of the router's, so that random weights of a real shape are asked for as real ones are.

For measurements only: what a model computes under somebody else's routing means nothing.

Shapes: T rows of a step, N rows of the trace, L MoE layers, K experts per row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moestro.errors import TraceError
from moestro.runtime.batch import Segment
from moestro.trace import Trace


class Replay:
    """Experts and weights of a trace, row by row.

    A request begins where one of the trace begins, and each of its tokens, of prompt and answer alike, takes the next
    row; after the last row comes the first. So a token's routing is a matter of the request's number and the token's
    place alone, and neighbours in a sequence are routed as neighbours were.

    Args:
        experts: how many each MoE layer has.
        picks: how many of them each layer runs for a token.

    Raises:
        TraceError: the trace is of a model of another shape, or empty.
    """

    def __init__(self, trace: Trace, *, experts: Sequence[int], picks: Sequence[int]) -> None:
        _check(trace, experts, picks)
        self._experts_NLK = trace.experts_NLK
        self._weights_NLK = trace.weights_NLK
        self._starts = trace.offsets_R1[:-1]
        self._ids_LTK, self._weights_LTK = np.zeros((0, 0, 0), dtype=np.int64), np.zeros((0, 0, 0), dtype=np.float32)

    def begin(self, segments: Sequence[Segment]) -> None:
        """A step over these segments begins."""
        starts, count = self._starts, len(self._experts_NLK)
        places = [starts[one.request % len(starts)] + np.arange(one.start, one.end) for one in segments]
        rows_T = np.concatenate(places) % count
        self._ids_LTK = self._experts_NLK[rows_T].swapaxes(0, 1).astype(np.int64, order="C")
        self._weights_LTK = self._weights_NLK[rows_T].swapaxes(0, 1).astype(np.float32, order="C")
        self._weights_LTK /= np.maximum(self._weights_LTK.sum(-1, keepdims=True), 1.0)

    def layer(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Experts of the step's rows in a layer, int64 [T, K], and their weights, fp32 [T, K], which add up to 1."""
        return self._ids_LTK[layer], self._weights_LTK[layer]

    def layers(self) -> tuple[np.ndarray, np.ndarray]:
        """Of all layers, [L, T, K]; kept until the next step begins."""
        return self._ids_LTK, self._weights_LTK


def _check(trace: Trace, experts: Sequence[int], picks: Sequence[int]) -> None:
    if set(experts) != {trace.num_experts} or set(picks) != {trace.picks} or len(experts) != trace.layers:
        raise TraceError(
            f"{trace.source} is of {trace.layers} MoE layers with {trace.picks} of {trace.num_experts} experts for a "
            f"token; this model has {len(experts)} with {_listed(picks)} of {_listed(experts)}. Expected a trace of a "
            "model of the same shape."
        )
    if not trace.rows:
        raise TraceError(f"{trace.source} has no rows, so there is nothing to replay. Record it anew.")


def _listed(numbers: Sequence[int]) -> str:
    return " or ".join(str(number) for number in sorted(set(numbers)))
