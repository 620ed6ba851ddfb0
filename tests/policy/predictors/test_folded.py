"""Sums kept up to date say what the nets do when multiplied out."""

from __future__ import annotations

import numpy as np
import pytest

from moestro import _native
from moestro.policy.observation import RequestRows, Routing, Shape
from moestro.policy.predictors.folded import FoldedNets, state_bytes
from moestro.policy.predictors.history import NEIGHBOURS, OWN, WEIGHT, dense_rows, histories, input_size
from moestro.policy.predictors.learned import Learned
from moestro.policy.predictors.net import HORIZONS, Nets

SHAPES = [Shape(1, 4, 2), Shape(2, 8, 2), Shape(7, 16, 3), Shape(3, 40, 4)]


def random_nets(shape: Shape, horizons: int, seed: int, width: int = 16) -> Nets:
    rng = np.random.default_rng(seed)
    layers, experts, inputs = shape.layers, shape.experts, input_size(shape.experts)
    sizes = [
        (layers, inputs, width),
        (layers, width),
        (layers, width, horizons, experts),
        (layers, horizons, OWN, experts),
        (layers, horizons, experts),
    ]
    # Few digits, so that float16, in which they are kept, has them exactly.
    return Nets(*(np.round(8 * rng.standard_normal(size, dtype=np.float32)) / 8 for size in sizes))


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


def follow(own_of: dict[int, np.ndarray], one: Routing) -> None:
    for rows in one.requests:
        if rows.last > rows.first:
            span, own_FE = slice(rows.first, rows.last), own_of[rows.request][one.layer]
            uses_NE, weights_NE = dense_rows(one.experts_TK[span], one.weights_TK[span], own_FE.shape[1])
            own_FE[:] = histories(uses_NE, weights_NE, own_FE)[-1]


def nothing(shape: Shape) -> np.ndarray:
    return np.zeros((shape.layers, OWN, shape.experts), np.float32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("asked_late", [False, True])
def test_as_the_nets_multiplied_out(shape: Shape, asked_late: bool) -> None:
    """A prompt, decoded rows, one pass without rows, and a second request that goes on from the first."""
    rng = np.random.default_rng(0)
    after, ahead = random_nets(shape, len(HORIZONS), 1), random_nets(shape, 1, 2, width=21)
    learned, own_of = Learned(shape, after=after, ahead=ahead), {1: nothing(shape)}
    learned.begin(1)
    alone = [RequestRows(1, 0, 1, decode=True)]
    both = [RequestRows(1, 0, 1, decode=True), RequestRows(2, 1, 2, decode=True)]
    passes = [[RequestRows(1, 0, 5, decode=False)], *[alone] * 40, [RequestRows(1, 0, 0, decode=False)], *[both] * 3]
    for number, requests in enumerate(passes):
        if requests is both and 2 not in own_of:
            learned.end(1)
            learned.begin(2)
            learned.begin(1)
            own_of[2] = own_of[1].copy()
        for one in chunk(shape, rng, requests):
            learned.observe(one)
            follow(own_of, one)
            if asked_late and number < 30:
                continue
            for layer, nets, said in (
                (one.layer, after, learned.outlook(one.layer)),
                ((one.layer + 1) % shape.layers, ahead, learned.forecast((one.layer + 1) % shape.layers)[None]),
            ):
                unused_HE = np.prod([1 - multiplied_out(nets, layer, each) for each in own_of.values()], 0)
                np.testing.assert_allclose(said, 1 - unused_HE, atol=2e-5)


def test_weights_that_half_precision_does_not_have_become_its_nearest() -> None:
    shape = Shape(2, 32, 2)
    nets = random_nets(shape, 1, 1)
    (learned, like, off) = (
        Learned(shape, after=random_nets(shape, len(HORIZONS), 2), ahead=Nets(**arrays))
        for arrays in (
            nets.arrays(),
            nets.arrays() | {"outer_LWHE": nets.outer_LWHE * np.float32(1.0001)},
            nets.arrays() | {"outer_LWHE": np.where(nets.outer_LWHE > 2, np.float32(1e30), nets.outer_LWHE)},
        )
    )
    rows = chunk(shape, np.random.default_rng(0), [RequestRows(1, 0, 1, decode=True)])
    for one in (learned, like, off):
        one.begin(1)
        one.observe(rows[0])
    np.testing.assert_array_equal(learned.forecast(1), like.forecast(1))
    assert np.isfinite(off.forecast(1)).all()


@pytest.mark.parametrize("isa", _native.available_isas())
def test_every_machine_foresees_the_same(isa: str) -> None:
    """Same bits, whatever the instruction set, and whichever requests come first."""
    shape, rng = Shape(3, 40, 4), np.random.default_rng(0)
    nets = random_nets(shape, len(HORIZONS), 1), random_nets(shape, 1, 2, width=21)
    passes = [chunk(shape, rng, [RequestRows(1, 0, rows, decode=rows == 1)]) for rows in (5, 1, 1, 1)]

    def foreseen(name: str) -> list[bytes]:
        before = _native.get_isa()
        _native.set_isa(name)
        try:
            learned = Learned(shape, after=nets[0], ahead=nets[1])
            learned.begin(1)
            said = []
            for one in (each for routings in passes for each in routings):
                learned.observe(one)
                said += [learned.outlook(one.layer).tobytes(), learned.forecast((one.layer + 1) % 3).tobytes()]
            return said
        finally:
            _native.set_isa(before)

    assert foreseen(isa) == foreseen("scalar")


def test_what_does_not_fit_is_refused() -> None:
    shape = Shape(2, 8, 2)
    nets = FoldedNets(random_nets(shape, len(HORIZONS), 1))
    state_SLX, weights_TK = nets.state(1), np.ones((1, 2), np.float32)
    for layer, place, expert in ((2, 0, 0), (0, 1, 0), (0, 0, 1000), (0, 0, -1)):
        with pytest.raises(ValueError, match="foresight nets"):
            nets.follow(state_SLX, 1, layer, [(place, 0, 1)], np.array([[expert, 1]]), weights_TK)
    for layer, place in ((-1, 0), (0, 7)):
        with pytest.raises(ValueError, match="foresight nets"):
            nets.chances(state_SLX, 0, layer, [place])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_kept_of_a_request_is_within_what_is_planned_for_it(shape: Shape) -> None:
    nets = random_nets(shape, len(HORIZONS), 1), random_nets(shape, 1, 2, width=21)
    nets_bytes = sum(array.nbytes for one in nets for array in one.arrays().values())
    assert FoldedNets(*nets).state(1).nbytes <= state_bytes(shape, nets_bytes)
