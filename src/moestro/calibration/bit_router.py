"""Trains a store's bit router: a divergence from the exact model, and the price of bits, are made least together.

The loss of a batch is KL(exact || chosen) + price x bytes, per token, the bytes in units of one exact expert, where
each (token, expert) takes one level, drawn by Gumbel-softmax with a straight-through gradient. The price is drawn anew
for each batch, evenly in its logarithm over the range of the qualities: so one net serves all of them. Where a batch's
levels are drawn, a level's capacity is the most (token, expert) pairs of a layer that may have it: the surplus, those
that want it least, take what they want next (D2MoE, arXiv 2504.15299: .3, .4 and .3 of the tokens at 2, 3 and 4 bits).

The net starts as what packing has measured: the layer's sensitivity times the expert's error at the level. What a
quality's price is is found on text that the training has not seen.

Shapes: B sequences, N tokens of each, T rows of all, H hidden, K experts per row, E experts, D levels, S = D - 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from moestro.bit_router import BitRouter
from moestro.calibration.levels_model import LevelsModel
from moestro.errors import PackError
from moestro.policy.levels import EXACT, QUALITIES, LevelTable

_PRICES = (0.1, 40.0)
"""The range of prices in training, in units of the budgets of the least and the most that a quality may lose, spread
evenly over the experts of a token."""

_GRID = 12
_WARM = 0.1


@dataclass(frozen=True, kw_only=True)
class BitRouterTraining:
    """Measured on the built-in model; `capacity` is published, see `docs/benchmarks/levels.md` for what it does."""

    steps: int = 160
    sequences: int = 2
    tokens: int = 256
    width: int = 8
    rate: float = 2e-2
    temperature: float = 0.1
    capacity: bool = True
    held_out: int = 8
    seed: int = 0


def train_bit_router(
    model: LevelsModel,
    table: LevelTable,
    windows: Sequence[Sequence[int]],
    training: BitRouterTraining | None = None,
    *,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> BitRouter:
    """The router of `model`, whose levels cost what `table` says, from `windows` of token ids.

    Raises:
        PackError: the text is too short to train on.
    """
    training = training or BitRouterTraining()
    pieces_PN = cut_pieces(windows, training)
    held = max(1, min(training.held_out, len(pieces_PN) // 4))
    trained_PN, held_PN = pieces_PN[:-held], pieces_PN[-held:]
    nets = _Nets(model, table, training)
    generator = torch.Generator().manual_seed(training.seed)
    weights = nets.weights
    optimizer = torch.optim.AdamW(weights, lr=training.rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, training.rate, total_steps=training.steps, pct_start=_WARM
    )
    lowest, highest = (math.log(one) for one in price_range(model, table))
    for step in range(training.steps):
        progress(step, training.steps)
        ids_BN = trained_PN[torch.randint(len(trained_PN), (training.sequences,), generator=generator)]
        price = math.exp(lowest + (highest - lowest) * float(torch.rand((), generator=generator)))
        loss = _loss(model, nets, ids_BN, price, generator)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    prices = find_prices(model, nets, table, held_PN)
    progress(training.steps, training.steps)
    return nets.router(prices)


def cut_pieces(windows: Sequence[Sequence[int]], training: BitRouterTraining) -> torch.Tensor:
    """[P, N] pieces of equal length, shorter than asked for where the text is. Raises PackError."""
    size = min(training.tokens, max(map(len, windows)))
    pieces = [window[start : start + size] for window in windows for start in range(0, len(window) - size + 1, size)]
    if len(pieces) < 2:
        raise PackError(
            f"The calibration text has {len(pieces)} piece(s) of {size} tokens, too few to train a bit router on. Give "
            "a longer one with --calibrate, or leave --bit-router out."
        )
    return torch.tensor(pieces)


def price_range(model: LevelsModel, table: LevelTable) -> tuple[float, float]:
    """Nats for an expert's bytes: from less to more than any quality should need."""
    budgets = [budget for name, budget in QUALITIES.items() if name != EXACT]
    uses = model.layers * table.picks
    return _PRICES[0] * min(budgets) / uses, _PRICES[1] * max(budgets) / uses


def capacities(levels: int) -> tuple[float, ...]:
    """Of each of D levels, the part of a layer's (token, expert) pairs that may take it in training.

    Published for three levels of bits: .3, .4, .3. Where there are more, those between share the .4; where there are
    two, each may have .6. Leaving out, which D2MoE does not have, may have .3.
    """
    assert levels >= 3, "there is nothing to choose"
    if levels == 3:
        return (0.3, 0.6, 0.6)
    between = levels - 3
    return (0.3, 0.3, *[0.4 / between] * between, 0.3)


class _Nets:
    """All layers' nets, in training."""

    def __init__(self, model: LevelsModel, table: LevelTable, training: BitRouterTraining) -> None:
        generator = torch.Generator().manual_seed(training.seed + 1)
        self._levels, self.temperature = model.levels, training.temperature
        self._experts, self.picks = model.experts, table.picks
        self.capacities = capacities(len(model.levels) + 1) if training.capacity else None
        shape = (model.layers, training.width, model.hidden_size)
        self.inner_LRH = torch.randn(shape, generator=generator) / math.sqrt(model.hidden_size)
        self.inner_bias_LR = torch.zeros(shape[:2])
        self.outer_LOR = torch.zeros(model.layers, model.experts * len(model.levels), training.width)
        self.outer_bias_LO = _measured(table)
        self.parts_LD = torch.from_numpy(table.bytes_LD / table.bytes_LD[:, -1].mean()).float()
        self._scaled: set[int] = set()
        for one in self.weights:
            one.requires_grad_(True)

    @property
    def weights(self) -> list[torch.Tensor]:
        return [self.inner_LRH, self.inner_bias_LR, self.outer_LOR, self.outer_bias_LO]

    def costs(
        self, layer: int, hidden_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor, price: float
    ) -> torch.Tensor:
        """[T, K, D]: what each level costs, its bytes included, in units of the price."""
        if layer not in self._scaled:
            # Hidden states of a family have a scale of their own: the inner products start with one of 1.
            self._scaled.add(layer)
            with torch.no_grad():
                self.inner_LRH[layer] /= hidden_TH.square().mean().sqrt().clamp_min(1e-6)
        inner_TR = functional.relu(functional.linear(hidden_TH, self.inner_LRH[layer], self.inner_bias_LR[layer]))
        scores_TO = functional.linear(inner_TR, self.outer_LOR[layer], self.outer_bias_LO[layer])
        scores_TES = scores_TO.view(len(hidden_TH), self._experts, len(self._levels))
        places_TKS = index_TK.unsqueeze(-1).expand(*index_TK.shape, len(self._levels))
        scores_TKS = scores_TES.gather(1, places_TKS)
        squares_TK = weights_TK.square()
        shares_TK = squares_TK / squares_TK.sum(-1, keepdim=True).clamp_min(1e-30)
        # Beyond this a level is out of the question, and more would only make numbers too large.
        nats_TKS = (scores_TKS + shares_TK.clamp_min(1e-30).log().unsqueeze(-1) - math.log(price)).clamp_max(5.0).exp()
        return functional.pad(nats_TKS, (0, 1)) + self.parts_LD[layer]

    def router(self, prices: dict[str, float]) -> BitRouter:
        arrays = [np.ascontiguousarray(one.detach().numpy()) for one in self.weights]
        return BitRouter(arrays[0], arrays[1], arrays[2], arrays[3], self._levels, prices)


def _measured(table: LevelTable) -> torch.Tensor:
    """[L, E x S]: the logarithm of what packing has measured that a level costs beyond the exact one."""
    assert table.sensitivity_L is not None
    above_LES = table.errors_LED[:, :, :-1] - table.errors_LED[:, :, -1:]
    nats_LES = np.maximum(table.sensitivity_L, 1e-6)[:, None, None] * np.maximum(above_LES, 1e-4)
    return torch.from_numpy(np.log(nats_LES).astype(np.float32)).flatten(1)


def _loss(
    model: LevelsModel, nets: _Nets, ids_BN: torch.Tensor, price: float, generator: torch.Generator
) -> torch.Tensor:
    """Of one batch, in units of the price, so that every batch has a say."""
    with torch.no_grad():
        wanted_TV = model.log_probs(ids_BN, None)
    spent: list[torch.Tensor] = []

    def choose(layer: int, hidden_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        cost_TKD = nets.costs(layer, hidden_TH.detach(), index_TK, weights_TK.detach(), price)
        noise_TKD = -torch.empty_like(cost_TKD).exponential_(generator=generator).log()
        wish_TKD = noise_TKD - cost_TKD / nets.temperature
        soft_TKD = wish_TKD.softmax(-1)
        hard_TKD = functional.one_hot(_drawn(wish_TKD.detach(), nets.capacities), cost_TKD.shape[-1])
        gates_TKD = hard_TKD + soft_TKD - soft_TKD.detach()
        spent.append((gates_TKD * nets.parts_LD[layer]).sum() / len(hidden_TH))
        return gates_TKD

    found_TV = model.log_probs(ids_BN, choose)
    nats = functional.kl_div(found_TV, wanted_TV, log_target=True, reduction="sum") / len(wanted_TV)
    return nats / price + torch.stack(spent).sum()


def _drawn(wish_TKD: torch.Tensor, limits: Sequence[float] | None) -> torch.Tensor:
    """[T, K]: the level of each pair: the one that it wishes most, as far as capacities allow."""
    if limits is None:
        return wish_TKD.argmax(-1)
    wish_PD = wish_TKD.flatten(0, 1).clone()
    pairs, levels = wish_PD.shape
    room = [math.ceil(limit * pairs) for limit in limits]
    for _ in range(levels):
        level_P = wish_PD.argmax(-1)
        surplus = False
        for level in range(levels):
            taken_P = (level_P == level).nonzero().squeeze(1)
            if len(taken_P) > room[level]:
                surplus = True
                order_P = wish_PD[taken_P, level].argsort(descending=True)
                wish_PD[taken_P[order_P[room[level] :]], level] = -math.inf
        if not surplus:
            break
    return wish_PD.argmax(-1).view(wish_TKD.shape[:2])


def find_prices(model: LevelsModel, nets: _Nets, table: LevelTable, held_PN: torch.Tensor) -> dict[str, float]:
    """For each quality the price at which text of `held_PN` loses, on the average, what the quality says."""
    lowest, highest = price_range(model, table)
    prices = np.geomspace(lowest, highest, _GRID)
    with torch.no_grad():
        wanted_TV = model.log_probs(held_PN, None)
        losses = [_lost(model, nets, held_PN, wanted_TV, float(price)) for price in prices]
    rising = np.maximum.accumulate(np.maximum(losses, 1e-9))
    return {
        name: float(np.exp(np.interp(math.log(budget), np.log(rising), np.log(prices))))
        for name, budget in QUALITIES.items()
        if name != EXACT
    }


def _lost(model: LevelsModel, nets: _Nets, held_PN: torch.Tensor, wanted_TV: torch.Tensor, price: float) -> float:
    def choose(layer: int, hidden_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        cost_TKD = nets.costs(layer, hidden_TH, index_TK, weights_TK, price)
        return functional.one_hot(cost_TKD.argmin(-1), cost_TKD.shape[-1]).float()

    found_TV = model.log_probs(held_PN, choose)
    return max(0.0, float(functional.kl_div(found_TV, wanted_TV, log_target=True, reduction="sum") / len(wanted_TV)))
