"""What a predictor of routing sees and says. Pure: no file, no clock, no thread, no tensor.

Shapes: E experts per layer.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from moestro.policy.observation import Routing


class Predictor(Protocol):
    """Foresees which experts the requests in flight will use."""

    def begin(self, request: int, /) -> None:
        """A request's first forward pass is about to run."""
        ...

    def end(self, request: int, /) -> None:
        """Nothing more comes of this request."""
        ...

    def observe(self, routing: Routing, /) -> None:
        """A layer has routed; layers come in ascending order, pass after pass."""
        ...

    def forecast(self, layer: int, horizon: int = 1, /) -> np.ndarray:
        """Probabilities [E], float32, that the next `horizon` visits of `layer` use an expert at least once.

        The next visit of a layer behind the one observed last is in the forward pass under way. Uses by any request in
        flight count. The array may be overwritten by the next call.
        """
        ...
