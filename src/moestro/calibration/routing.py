"""What calibration sees of the routing: enough to train the predictor that the store's model will run with.

Shapes: N rows of all windows, L MoE layers, K experts per row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from moestro.calibration.stream import LayerRows
from moestro.calibration.text import Windows
from moestro.foresight import NETS_FILE, encode_nets, train, worth_their_bytes
from moestro.foresight.train import LEAST_ROWS, nets_bytes
from moestro.policy.observation import Shape
from moestro.runtime.level import cut
from moestro.store.pack_plan import PackPlan
from moestro.trace import Trace
from moestro.trace.recorder import quantised_weights


class RoutingLog:
    """The routing of the calibration windows, layer by layer. A text is followed as if each token had been decoded."""

    def __init__(self, windows: Windows) -> None:
        self._windows = windows
        self._experts_NLK: list[np.ndarray] = []
        self._weights_NLK: list[np.ndarray] = []

    def add(self, rows: Sequence[LayerRows]) -> None:
        """The next layer's rows of all sequences, the windows first."""
        own = rows[: len(self._windows.sequences)]
        ids_NK = torch.cat([one.index_TK for one in own]).numpy()
        weights_NK = torch.cat([one.weights_TK for one in own]).float().numpy()
        order_NK = np.argsort(-weights_NK, axis=-1, kind="stable")
        self._experts_NLK.append(np.take_along_axis(ids_NK, order_NK, -1))
        self._weights_NLK.append(quantised_weights(np.take_along_axis(weights_NK, order_NK, -1)))

    def files(self, plan: PackPlan, say: Callable[[], None]) -> tuple[tuple[str, bytes], ...]:
        """The trained predictor, where it would be used: it must be small beside the experts."""
        picks = {one.shape[1] for one in self._experts_NLK}
        experts = max(layer.experts for layer in plan.layers)
        if len(picks) != 1 or self._windows.tokens < LEAST_ROWS:
            return ()
        shape = Shape(len(plan.layers), experts, picks.pop())
        level = plan.options.exact_level
        per_expert = [sum(plane.nbytes for plane in cut(layout, level).planes) for layout in plan.layouts]
        expert_bytes = sum(layer.experts * per_expert[layer.layout] for layer in plan.layers)
        if not worth_their_bytes(nets_bytes(shape), expert_bytes):
            return ()
        say()
        return ((NETS_FILE, encode_nets(*train(self._trace(experts)))),)

    def _trace(self, experts: int) -> Trace:
        sequences = self._windows.sequences
        rows = sum(len(one) for one in sequences)
        return Trace(
            experts_NLK=np.stack(self._experts_NLK, axis=1).astype(np.uint8 if experts <= 256 else np.uint16),
            weights_NLK=np.stack(self._weights_NLK, axis=1),
            token_N=np.array([token for one in sequences for token in one], dtype=np.int32),
            offsets_R1=np.cumsum([0, *(len(one) for one in sequences)], dtype=np.int64),
            meta=tuple({} for _ in sequences),
            num_experts=experts,
            decode_N=np.ones(rows, dtype=bool),
            source="The calibration text's routing",
        )
