"""Training a bit router: it learns what costs little, capacities hold, and what cannot be trained is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import one_hot

from calibration.checkpoints import save_with_tokenizer, write_text
from moestro.bit_router import BIT_ROUTER_FILE
from moestro.calibration import bit_router, levels_model, pack
from moestro.calibration.bit_router import BitRouterTraining, capacities, cut_pieces, train_bit_router
from moestro.calibration.bit_router_packing import add_bit_router
from moestro.calibration.levels_model import LevelsModel
from moestro.calibration.sensitivity import mean_divergence
from moestro.config import PackOptions
from moestro.errors import PackError
from moestro.kernels import make_kernels
from moestro.runtime.levels import level_table
from moestro.runtime.open import layouts_of
from moestro.store.reader import Store
from opening import logits_of, open_store

TRAINING = BitRouterTraining(steps=4, tokens=24, held_out=2, width=4)
IDS = [5, 17, 3, 99, 42, 8, 12, 9, 4, 77]


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp(request.param)
    save_with_tokenizer(request.param, folder / "checkpoint")
    return pack(folder / "checkpoint", folder / "store", options=PackOptions(calibrate=str(write_text(folder / "t"))))


def _model(store: Store) -> LevelsModel:
    return LevelsModel(store, make_kernels("auto", threads=1))


@pytest.mark.parametrize("level", [2, 4])
def test_its_levels_are_the_runtimes(store: Store, level: int) -> None:
    """As far as the runtime goes, which rounds activations to 8 bits."""
    model = _model(store)
    with open_store(store.path, level=level) as opened:
        wanted_TV = logits_of(opened, IDS).log_softmax(-1)
    off = {one: mean_divergence(wanted_TV, model.log_probs(torch.tensor([IDS]), _only(one))) for one in (2, 3, 4)}
    assert off[level] == min(off.values())
    assert off[level] < 0.2 * off[6 - level]


def test_the_exact_level_alone_is_the_exact_model(store: Store) -> None:
    model, ids = _model(store), torch.tensor([IDS])
    assert torch.allclose(model.log_probs(ids, _only(4)), model.log_probs(ids, None), atol=1e-5)


def _only(bits: int) -> levels_model.Choose:
    return lambda _layer, _hidden, index_TK, _weights: one_hot(0 * index_TK + bits - 1, 4).float()


def test_training_is_deterministic_and_makes_the_loss_less(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(store)
    table = level_table(store, layouts_of(store, 4), bits=model.levels, picks=2)
    # Costs as if every level were free of harm: what is learnt is that they are not.
    table = replace(table, sensitivity_L=np.full_like(table.sensitivity_L, 1e-6))
    pieces = [list(torch.randint(3, 100, (24,), generator=torch.Generator().manual_seed(i))) for i in range(6)]
    windows = [[int(one) for one in piece] for piece in pieces]
    monkeypatch.setattr(bit_router, "price_range", lambda *_: (1e-7, 1e-6))
    routers = [train_bit_router(model, table, windows, TRAINING) for _ in range(2)]
    assert all(np.array_equal(a, b) for a, b in zip(*(one.arrays().values() for one in routers), strict=True))
    assert 0 < routers[0].prices["high"] <= routers[0].prices["balanced"] <= routers[0].prices["fast"]
    longer = train_bit_router(model, table, windows, replace(TRAINING, steps=60, rate=0.2, capacity=False))
    assert longer.outer_bias_LO.mean() > routers[0].outer_bias_LO.mean()
    # The same is lost at a higher price.
    assert longer.prices["balanced"] > routers[0].prices["balanced"]


@given(levels=st.integers(3, 6), pairs=st.integers(1, 60), seed=st.integers(0, 99))
def test_capacities_hold(levels: int, pairs: int, seed: int) -> None:
    limits = capacities(levels)
    wish_PD = torch.randn(pairs, levels, generator=torch.Generator().manual_seed(seed)) + torch.arange(levels) * 3.0
    counts_D = torch.bincount(bit_router._drawn(wish_PD[:, None], limits).flatten(), minlength=levels)
    assert int(counts_D.sum()) == pairs
    for count, limit in zip(counts_D.tolist(), limits, strict=True):
        assert count <= math.ceil(limit * pairs)


def test_capacities_are_the_published_ones() -> None:
    assert capacities(4)[1:] == (0.3, 0.4, 0.3)
    assert all(sum(capacities(levels)[1:]) >= 0.999 for levels in range(3, 7))


def test_a_store_gets_one_once(store: Store, tmp_path: Path) -> None:
    text = str(write_text(tmp_path / "text"))
    add_bit_router(store, text=text, training=TRAINING)
    file = store.path / BIT_ROUTER_FILE
    first, made = file.read_bytes(), file.stat().st_mtime_ns
    add_bit_router(store, text=text, training=TRAINING)
    assert file.stat().st_mtime_ns == made
    file.write_bytes(first[:-1])
    add_bit_router(store, text=text, training=TRAINING)
    assert file.read_bytes() == first


def test_what_cannot_be_trained_is_refused(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PackError, match="too few to train"):
        cut_pieces([[1, 2, 3]], TRAINING)
    with pytest.raises(PackError, match="nothing to choose"):
        PackOptions(levels="4,8", bit_router=True)
    with pytest.raises(PackError, match="calibration is off"):
        PackOptions(calibration=False, bit_router=True)
    with pytest.raises(PackError, match="no effect on raw"):
        PackOptions(levels="raw", bit_router=True)
    plain = pack(store.path.parent / "checkpoint", tmp_path / "plain", options=PackOptions(calibration=False))
    with pytest.raises(PackError, match="without --no-calibration"):
        add_bit_router(plain)
    monkeypatch.setattr(levels_model, "machine_bytes", lambda: 1 << 10)
    with pytest.raises(PackError, match="larger machine"):
        _model(store)
