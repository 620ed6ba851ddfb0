"""Makes probabilities of scores: of experts forecast with .3, three in ten shall be used.

Shapes: B bins, N forecasts of an expert each, E experts per layer, H horizons.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moestro.policy.observation import Routing, Shape
from moestro.policy.predictors.base import Predictor
from moestro.policy.predictors.flight import within, within_each
from moestro.policy.predictors.gate import LooksAhead
from moestro.policy.predictors.rehearsal import RANGES, Rehearsal
from moestro.policy.predictors.successors import log_odds

_BINS = 32
_WIDEST = 8.0
# Outcomes that a bin is taken to have had as forecast, before any was seen.
_PRIOR = 10.0
_FORGET_AT = 100_000.0
_FIT_EVERY = 64
# So many experts of a visit are compared with what was forecast.
_MOST_EXPERTS = 256


@dataclass(frozen=True, slots=True)
class Reliability:
    """How forecasts came true, per bin: mean forecast, share used, how many (older ones count less)."""

    forecast_B: np.ndarray
    used_B: np.ndarray
    count_B: np.ndarray

    @property
    def error(self) -> float:
        """Expected calibration error: mean distance of forecast and share used, over all forecasts."""
        total = float(self.count_B.sum())
        return float((np.abs(self.forecast_B - self.used_B) * self.count_B).sum() / total) if total else 0.0


class MonotoneMap:
    """Isotonic regression over bins of the log-odds (Zadrozny and Elkan, KDD 2002), learnt online, linear in between.

    Every bin starts as if its forecasts had been right, so that with nothing seen the map is nearly the identity.
    """

    def __init__(self) -> None:
        edges = np.linspace(-_WIDEST, _WIDEST, _BINS + 1)
        self._centre_B = (edges[1:] + edges[:-1]) / 2
        start_B = 1 / (1 + np.exp(-self._centre_B))
        self._count_B = np.zeros(_BINS)
        self._forecast_B = np.zeros(_BINS)
        self._used_B = np.zeros(_BINS)
        self._start_B = start_B
        self._odds_B, self._mapped_B = self._centre_B, start_B
        self._said: list[np.ndarray] = []
        self._came: list[np.ndarray] = []

    def add(self, chance_E: np.ndarray, used_E: np.ndarray) -> None:
        """What was forecast and what came; neither is copied. Counts from the next 64th call on."""
        self._said.append(chance_E)
        self._came.append(used_E)
        if len(self._said) >= _FIT_EVERY:
            self._count(np.concatenate(self._said), np.concatenate(self._came))
            self._said.clear()
            self._came.clear()
            self._fit()

    def __call__(self, chance_E: np.ndarray) -> np.ndarray:
        """The calibrated probabilities; never falls where `chance_E` rises."""
        return np.asarray(np.interp(log_odds(chance_E), self._odds_B, self._mapped_B))

    def reliability(self) -> Reliability:
        """Of the scores as they came in."""
        count_B = np.maximum(self._count_B, 1)
        return Reliability(self._forecast_B / count_B, self._used_B / count_B, self._count_B.copy())

    def _count(self, chance_N: np.ndarray, used_N: np.ndarray) -> None:
        odds_N = log_odds(chance_N)
        bin_N = np.clip(((odds_N + _WIDEST) * (_BINS / (2 * _WIDEST))).astype(np.int64), 0, _BINS - 1)
        self._count_B += np.bincount(bin_N, minlength=_BINS)
        self._forecast_B += np.bincount(bin_N, chance_N, minlength=_BINS)
        self._used_B += np.bincount(bin_N, used_N, minlength=_BINS)
        if self._count_B.max() > _FORGET_AT:
            self._count_B *= 0.5
            self._forecast_B *= 0.5
            self._used_B *= 0.5

    def _fit(self) -> None:
        weight_B = self._count_B + _PRIOR
        mean_B = (self._used_B + _PRIOR * self._start_B) / weight_B
        forecast_B = (self._forecast_B + _PRIOR * self._start_B) / weight_B
        self._odds_B = log_odds(forecast_B)
        self._mapped_B = isotonic(mean_B, weight_B)


def isotonic(mean_B: np.ndarray, weight_B: np.ndarray) -> np.ndarray:
    """The rising sequence nearest to `mean_B` in weighted least squares (pool adjacent violators)."""
    blocks: list[tuple[float, float, int]] = []
    for mean, weight in zip(mean_B.tolist(), weight_B.tolist(), strict=True):
        size = 1
        while blocks and blocks[-1][0] > mean:
            other, other_weight, other_size = blocks.pop()
            mean = (mean * weight + other * other_weight) / (weight + other_weight)
            weight, size = weight + other_weight, size + other_size
        blocks.append((mean, weight, size))
    return np.repeat([block[0] for block in blocks], [block[2] for block in blocks])


class Calibrated:
    """A predictor whose forecasts go through a monotone map per range of how far ahead they look.

    The order of experts is the predictor's own (the map makes some equal); only the figures change.
    """

    def __init__(self, shape: Shape, inner: Predictor) -> None:
        self.inner = inner
        self._parts, self._turn = -(-shape.experts // _MOST_EXPERTS), 0
        self._rehearsal = Rehearsal(shape)
        self._maps = [MonotoneMap() for _ in range(RANGES)]

    def begin(self, request: int, /) -> None:
        """Told on."""
        self.inner.begin(request)

    def end(self, request: int, /) -> None:
        """Told on."""
        self.inner.end(request)

    def observe(self, routing: Routing, /) -> None:
        """One forecast of the predictor more than by itself, and now and then two."""
        layer = routing.layer
        due = self._rehearsal.due(layer)
        if all(rows.decode for rows in routing.requests):
            used_E = routing.counts_E > 0
            if self._rehearsal.check_next():
                due[self._rehearsal.range_of(layer)] = np.array(self.inner.forecast(layer))
            # Of very many experts each visit teaches by others.
            self._turn = (self._turn + 1) % self._parts
            part = slice(self._turn, None, self._parts)
            for reach, chance_E in due.items():
                self._maps[reach].add(chance_E[part], used_E[part])
        for other, reach in self._rehearsal.wanted():
            self._rehearsal.keep(other, reach, np.array(self.inner.forecast(other)))
        self._rehearsal.step(layer)
        self.inner.observe(routing)

    def lookahead(self, layer: int, ahead: int, ids_TC: np.ndarray, scores_TC: np.ndarray | None = None, /) -> None:
        """Told on to a predictor that takes gates (`LooksAhead`)."""
        if isinstance(self.inner, LooksAhead):
            self.inner.lookahead(layer, ahead, ids_TC, scores_TC)

    def forecast(self, layer: int, horizon: int = 1, /) -> np.ndarray:
        """[E] float32."""
        return within(self._chance(layer), horizon)

    def outlook(self, layer: int, /) -> np.ndarray:
        """[H, E] float32: `forecast` for each of `HORIZONS`."""
        return within_each(self._chance(layer))

    def _chance(self, layer: int) -> np.ndarray:
        """[E] of use in the next visit."""
        mapped = self._maps[self._rehearsal.range_of(layer)]
        return mapped(self.inner.forecast(layer))

    def reliability(self) -> list[Reliability]:
        """Of the raw forecasts: of the next layer, of a few layers ahead, of farther ones."""
        return [each.reliability() for each in self._maps]
