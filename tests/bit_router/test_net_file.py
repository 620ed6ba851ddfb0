"""A bit router comes back as it was, and a file that is not one is refused with the command that makes one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moestro.bit_router import BitRouter, encode_bit_router, load_bit_router, save_bit_router
from moestro.bit_router.net import array_shapes
from moestro.errors import StoreError

SHAPE = {"layers": 3, "hidden": 8, "experts": 5}
LEVELS = (2, 4)


@pytest.fixture
def router() -> BitRouter:
    rng = np.random.default_rng(0)
    arrays = [
        rng.standard_normal(shape, dtype=np.float32) for shape in array_shapes(**SHAPE, width=4, levels=2).values()
    ]
    return BitRouter(*arrays, levels=LEVELS, prices={"high": 0.001, "balanced": 0.01, "fast": 0.1})


def test_it_comes_back(router: BitRouter, tmp_path: Path) -> None:
    save_bit_router(tmp_path / "net", router)
    found = load_bit_router(tmp_path / "net", **SHAPE, levels=LEVELS)
    assert found.prices == router.prices
    for name, array in router.arrays().items():
        assert np.array_equal(found.arrays()[name], array)
    assert encode_bit_router(found) == encode_bit_router(router)


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "nan", "prices"])
def test_damage_is_found(router: BitRouter, tmp_path: Path, damage: str) -> None:
    if damage == "nan":
        router.inner_LRH[0, 0, 0] = np.nan
    if damage == "prices":
        router = BitRouter(**{**vars(router), "prices": {"high": 0.0}})
    data = bytearray(encode_bit_router(router))
    if damage == "flipped":
        data[-3] ^= 1
    if damage != "missing":
        (tmp_path / "net").write_bytes(data[:-8] if damage == "cut" else data)
    with pytest.raises(StoreError, match="--bit-router"):
        load_bit_router(tmp_path / "net", **SHAPE, levels=LEVELS)


@pytest.mark.parametrize("other", [{"layers": 4}, {"hidden": 16}, {"experts": 6}, {"levels": (2, 3)}])
def test_that_of_another_model_is_refused(router: BitRouter, tmp_path: Path, other: dict) -> None:  # type: ignore[type-arg]
    save_bit_router(tmp_path / "net", router)
    with pytest.raises(StoreError, match="another model"):
        load_bit_router(tmp_path / "net", **{**SHAPE, "levels": LEVELS, **other})
