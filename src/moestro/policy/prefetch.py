"""Which experts to read before they are asked for.

A read that begins when the link has nothing else to do, and that is right, saves the time until its layer routes, at
most its own length. A wrong one keeps what is then asked for waiting for the rest of its length, or of that piece of it
that cannot be interrupted, takes the slot of an expert that was worth keeping, and has cost the work of asking. So the
probability that makes a prefetch pay follows from measured times, and on a link that is never idle none does. Whether
they did pay is checked against what was used.

Shapes: E experts per layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moestro.policy.observation import Shape
from moestro.policy.predictors.base import Predictor
from moestro.policy.predictors.gate import LooksAhead, NamesFew

_SLOT = 0.1
"""Cost of the slot, in reads: about how likely the next visit is to use what has to leave. Measured on real routing."""

_MEMORY = 1 / 256
_DOUBT = -6 * _MEMORY
"""The mean at which bets are taken to lose: a few lost at first say nothing yet."""
_TRIAL = 64
_STRAIN_MEMORY, _FORGET = 1 / 64, 1 << 14
_MOST = 8


@dataclass(frozen=True, slots=True)
class Slack:
    """Seconds that reading an expert takes, and that the link is likely to be idle before the next layer routes;
    `piece_s`: what of a read that has begun goes on at most when something else is asked for; `work_s`: what asking for
    it takes."""

    read_s: float
    idle_s: float
    piece_s: float = math.inf
    work_s: float = 0.0


class _Bet(NamedTuple):
    """What a proposal gains in seconds when its expert is used, and loses when it is not."""

    gain_s: float
    loss_s: float


class Prefetcher:
    """Proposes experts of the next layer, the likeliest first."""

    def __init__(self, shape: Shape, predictor: Predictor) -> None:
        self._shape, self._predictor = shape, predictor
        self._gates = predictor if isinstance(predictor, LooksAhead) else None
        self._names = predictor if isinstance(predictor, NamesFew) else None
        self._bets: dict[int, dict[int, _Bet]] = {}
        self._least = 0.0  # the probability from which on the last ones asked for might have paid
        self._outcome = 0.0  # mean gain of late proposals, as a share of what they hoped for or risked
        self._rested = 0

    def lookahead(self, layer: int, ahead: int, ids_TC: np.ndarray) -> None:
        """See `Gate.lookahead`; for predictors that take it."""
        if self._gates is not None:
            self._gates.lookahead(layer, ahead, ids_TC)

    def telling(self, ranks: int) -> int:
        """Up to which of a gate's first `ranks`, one at least, experts would have been worth reading of late: where
        only later ones are absent, one row's next layer need not be looked at."""
        return ranks if self._names is None else max(1, self._names.likelier(self._least, ranks))

    @property
    def by_rank(self) -> bool:
        """Whether it goes by what gates name first."""
        return self._names is not None

    def places(self, ranks: int, slacks: Sequence[Slack]) -> list[list[int]]:
        """For whoever reads ahead without asking for each: by slack, and for an absent expert at each of a gate's first
        `ranks`, after how many others it is not worth reading any more."""
        if self._names is None or self._resting():
            return [[0] * ranks for _ in slacks]
        rates = self._names.rates(ranks)
        return [_places(slack, rates) for slack in slacks]

    def made(self, layer: int, absent_E: np.ndarray, experts: Sequence[int], slack: Slack) -> None:
        """`layer` has routed, and of the next one's, which are absent as said, `experts` were asked for by `places`."""
        target = self.target(layer)
        if self._names is not None:
            self._names.named(target, absent_E)
        self._bets[target] = {expert: _bet(slack, place) for place, expert in enumerate(experts)}

    def target(self, layer: int) -> int:
        """The layer that prefetches are for once `layer` has routed."""
        return (layer + 1) % self._shape.layers

    def judge(self, layer: int, counts_E: np.ndarray) -> None:
        """The layer has routed: what became of what was proposed for it."""
        for expert, bet in self._bets.pop(layer, {}).items():
            won = bet.gain_s if counts_E[expert] else -bet.loss_s
            self._outcome += _MEMORY * (won / max(bet.gain_s, bet.loss_s) - self._outcome)

    def propose(self, layer: int, absent_E: np.ndarray, slack: Slack) -> list[tuple[int, int]]:
        """(layer, expert) of experts worth reading now that `layer` has routed; `absent_E`: bool, of the target's."""
        if slack.idle_s <= 0 or slack.read_s <= 0 or self._resting():
            return []
        target = self.target(layer)
        bets: dict[int, _Bet] = {}
        # A later place asks for more certainty, so nobody else pays.
        first = _bet(slack, 0)
        least = self._least = first.loss_s / (first.gain_s + first.loss_s)
        for place, (expert, likely) in enumerate(self._likeliest(target, absent_E, least)):
            bet = _bet(slack, place) if place else first
            if likely * bet.gain_s <= (1 - likely) * bet.loss_s:
                break
            bets[expert] = bet
        self._bets[target] = bets
        return [(target, expert) for expert in bets]

    def _likeliest(self, layer: int, absent_E: np.ndarray, least: float) -> list[tuple[int, float]]:
        """(expert, probability) of a few absent ones that are likelier than `least`, falling."""
        named = None if self._names is None else self._names.named(layer, absent_E)
        if named is not None:
            return sorted([one for one in named if one[1] > least], key=lambda one: -one[1])[:_MOST]
        likely_E = self._predictor.forecast(layer, 1) * absent_E
        paying_J = np.flatnonzero(likely_E > least)
        likely_J = likely_E[paying_J]
        order_J = (-likely_J).argsort(kind="stable")[:_MOST]
        return list(zip(paying_J[order_J].tolist(), likely_J[order_J].tolist(), strict=True))

    def _resting(self) -> bool:
        """Whether prefetches have not paid of late; now and then one layer is tried all the same."""
        if self._outcome >= _DOUBT:
            return False
        self._rested = (self._rested + 1) % _TRIAL
        return self._rested != 0


def _bet(slack: Slack, place: int) -> _Bet:
    """Of a read that comes after `place` others."""
    saved_s = min(max(slack.idle_s - place * slack.read_s, 0.0), slack.read_s)
    lost_s = min(slack.read_s - saved_s, slack.piece_s) + _SLOT * slack.read_s
    return _Bet(saved_s - slack.work_s, lost_s + slack.work_s)


def _places(slack: Slack, rates: Sequence[float]) -> list[int]:
    if slack.idle_s <= 0 or slack.read_s <= 0:
        return [0] * len(rates)
    bets = [_bet(slack, place) for place in range(_MOST)]
    return [sum(rate * bet.gain_s > (1 - rate) * bet.loss_s for bet in bets) for rate in rates]


class Strain:
    """What reads take from the computation beside them, in parts of their time: by how much longer layers take."""

    def __init__(self, guess: float) -> None:
        """`guess`: before anything is known, and after long without a read."""
        self._guess = self.part = guess
        self._alone_s = 0.0

    def layer(self, seconds: float, reading_s: float) -> None:
        """A layer that waited for nothing took so long, with reads of so long beside it."""
        if reading_s <= 0:
            self._alone_s += (seconds - self._alone_s) * (_STRAIN_MEMORY if self._alone_s else 1.0)
            self.part += (self._guess - self.part) / _FORGET
        elif self._alone_s:
            part = min(max((seconds - self._alone_s) / reading_s, -1.0), 2.0)
            self.part += (part - self.part) * _STRAIN_MEMORY


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

    def passed(self) -> None:
        """A layer of which nothing was measured."""
        self._last = None

    def slack(self, read_s: float, *, reading: bool, piece_s: float = math.inf, work_s: float = 0.0) -> Slack:
        """For the layer that asks now; `reading` as in `served`."""
        return Slack(read_s, self._idle_s[reading], piece_s, work_s)
