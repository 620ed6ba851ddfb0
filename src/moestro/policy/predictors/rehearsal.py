"""Forecasts kept until the truth is known, so that what is made of them can be learnt.

Shapes: L MoE layers.
"""

from __future__ import annotations

import numpy as np

from moestro.policy.observation import Shape

# Ranges of how far ahead a forecast looks, each learnt for itself: the next layer, up to here, the rest of the circle.
_MIDDLE = 4
RANGES = 3
# So many passes learn from every visit.
_EAGER = 128


class Rehearsal:
    """Before each layer routes: which forecasts now come true, and which to make for later.

    The next layer's forecast (what prefetch asks for) is checked at the last moment, in every visit of the first
    passes and later in one of `pause`; one a few layers ahead, and one a whole pass ahead (what eviction asks for), in
    one visit of `pause` each.
    """

    def __init__(self, shape: Shape, *, pause: int = 4) -> None:
        self._layers = shape.layers
        self._pause = pause
        self._at = -1
        self._passes = 0
        self._kept: list[dict[int, np.ndarray]] = [{} for _ in range(shape.layers)]

    def range_of(self, layer: int) -> int:
        """0, 1 or 2: which range the next visit of `layer` is in, seen from the layer observed last."""
        ahead = (layer - self._at - 1) % self._layers + 1
        return 0 if ahead == 1 else 1 if ahead <= _MIDDLE else 2

    def check_next(self) -> bool:
        """Whether to compare the forecast for the layer that is about to route with what comes."""
        return self._passes < _EAGER or (self._at + self._passes) % self._pause == 2 % self._pause

    def due(self, layer: int) -> dict[int, np.ndarray]:
        """Forecasts for this visit by range, no longer kept."""
        due, self._kept[layer] = self._kept[layer], {}
        return due

    def wanted(self) -> list[tuple[int, int]]:
        """(layer, range) of the forecasts to be made now, before `step`, and handed to `keep`."""
        # The pass is in it, or with a multiple of the pause as many layers the same ones would always be meant.
        turn = (self._at + self._passes) % self._pause
        if self._at < 0 or turn > 1:
            return []
        layer = self._at if turn == 0 else (self._at + 2 + self._passes % (_MIDDLE - 1)) % self._layers
        reach = self.range_of(layer)
        return [(layer, reach)] if reach else []

    def keep(self, layer: int, reach: int, forecast: np.ndarray) -> None:
        """Until the layer's next visit; `forecast` is not copied."""
        self._kept[layer][reach] = forecast

    def step(self, layer: int) -> None:
        """The layer has routed."""
        if layer <= self._at:
            self._passes += 1
        self._at = layer
