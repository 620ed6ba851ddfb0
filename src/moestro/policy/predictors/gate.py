"""The gates of layers to come, asked early: what they would choose if the hidden state stayed as it is now.

Source: Eliseev and Mazur, "Fast Inference of Mixture-of-Experts Language Models with Offloading", arXiv 2312.17238
(the next layer's gate), and HOBBIT, arXiv 2411.01433 (several layers ahead). The runtime computes the gates.
Shapes: T rows of the step, C candidates per row (twice what a row uses), E experts per layer, A layers ahead.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from moestro.policy.observation import Routing, Shape
from moestro.policy.predictors.flight import within
from moestro.policy.predictors.popularity import Popularity

# Visits that a rank's precision is taken to have had before any was seen.
_PRIOR, _ABSENT_PRIOR = 16.0, 4.0
_FORGET_AT = 4096.0
_SUREST = 1 - 1e-6


@runtime_checkable
class NamesFew(Protocol):
    """A predictor that can name the few absent experts that a layer will most likely use, without a forecast of all."""

    def named(self, layer: int, absent_E: np.ndarray, /) -> list[tuple[int, float]] | None:
        """(expert, probability that the next visit uses it) of some that are absent; None where all have to be asked
        for by `forecast`."""
        ...

    def rates(self, ranks: int, /) -> list[float]:
        """How often absent experts are used, by each of a gate's first `ranks` for one row."""
        ...

    def likelier(self, least: float, ranks: int, /) -> int:
        """Up to which of a gate's first `ranks` for one row absent experts are used more often than that; 0: none."""
        ...


@runtime_checkable
class LooksAhead(Protocol):
    """A predictor that is told what the gates of later layers say; so are those that pass it on to such ones."""

    def lookahead(self, layer: int, ahead: int, ids_TC: np.ndarray, scores_TC: np.ndarray | None = None, /) -> None:
        """See `Gate.lookahead`."""
        ...


class _Asked(NamedTuple):
    """What gates said of the layer's next visit; `rows` is the same as lists."""

    ahead: int
    ids_TC: np.ndarray
    rows: list[list[int]]


class _AbsentRanks:
    """How often absent experts were used, by the rank that the next layer's gate gave them.

    Less often than those in memory: what a cache has dropped had not been used for long. Of all layers together, as
    there are few of them.
    """

    def __init__(self, start_C: np.ndarray) -> None:
        self._used: list[float] = (_ABSENT_PRIOR * start_C).tolist()
        self._seen = [_ABSENT_PRIOR] * len(self._used)

    def rate(self, rank: int) -> float:
        """Probability of use."""
        rate = self._used[rank] / self._seen[rank]
        return rate if rate < _SUREST else _SUREST

    def add(self, rank_of: dict[int, int], used: set[int]) -> None:
        """These experts were among those used, or were not."""
        for expert, rank in rank_of.items():
            self._used[rank] += expert in used
            self._seen[rank] += 1
            if self._seen[rank] > _FORGET_AT:
                self._used[rank] *= 0.5
                self._seen[rank] *= 0.5


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
        self._furthest = furthest
        # By layers ahead and layer: how often each rank was right, and out of how often.
        self._right_ALC = [[(_PRIOR * start_C).tolist() for _ in range(shape.layers)] for _ in range(furthest)]
        self._rows_AL = [[_PRIOR] * shape.layers for _ in range(furthest)]
        self._asked: list[_Asked | None] = [None] * shape.layers
        self._absent_ranks = _AbsentRanks(start_C)
        self._named: list[dict[int, int]] = [{} for _ in range(shape.layers)]  # absent experts and their best ranks

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
        if target >= self.shape.layers or ahead > self._furthest:
            return
        ids_TC = ids_TC[:, : self._candidates].astype(np.int64)
        self._asked[target] = _Asked(ahead, ids_TC, ids_TC.tolist())

    def observe(self, routing: Routing, /) -> None:
        """O(T C): counts which ranks were right."""
        self._popularity.observe(routing)
        asked, self._asked[routing.layer] = self._asked[routing.layer], None
        rows = len(routing.experts_TK)
        if asked is None or rows == 0 or len(asked.ids_TC) != rows:
            return
        named, self._named[routing.layer] = self._named[routing.layer], {}
        right_C = self._right_ALC[asked.ahead - 1][routing.layer]
        if rows == 1:
            used = set(routing.experts_TK[0].tolist())
            self._absent_ranks.add(named, used)
            for rank, expert in enumerate(asked.rows[0]):
                if expert in used:
                    right_C[rank] += 1
        else:
            for rank, share in enumerate(self._right(asked, routing)):
                right_C[rank] += share
        rows_L = self._rows_AL[asked.ahead - 1]
        rows_L[routing.layer] += 1
        if rows_L[routing.layer] > _FORGET_AT:
            right_C[:] = [0.5 * right for right in right_C]
            rows_L[routing.layer] *= 0.5

    def _right(self, asked: _Asked, routing: Routing) -> list[float]:
        """[C] share of rows that use the expert of each rank."""
        used_TE = np.zeros((len(asked.ids_TC), self.shape.experts), bool)
        np.put_along_axis(used_TE, routing.experts_TK.astype(np.int64), True, axis=1)
        shares: list[float] = np.take_along_axis(used_TE, asked.ids_TC, axis=1).mean(0).tolist()
        return shares

    def named(self, layer: int, absent_E: np.ndarray, /) -> list[tuple[int, float]] | None:
        """Those that the gate named, where it was asked."""
        asked = self._asked[layer]
        if asked is None:
            return None
        rate = self._absent_ranks.rate
        if len(asked.rows) == 1:
            absent_C = absent_E[asked.ids_TC[0]].tolist()
            self._named[layer] = named = {expert: rank for rank, expert in enumerate(asked.rows[0]) if absent_C[rank]}
            return [(expert, rate(rank)) for expert, rank in named.items()]
        self._named[layer] = {}
        absent, spared = absent_E.tolist(), dict[int, float]()
        for ids in asked.rows:
            for rank, expert in enumerate(ids):
                if absent[expert]:
                    spared[expert] = spared.get(expert, 1.0) * (1 - rate(rank))
        return [(expert, 1 - chance) for expert, chance in spared.items()]

    def rates(self, ranks: int, /) -> list[float]:
        """Beyond the candidates none is named."""
        return [self._absent_ranks.rate(rank) if rank < self._candidates else 0.0 for rank in range(ranks)]

    def likelier(self, least: float, ranks: int, /) -> int:
        """Those before the last such rank may by chance be below."""
        return max((rank + 1 for rank, rate in enumerate(self.rates(ranks)) if rate > least), default=0)

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
        right_C = np.array(self._right_ALC[asked.ahead - 1][layer][:named])
        right_C = np.clip(right_C / self._rows_AL[asked.ahead - 1][layer], 0, _SUREST)
        # What the named ones leave of a row's picks goes to the others, by popularity.
        popular_E = self._popularity.rates(layer)
        others = max(1e-9, self.shape.picks - float(popular_E[asked.ids_TC].sum(1).mean())) if rows else 1.0
        left = max(0.0, self.shape.picks - float(right_C.sum()))
        stray_E = np.clip(popular_E * (left / others), 0, 0.5)
        calm_E = np.log1p(-stray_E)
        odds_TC = np.log1p(-right_C) - calm_E[asked.ids_TC]
        sum_E = np.bincount(asked.ids_TC.ravel(), odds_TC.ravel(), minlength=self.shape.experts)
        return np.asarray(np.exp(np.minimum(0, sum_E + rows * calm_E)))
