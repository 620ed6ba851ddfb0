"""Levels: which may be asked for, and what is left of a layout at one."""

from __future__ import annotations

import pytest

from moestro.errors import RequestError
from moestro.hf.skeleton import ExpertParam
from moestro.runtime.level import cut, resolve_level
from moestro.store.layout import quantised_layout, raw_layout

PARAMS = (ExpertParam("gate_up_proj", (64, 32), False), ExpertParam("down_proj", (32, 32), False))


def test_zero_is_the_exact_level() -> None:
    assert resolve_level(0, exact=4, promised=(2, 4), name="store") == 4
    assert resolve_level(2, exact=4, promised=(2, 4), name="store") == 2


@pytest.mark.parametrize(("promised", "words"), [((2, 4), "levels 2, 4"), ((16,), "level 16 only")])
@pytest.mark.parametrize("asked", [3, -1, 5])
def test_other_levels_are_refused_by_name(promised: tuple[int, ...], words: str, asked: int) -> None:
    with pytest.raises(RequestError, match=f"Level {asked} was asked for, and store has {words}"):
        resolve_level(asked, exact=promised[-1], promised=promised, name="store")


def test_a_layout_is_cut_after_the_plane_of_its_level() -> None:
    layout = quantised_layout(PARAMS, "nested", (2, 8))
    for depth, level in enumerate((2, 3, 4, 8), start=1):
        assert cut(layout, level).planes == layout.planes[:depth]
    raw = raw_layout(PARAMS, "BF16")
    assert cut(raw, 16) == raw
