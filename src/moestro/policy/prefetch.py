"""Which experts to read before they are asked for.

A prefetch that is right saves at most the time until its layer routes; one that is wrong keeps the link from what is
asked for, and takes a slot. So only experts that are likelier used than not are worth it, and when prefetches of late
did worse than that, none are made until the next trial.

Shapes: E experts per layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moestro.policy.observation import Shape
from moestro.policy.predictors.base import Predictor

_MEMORY = 1 / 64
_TRIAL = 256


@dataclass(frozen=True, slots=True)
class PrefetchRule:
    """`least` probability that is worth a read, at most `most` experts a layer, `ahead` layers at a time."""

    least: float = 0.5
    most: int = 4
    ahead: int = 1


class Prefetcher:
    """Proposes experts of the layers to come, the likeliest first, and judges itself by what became of them."""

    def __init__(self, shape: Shape, predictor: Predictor, rule: PrefetchRule | None = None) -> None:
        self._shape, self._predictor = shape, predictor
        self._rule = rule or PrefetchRule()
        self._pending: dict[int, frozenset[int]] = {}
        self._precision = 1.0
        self._idle = 0

    @property
    def precision(self) -> float:
        """Share of the late proposals that were used, most recent ones weighing most."""
        return self._precision

    def judge(self, layer: int, counts_E: np.ndarray) -> None:
        """The layer has routed: compare with what had been proposed for it."""
        for expert in self._pending.pop(layer, frozenset()):
            self._precision += _MEMORY * ((counts_E[expert] > 0) - self._precision)

    def propose(self, layer: int, absent: Callable[[int], np.ndarray]) -> list[tuple[int, int]]:
        """(layer, expert) of experts worth reading now that `layer` has routed; `absent(layer)` is a mask [E]."""
        if self._resting():
            return []
        rule, proposed = self._rule, []
        for ahead in range(1, rule.ahead + 1):
            target = (layer + ahead) % self._shape.layers
            likely_E = np.where(absent(target), self._predictor.forecast(target, 1), 0)
            order = np.argsort(-likely_E, kind="stable")[: rule.most]
            chosen = [int(expert) for expert in order if likely_E[expert] >= rule.least]
            if chosen:
                self._pending[target] = frozenset(chosen) | self._pending.get(target, frozenset())
                proposed += [(float(likely_E[expert]), target, expert) for expert in chosen]
        proposed.sort(key=lambda one: -one[0])
        return [(target, expert) for _, target, expert in proposed]

    def _resting(self) -> bool:
        """Whether prefetches have not paid of late; now and then one layer is tried all the same."""
        if self._precision >= self._rule.least:
            return False
        self._idle = (self._idle + 1) % _TRIAL
        return self._idle != 0
