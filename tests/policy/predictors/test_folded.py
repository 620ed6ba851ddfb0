"""Sums kept up to date say what the nets do when multiplied out."""

from __future__ import annotations

import numpy as np
import pytest

from moestro.policy.observation import RequestRows, Routing, Shape
from moestro.policy.predictors.history import NEIGHBOURS, OWN, WEIGHT, History, input_size
from moestro.policy.predictors.learned import Learned
from moestro.policy.predictors.net import HORIZONS, Nets

SHAPES = [Shape(1, 4, 2), Shape(2, 8, 2), Shape(7, 16, 3)]


def random_nets(shape: Shape, horizons: int, seed: int) -> Nets:
    rng = np.random.default_rng(seed)
    layers, experts, inputs, width = shape.layers, shape.experts, input_size(shape.experts), 16
    sizes = [
        (layers, inputs, width),
        (layers, width),
        (layers, width, horizons, experts),
        (layers, horizons, OWN, experts),
        (layers, horizons, experts),
    ]
    return Nets(*(rng.standard_normal(size, dtype=np.float32) for size in sizes))


def multiplied_out(nets: Nets, layer: int, own_LFE: np.ndarray) -> np.ndarray:
    """[H, E] by the definition of the nets."""
    layers = len(own_LFE)
    neighbours = [own_LFE[(layer + offset) % layers, WEIGHT] for offset in NEIGHBOURS]
    inputs_D = np.concatenate([own_LFE[layer].ravel(), *neighbours])
    inner_W = np.maximum(inputs_D @ nets.inner_LDW[layer] + nets.inner_bias_LW[layer], 0)
    logits_HE = np.tensordot(inner_W, nets.outer_LWHE[layer], 1) + nets.bias_LHE[layer]
    logits_HE += (own_LFE[layer] * nets.own_LHFE[layer]).sum(1)
    return np.asarray(1 / (1 + np.exp(-logits_HE.astype(np.float64))))


def chunk(shape: Shape, rng: np.random.Generator, requests: list[RequestRows]) -> list[Routing]:
    """A pass over these requests' rows."""
    rows = requests[-1].last
    made = []
    for layer in range(shape.layers):
        ids_TK = rng.random((rows, shape.experts)).argsort(1)[:, : shape.picks]
        weights_TK = rng.dirichlet(np.ones(shape.picks), rows).astype(np.float32)
        made.append(Routing.of(layer, ids_TK, weights_TK, requests, experts=shape.experts))
    return made


def follow(histories: dict[int, History], one: Routing) -> None:
    for rows in one.requests:
        if rows.last > rows.first:
            span = slice(rows.first, rows.last)
            histories[rows.request].steps(one.layer, one.experts_TK[span], one.weights_TK[span])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("asked_late", [False, True])
def test_as_the_nets_multiplied_out(shape: Shape, asked_late: bool) -> None:
    """A prompt, decoded rows, one pass without rows, and a second request that goes on from the first."""
    rng = np.random.default_rng(0)
    after, ahead = random_nets(shape, len(HORIZONS), 1), random_nets(shape, 1, 2)
    learned, histories = Learned(shape, after=after, ahead=ahead), {1: History(shape)}
    learned.begin(1)
    alone = [RequestRows(1, 0, 1, decode=True)]
    both = [RequestRows(1, 0, 1, decode=True), RequestRows(2, 1, 2, decode=True)]
    passes = [[RequestRows(1, 0, 5, decode=False)], *[alone] * 40, [RequestRows(1, 0, 0, decode=False)], *[both] * 3]
    for number, requests in enumerate(passes):
        if requests is both and 2 not in histories:
            learned.end(1)
            learned.begin(2)
            learned.begin(1)
            histories[2] = History(shape)
            histories[2].copy_from(histories[1])
        for one in chunk(shape, rng, requests):
            learned.observe(one)
            follow(histories, one)
            if asked_late and number < 30:
                continue
            for layer, nets, said in (
                (one.layer, after, learned.outlook(one.layer)),
                ((one.layer + 1) % shape.layers, ahead, learned.forecast((one.layer + 1) % shape.layers)[None]),
            ):
                unused_HE = np.prod([1 - multiplied_out(nets, layer, each.own_LFE) for each in histories.values()], 0)
                np.testing.assert_allclose(said, 1 - unused_HE, atol=2e-5)
