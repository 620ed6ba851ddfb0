"""HOBBIT's cache policy: one score of recency, frequency, use at high precision and distance in layers.

Source: Tang et al., "HOBBIT: A Mixed Precision Expert Offloading System for Fast MoE Inference", arXiv 2411.01433,
sequence-level expert caching: the victim has the least
    w1 R/T + w2 F/T + w3 H/T + w4 (1 - ((l_e - l + L) mod L) / L),
R the time of the expert's last use, F its uses, H its uses at high precision, T the time now, l_e its layer, l the
layer that runs. "Sequence-level" is taken to mean that records start anew with a sequence
(with several in flight: when there was none); without that the policy comes close to LFU and loses to LRU. The weights
are not given there; the defaults are among the best of a small grid on routing recorded from gpt-oss-20b.
Shapes: L MoE layers, E experts per layer.
"""

from __future__ import annotations

import numpy as np

from moestro.policy.keeping.keeper import Keeper, shares
from moestro.policy.observation import Routing, Shape


class Hobbit(Keeper):
    """Time runs in forward passes. With one precision every use is one at high precision: H = F."""

    lasting = False

    def __init__(
        self,
        shape: Shape,
        *,
        recency: float = 0.5,
        frequency: float = 0.5,
        high_precision: float = 0.5,
        distance: float = 0.1,
    ) -> None:
        super().__init__(shape)
        self._recency, self._uses = recency, frequency + high_precision
        self._last_LE = np.zeros((shape.layers, shape.experts))
        self._sum_LE = np.zeros((shape.layers, shape.experts))
        ahead_L = np.arange(shape.layers)
        self._near_L = distance * (1 - ahead_L / shape.layers)
        self._visits = 0
        self._in_flight = 0

    def begin(self, _request: int, /) -> None:
        """The score is of the sequence: records start anew, but for the order of the last uses, which breaks ties."""
        if not self._in_flight:
            self._last_LE -= self._visits / self.shape.layers
            np.multiply(self._last_LE, self._recency, out=self._sum_LE)
            self._visits = 0
        self._in_flight += 1

    def end(self, _request: int, /) -> None:
        """Records stay until the next sequence."""
        self._in_flight -= 1

    def observe(self, routing: Routing, /) -> None:
        """O(K)."""
        self._visits += 1
        now = self._visits / self.shape.layers
        ids_U, share = shares(routing)
        last_U = self._last_LE[routing.layer, ids_U]
        self._sum_LE[routing.layer, ids_U] += self._recency * (now - last_U) + self._uses * share
        self._last_LE[routing.layer, ids_U] = now

    def worth(self, layer: int, /) -> np.ndarray:
        """T times the score: the same order, one addition."""
        near_L = np.roll(self._near_L, layer) * (self._visits / self.shape.layers)
        return np.add(self._sum_LE, near_L[:, None], out=self._worth_LE)
