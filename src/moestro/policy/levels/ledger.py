"""A ledger of expected error: each token may lose so much, and loses it where that saves most reading.

What a lower level costs is the fall in the token's log-likelihood to expect of it: the layer's sensitivity, times the
expert's part of the row's squared weights, times the error of the level above the exact one's. What it saves are the
planes that would have to be read; what is in memory is free, so nothing is saved by not using it. Planes are given up
as long as their cost per byte is below a price, cheapest first, and never past the row's budget. The price is what
makes a token spend its budget evenly over layers: it rises while budgets are not used up, and falls when they end
before the last layer. Rows of a step that share an expert give a plane up together or not at all.

Shapes: T rows, K experts per row, L MoE layers, E experts, D levels, 0 among them; R rows of one expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moestro.policy.levels.base import LevelAsk, LevelTable, shares

_AIM = 0.9
"""Part of the budget that a price aims to have spent: the rest is room for tokens unlike the others."""

_LEAST_PRICE = 1e-300
"""Of rows that may lose nothing: what they need is always too dear to be given up."""

_MOST_PRICE = 8
"""In budgets for all of a token's bytes. A budget that is hard to use up would raise the price until planes that are
used again and again are not worth their reading: with this, less is read and less lost (docs/benchmarks/memory-budget).
"""

_PACE = 0.2
_REPRICE = 16


class Ledger:
    """Accounts of the rows of the step under way, and a price for each budget in use.

    Attributes:
        cost_LES: nats that a row loses without the planes of levels 1, 2, ... of an expert that is all of its layer.
        per_byte_LES: the same per byte, and what the planes above cost if that is more.
    """

    def __init__(self, table: LevelTable) -> None:
        assert table.sensitivity_L is not None
        self._table = table
        above_LED = np.maximum(table.errors_LED - table.errors_LED[:, :, -1:], 0)
        falling_LED = np.maximum.accumulate(above_LED[:, :, ::-1], axis=2)[:, :, ::-1]
        nats_LED = table.sensitivity_L[:, None, None] * falling_LED
        self.cost_LES = np.ascontiguousarray(nats_LED[:, :, :-1] - nats_LED[:, :, 1:], dtype=np.float64)
        self._bytes_LS = np.diff(table.bytes_LD, axis=1)
        # Planes are given up from the top, so none is cheaper than those above it.
        per_byte_LES = self.cost_LES / self._bytes_LS[:, None, :]
        falling_LES = np.maximum.accumulate(per_byte_LES[:, :, ::-1], axis=2)[:, :, ::-1]
        self.per_byte_LES = np.ascontiguousarray(falling_LES)
        self._token_bytes = float(table.picks * table.bytes_LD[:, -1].sum())
        self._budget_T = np.zeros(0)
        self._left_T = np.zeros(0)
        self._prices: dict[float, float] = {}
        self._refused: set[float] = set()
        self._steps = 0
        self._gains_LES: np.ndarray | None = None

    def step(self, budget_T: np.ndarray) -> None:
        if self._budget_T.any():
            self._settle(self._budget_T)
        self._budget_T, self._left_T = budget_T, budget_T.astype(np.float64)
        self._refused.clear()
        for budget in np.unique(budget_T[budget_T > 0]).tolist():
            self._prices.setdefault(budget, self._first_price(budget))

    def choose(self, ask: LevelAsk) -> np.ndarray:
        assert len(self._left_T) == len(ask.budget_T), "of another step"
        levels_TK = np.full(ask.routing.experts_TK.shape, self._table.exact)
        if ask.budget_T.any():
            self._give_up(ask, shares(ask.routing.weights_TK), levels_TK)
        return levels_TK

    def terms(self) -> tuple[float, float]:
        """Of a step of one row: the price, and what the row may still lose."""
        (left,) = self._left_T.tolist()
        return self._prices.get(float(self._budget_T[0]), 0.0), left

    def spent(self, left: float) -> None:
        """The one row of a step has lost some of what it might, so that so much is left."""
        self._left_T[:] = left

    def gains(self) -> np.ndarray | None:
        return self._gains_LES

    def _first_price(self, budget: float) -> float:
        """If half of a token's bytes had to be read, all of them at the same cost."""
        return 2 * budget / self._token_bytes

    def _give_up(self, ask: LevelAsk, share_TK: np.ndarray, levels_TK: np.ndarray) -> None:
        """Lower levels, the cheapest plane first."""
        layer = ask.routing.layer
        lacking = self._lacking(ask)
        users = _users(ask.routing.experts_TK, lacking)
        staying: set[int] = set()
        for cost, expert, number in self._offers(ask, lacking, share_TK):
            rows_R, places_R = users[expert]
            cost_R = self.cost_LES[layer, expert, number] * share_TK[rows_R, places_R]
            if expert in staying:
                continue
            # Said so that weights that are not numbers, of a broken model, give nothing up.
            if not (cost <= 1 and (cost_R <= self._left_T[rows_R]).all()):
                staying.add(expert)
                self._refused.update(ask.budget_T[rows_R].tolist())
                if len(staying) == len(lacking):
                    return
                continue
            self._left_T[rows_R] -= cost_R
            levels_TK[rows_R, places_R] = number

    def _lacking(self, ask: LevelAsk) -> np.ndarray:
        """Experts used that are not whole in memory."""
        used_E = ask.routing.counts_E > 0
        return np.flatnonzero(used_E & (ask.held_E[: len(used_E)] < self._table.exact))

    def _offers(self, ask: LevelAsk, lacking: np.ndarray, share_TK: np.ndarray) -> list[tuple[float, int, int]]:
        """(cost per byte as a part of the price, expert, level to go down to) of absent planes, the cheapest first."""
        layer, experts_TK = ask.routing.layer, ask.routing.experts_TK
        price_T = np.array([self._prices.get(budget, 0.0) for budget in ask.budget_T.tolist()])
        weights_TK = share_TK / np.maximum(price_T, _LEAST_PRICE)[:, None]
        weight_E = np.bincount(experts_TK.ravel(), weights_TK.ravel(), minlength=len(ask.held_E))
        costs_JS = weight_E[lacking, None] * self.per_byte_LES[layer, lacking]
        absent_JS = np.arange(costs_JS.shape[1]) >= ask.held_E[lacking, None]
        costs_JS, absent_JS = costs_JS[:, ::-1], absent_JS[:, ::-1]  # of equal costs the top plane's comes first
        places = np.flatnonzero(absent_JS)
        places = places[np.argsort(costs_JS.ravel()[places], kind="stable")]
        experts, numbers = lacking[places // costs_JS.shape[1]], self._table.exact - 1 - places % costs_JS.shape[1]
        return list(zip(costs_JS.ravel()[places].tolist(), experts.tolist(), numbers.tolist(), strict=True))

    def _settle(self, budget_T: np.ndarray) -> None:
        """A step has ended: move the prices by what was spent of each budget."""
        self._steps += 1
        for budget in np.unique(budget_T[budget_T > 0]).tolist():
            spent = 1 - float(self._left_T[budget_T == budget].mean()) / budget
            if spent > _AIM or budget in self._refused:
                price = self._prices[budget] * float(np.exp(_PACE * (_AIM - spent)))
                self._prices[budget] = min(price, _MOST_PRICE * budget / self._token_bytes)
        if not budget_T.all():
            self._gains_LES = None
        elif self._gains_LES is None or self._steps % _REPRICE == 0:
            self._gains_LES = self._worth(self._prices[float(budget_T.min())])

    def _worth(self, price: float) -> np.ndarray:
        """A plane that would be read is worth its reading; one that would be given up, the error that it spares."""
        spared_LES = self.cost_LES / self._table.picks / (price * self._bytes_LS[:, None, :])
        return np.minimum.accumulate(np.minimum(spared_LES, 1), axis=2)


def _users(experts_TK: np.ndarray, experts: np.ndarray) -> dict[int, tuple[Sequence[int] | np.ndarray, ...]]:
    """Rows and places of each of these experts."""
    if len(experts_TK) == 1:
        places = {expert: place for place, expert in enumerate(experts_TK[0].tolist())}
        return {expert: ([0], [places[expert]]) for expert in experts.tolist()}
    return {expert: np.nonzero(experts_TK == expert) for expert in experts.tolist()}
