"""What one layer's errors do to the final logits.

Shapes: T rows, V vocabulary.
"""

from __future__ import annotations

import torch


class LogitDistance:
    """Takes the logits of a plain sequence, number `plain`, and of its copies after it, one per layer."""

    def __init__(self, plain: int) -> None:
        self._plain = plain
        self._wanted_TV = torch.empty(0)
        self._distances: dict[int, float] = {}

    def add(self, sequence: int, logits_TV: torch.Tensor) -> None:
        """Take the logits of a sequence; those before the plain one are of no interest."""
        if sequence == self._plain:
            self._wanted_TV = logits_TV.log_softmax(-1)
        elif sequence > self._plain:
            self._distances[sequence - self._plain - 1] = mean_divergence(self._wanted_TV, logits_TV.log_softmax(-1))

    def of_layer(self, layer: int) -> float:
        """Mean KL divergence per token, in nats, of the copy in which this layer was at the lowest level."""
        return self._distances[layer]


def mean_divergence(wanted_TV: torch.Tensor, found_TV: torch.Tensor) -> float:
    """Mean over rows of KL(wanted || found), both given as logarithms of probabilities."""
    total = 0.0
    for wanted_V, found_V in zip(wanted_TV.double(), found_TV.double(), strict=True):
        total += float((wanted_V.exp() * (wanted_V - found_V)).nan_to_num(0.0).sum())
    return max(0.0, total / len(wanted_TV))
