"""What policies and predictors are told of a pass of a trace, layer by layer.

Shapes: B rows of a pass, C candidates of a gate, K experts per row.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moestro.errors import TraceError
from moestro.policy.choice import Choice
from moestro.policy.observation import Routing
from moestro.policy.predictors import LooksAhead
from moestro.simulate.passes import Pass
from moestro.trace.trace import Trace

GATE = "gate"


def routings(trace: Trace, one: Pass) -> Iterator[Routing]:
    """Of each layer of the pass, in order."""
    ids_BLK = trace.experts_NLK[one.rows_B].astype(np.int64)
    weights_BLK = trace.weights_NLK[one.rows_B] / np.float32(255)
    for layer in range(trace.layers):
        yield Routing.of(layer, ids_BLK[:, layer], weights_BLK[:, layer], one.requests, experts=trace.num_experts)


def gates_of(choice: Choice, predictor: str, trace: Trace) -> LooksAhead | None:
    """Whom `tell_gates` is to tell, for the choice that was made with a predictor of this name.

    Raises:
        TraceError: the predictor needs what the gates of layers to come said, and the trace has nothing of it.
    """
    if choice.predictor is None or GATE not in predictor.split("+"):
        return None
    if trace.lookahead_NPLC is None:
        raise TraceError(
            f"{trace.source} has no lookahead, which the predictor {predictor!r} needs: record it with --lookahead 2, "
            "or choose another predictor."
        )
    assert isinstance(choice.predictor, LooksAhead)
    return choice.predictor


def tell_gates(gates: LooksAhead | None, trace: Trace, one: Pass, layer: int) -> None:
    """After the layer has routed: what the gates of the next layers make of its hidden states."""
    if gates is None:
        return
    lookahead_NPLC = trace.lookahead_NPLC
    assert lookahead_NPLC is not None
    for ahead in range(1, min(lookahead_NPLC.shape[1], trace.layers - 1 - layer) + 1):
        gates.lookahead(layer, ahead, lookahead_NPLC[one.rows_B, ahead - 1, layer])
