"""Which experts to read before they are asked for.

A read that begins when the link has nothing else to do, and that is right, saves the time until its layer routes, at
most its own length. A wrong one keeps what is then asked for waiting for the rest of its length, and takes the slot of
an expert that was worth keeping. So the probability that makes a prefetch pay follows from two measured times, and on a
link that is never idle none does. Whether they did pay is checked against what was used.

Shapes: E experts per layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moestro.policy.observation import Shape
from moestro.policy.predictors.base import Predictor
from moestro.policy.predictors.gate import LooksAhead

_SLOT = 0.1
"""Cost of the slot, in reads: about how likely the next visit is to use what has to leave. Measured on real routing."""

_MEMORY = 1 / 256
_TRIAL = 64
_MOST = 8


@dataclass(frozen=True, slots=True)
class Slack:
    """Seconds that reading an expert takes, and that the link is likely to be idle before the next layer routes."""

    read_s: float
    idle_s: float


@dataclass(frozen=True, slots=True)
class _Bet:
    """What a proposal gains in seconds when its expert is used, and loses when it is not."""

    gain_s: float
    loss_s: float


class Prefetcher:
    """Proposes experts of the next layer, the likeliest first."""

    def __init__(self, shape: Shape, predictor: Predictor) -> None:
        self._shape, self._predictor = shape, predictor
        self._gates = predictor if isinstance(predictor, LooksAhead) else None
        self._bets: dict[int, dict[int, _Bet]] = {}
        self._outcome = 0.0  # mean gain of late proposals, as a share of what they hoped for or risked
        self._rested = 0

    def lookahead(self, layer: int, ahead: int, ids_TC: np.ndarray) -> None:
        """See `Gate.lookahead`; for predictors that take it."""
        if self._gates is not None:
            self._gates.lookahead(layer, ahead, ids_TC)

    def target(self, layer: int) -> int:
        """The layer that prefetches are for once `layer` has routed."""
        return (layer + 1) % self._shape.layers

    def judge(self, layer: int, counts_E: np.ndarray) -> None:
        """The layer has routed: what became of what was proposed for it."""
        for expert, bet in self._bets.pop(layer, {}).items():
            won = bet.gain_s if counts_E[expert] else -bet.loss_s
            self._outcome += _MEMORY * (won / max(bet.gain_s, bet.loss_s) - self._outcome)

    def propose(self, layer: int, absent: Callable[[int], np.ndarray], slack: Slack) -> list[tuple[int, int]]:
        """(layer, expert) of experts worth reading now that `layer` has routed; `absent(layer)` is a mask [E]."""
        if slack.idle_s <= 0 or slack.read_s <= 0 or self._resting():
            return []
        target = self.target(layer)
        likely_E = np.where(absent(target), self._predictor.forecast(target, 1), 0)
        bets: dict[int, _Bet] = {}
        for place, expert in enumerate(np.argsort(-likely_E, kind="stable")[:_MOST].tolist()):
            bet = _bet(slack, place)
            if likely_E[expert] * bet.gain_s <= (1 - likely_E[expert]) * bet.loss_s:
                break
            bets[expert] = bet
        self._bets[target] = bets
        return [(target, expert) for expert in bets]

    def _resting(self) -> bool:
        """Whether prefetches have not paid of late; now and then one layer is tried all the same."""
        if self._outcome >= 0:
            return False
        self._rested = (self._rested + 1) % _TRIAL
        return self._rested != 0


def _bet(slack: Slack, place: int) -> _Bet:
    """Of a read that comes after `place` others."""
    gain_s = min(max(slack.idle_s - place * slack.read_s, 0.0), slack.read_s)
    return _Bet(gain_s, slack.read_s - gain_s + _SLOT * slack.read_s)


class SlackMeter:
    """Learns from events, told with their times, how long the link is idle before the next layer routes."""

    def __init__(self) -> None:
        self._idle_s = [0.0, 0.0]  # after layers that had nothing to read, and after those that had
        self._last: tuple[float, bool] | None = None

    def served(self, now_s: float, *, read: bool) -> None:
        """The last planes of a layer are in memory; `read` says whether any had to be read."""
        self._last = now_s, read

    def routed(self, now_s: float) -> None:
        """The next layer asks for planes."""
        if self._last is not None:
            then_s, read = self._last
            self._idle_s[read] += (now_s - then_s - self._idle_s[read]) / 32

    def slack(self, read_s: float, *, reading: bool) -> Slack:
        """For the layer that asks now; `reading` as in `served`."""
        return Slack(read_s, self._idle_s[reading])
