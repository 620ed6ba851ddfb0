"""The gates of layers to come, asked early: what they would choose if the hidden state stayed as it is now.

Source: Eliseev and Mazur, "Fast Inference of Mixture-of-Experts Language Models with Offloading", arXiv 2312.17238
(the next layer's gate), and HOBBIT, arXiv 2411.01433 (several layers ahead). The runtime computes the gates.
Shapes: T rows of the step, C candidates per row (twice what a row uses), E experts per layer, A layers ahead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from moestro.policy.observation import Routing, Shape
from moestro.policy.predictors.flight import within
from moestro.policy.predictors.popularity import Popularity

# Visits that a rank's precision is taken to have had before any was seen.
_PRIOR = 16.0
_FORGET_AT = 4096.0


@runtime_checkable
class LooksAhead(Protocol):
    """A predictor that is told what the gates of later layers say; so are those that pass it on to such ones."""

    def lookahead(self, layer: int, ahead: int, ids_TC: np.ndarray, scores_TC: np.ndarray | None = None, /) -> None:
        """See `Gate.lookahead`."""
        ...


@dataclass(frozen=True, slots=True)
class _Asked:
    """What gates said of the layer's next visit."""

    ahead: int
    ids_TC: np.ndarray


class Gate:
    """An expert at rank c of a gate asked a layers ahead is used as often as such experts were so far.

    `lookahead` comes after `observe` of the layer whose hidden state was used; the nearest lookahead counts. Layers
    that no gate was asked for, and experts that no gate named, are forecast by popularity.
    """

    def __init__(self, shape: Shape, *, furthest: int = 4, candidates: int | None = None) -> None:
        assert furthest >= 1
        self.shape = shape
        self._candidates = min(shape.experts, 2 * shape.picks if candidates is None else candidates)
        self._popularity = Popularity(shape)
        rank_C = np.arange(self._candidates)
        # Before anything is seen: a gate's picks are right three times in four, its runners-up one in eight.
        start_C = np.where(rank_C < shape.picks, 0.75, 0.125)
        self._right_ALC = np.tile(_PRIOR * start_C, (furthest, shape.layers, 1))
        self._rows_AL = np.full((furthest, shape.layers), _PRIOR)
        self._asked: list[_Asked | None] = [None] * shape.layers

    def begin(self, request: int, /) -> None:
        """Counts the request."""
        self._popularity.begin(request)

    def end(self, request: int, /) -> None:
        """Forgets the request."""
        self._popularity.end(request)

    def lookahead(self, layer: int, ahead: int, ids_TC: np.ndarray, scores_TC: np.ndarray | None = None, /) -> None:
        """What the gate of `layer + ahead` says of the hidden states that went into the experts of `layer`.

        `ids_TC` in falling order of their scores, rows as in the routing; beyond `furthest` it is not looked at.
        `scores_TC` is not used: the rank says how sure the gate is, in a way that needs no scale.
        """
        assert ids_TC.ndim == 2
        assert scores_TC is None or scores_TC.shape == ids_TC.shape
        target = layer + ahead
        if target >= self.shape.layers or ahead > len(self._rows_AL):
            return
        self._asked[target] = _Asked(ahead, ids_TC[:, : self._candidates].astype(np.int64))

    def observe(self, routing: Routing, /) -> None:
        """O(T C): counts which ranks were right."""
        self._popularity.observe(routing)
        asked, self._asked[routing.layer] = self._asked[routing.layer], None
        rows = len(routing.experts_TK)
        if asked is None or rows == 0 or len(asked.ids_TC) != rows:
            return
        used_TE = np.zeros((rows, self.shape.experts), bool)
        np.put_along_axis(used_TE, routing.experts_TK.astype(np.int64), True, axis=1)
        right_TC = np.take_along_axis(used_TE, asked.ids_TC, axis=1)
        at = asked.ahead - 1, routing.layer
        self._right_ALC[at][: right_TC.shape[1]] += right_TC.mean(0)
        self._rows_AL[at] += 1
        if self._rows_AL[at] > _FORGET_AT:
            self._right_ALC[at] *= 0.5
            self._rows_AL[at] *= 0.5

    def forecast(self, layer: int, horizon: int = 1, /) -> np.ndarray:
        """[E] float32. Visits after the next one are forecast by popularity."""
        asked = self._asked[layer]
        if asked is None:
            return self._popularity.forecast(layer, horizon)
        spared_E = self._spared(layer, asked)
        if horizon > 1:
            spared_E *= 1 - self._popularity.forecast(layer, horizon - 1)
        return within(1 - spared_E, 1)

    def _spared(self, layer: int, asked: _Asked) -> np.ndarray:
        """[E] the probability that no row uses the expert."""
        rows, named = asked.ids_TC.shape
        at = asked.ahead - 1, layer
        right_C = np.clip(self._right_ALC[at][:named] / self._rows_AL[at], 0, 1 - 1e-6)
        # What the named ones leave of a row's picks goes to the others, by popularity.
        popular_E = self._popularity.rates(layer)
        others = max(1e-9, self.shape.picks - float(popular_E[asked.ids_TC].sum(1).mean())) if rows else 1.0
        left = max(0.0, self.shape.picks - float(right_C.sum()))
        stray_E = np.clip(popular_E * (left / others), 0, 0.5)
        calm_E = np.log1p(-stray_E)
        odds_TC = np.log1p(-right_C) - calm_E[asked.ids_TC]
        sum_E = np.bincount(asked.ids_TC.ravel(), odds_TC.ravel(), minlength=self.shape.experts)
        return np.asarray(np.exp(np.minimum(0, sum_E + rows * calm_E)))
