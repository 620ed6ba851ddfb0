"""Where tensors lie inside planes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moestro.hf.skeleton import ExpertParam
from moestro.quant import LEVELS
from moestro.store.dtypes import STORED_FLOATS, tensor_bytes
from moestro.store.layout import Layout, PlaneLayout, TensorLayout, layout_problem, quantised_layout, raw_layout

_SHAPES = st.lists(st.integers(1, 70), min_size=1, max_size=2).map(tuple)


def test_a_known_layout() -> None:
    params = (ExpertParam("w", (3, 5), False), ExpertParam("b", (3,), False), ExpertParam("v", (40, 60), True))
    assert raw_layout(params, "BF16") == Layout(
        planes=(
            PlaneLayout(
                kind="raw",
                level=16,
                nbytes=8192,
                tensors=(
                    TensorLayout("w", "BF16", (3, 5), 0, 30, None),
                    TensorLayout("b", "BF16", (3,), 64, 6, None),
                    TensorLayout("v", "BF16", (40, 60), 128, 4800, None),
                ),
            ),
        )
    )
    assert raw_layout(params, "F32").planes[0].level == 32
    assert raw_layout(params, "F32").nbytes == 12288


@given(st.lists(_SHAPES, min_size=1, max_size=6), st.sampled_from(STORED_FLOATS))
def test_tensors_are_aligned_and_apart(shapes: list[tuple[int, ...]], dtype: str) -> None:
    layout = raw_layout([ExpertParam(f"t{i}", shape, False) for i, shape in enumerate(shapes)], dtype)
    (plane,) = layout.planes
    assert plane.nbytes % 4096 == 0
    end = 0
    for tensor, shape in zip(plane.tensors, shapes, strict=True):
        assert tensor.offset % 64 == 0
        assert end <= tensor.offset < end + 64
        assert tensor.nbytes == tensor_bytes(dtype, shape)
        end = tensor.offset + tensor.nbytes
    assert end <= plane.nbytes < end + 4096
    assert layout_problem(layout) is None


def test_a_known_quantised_layout() -> None:
    """Sizes by the formulas of docs/format.md: 2 tiles of 16 rows, 2 groups of 32 and 1 of 64 columns."""
    params = (ExpertParam("w", (20, 40), True), ExpertParam("b", (20,), False), ExpertParam("v", (40, 64), False))
    base = PlaneLayout(
        "base",
        2,
        4096,
        (
            TensorLayout("w", "nested", (20, 40), 0, 64 + 2 * 2 * (64 + 4 * 32), 32),
            TensorLayout("b", "F32", (20,), 832, 80, None),
            TensorLayout("v", "nested", (40, 64), 960, 64 + 3 * 1 * (64 + 4 * 64), 64),
        ),
    )
    bits = (
        TensorLayout("w", "nested", (20, 40), 0, 2 * 2 * 2 * 32, 32),
        TensorLayout("v", "nested", (40, 64), 256, 3 * 2 * 64, 64),
    )
    nibbles = (
        TensorLayout("w", "nested", (20, 40), 0, 2 * 2 * 8 * 32, 32),
        TensorLayout("v", "nested", (40, 64), 1024, 3 * 8 * 64, 64),
    )
    chain = (
        base,
        PlaneLayout("bit", 3, 4096, bits),
        PlaneLayout("bit", 4, 4096, bits),
        PlaneLayout("bit", 8, 4096, nibbles),
    )
    assert quantised_layout(params, "nested", (2, 3, 4, 8)) == Layout(chain)
    assert quantised_layout(params, "nested", (2, 4)) == Layout(chain[:3])
    assert quantised_layout(params, "nested", (2,)) == Layout(chain[:1])


@given(st.lists(_SHAPES, min_size=1, max_size=4), st.sampled_from(["nested", "signs"]), st.sampled_from(LEVELS))
def test_chains_of_planes_are_valid(shapes: list[tuple[int, ...]], encoding: str, level: int) -> None:
    params = [ExpertParam(f"t{i}", shape, False) for i, shape in enumerate([(3, 5), *shapes])]
    layout = quantised_layout(params, encoding, (level,))
    assert layout_problem(layout) is None
    assert [plane.level for plane in layout.planes] == [bits for bits in LEVELS if bits <= level]
    first = layout.planes[0]
    assert {tensor.name: tensor.shape for tensor in first.tensors} == {param.name: param.shape for param in params}
    assert layout_problem(Layout((*layout.planes, PlaneLayout("delta", 9, 4096, ())))) is None


_W = TensorLayout("w", "F32", (4, 8), 64, 128, None)
_GOOD = PlaneLayout("raw", 32, 4096, (_W,))


@pytest.mark.parametrize(
    ("planes", "message"),
    [
        ((), "without planes"),
        ((replace(_GOOD, kind="odd"),), "unknown kind 'odd'"),
        ((_GOOD, _GOOD), "do not ascend"),
        ((replace(_GOOD, nbytes=4095),), "not a positive multiple"),
        ((replace(_GOOD, nbytes=0),), "not a positive multiple"),
        ((replace(_GOOD, tensors=(replace(_W, offset=32),)),), "where it cannot be"),
        ((replace(_GOOD, tensors=(replace(_W, offset=4032),)),), "where it cannot be"),
        ((replace(_GOOD, tensors=(_W, replace(_W, name="v", offset=128))),), "where it cannot be"),
        ((replace(_GOOD, tensors=(replace(_W, nbytes=64),)),), "does not match its shape"),
    ],
)
def test_what_cannot_be_is_named(planes: tuple[PlaneLayout, ...], message: str) -> None:
    assert message in str(layout_problem(Layout(planes)))
