"""Linear maps from quantised weights: the reference's bits from every instruction set, thread count and batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moestro.kernels.cpu import CpuKernels
from moestro.kernels.reference import ReferenceKernels
from moestro.kernels.specs import ENCODINGS, FLAT_BITS, Encoding, MatrixSpec
from moestro.quant import LEVELS, make_encoding
from moestro.quant.flat import flat_decode, flat_encode
from moestro.quant.groups import group_size
from packed_matrices import Source, random_matrix

REFERENCE = ReferenceKernels()
PROPERTY = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
CELLS = ((16, 1), (32, 3))


def levels_of(encoding: Encoding) -> tuple[int, ...]:
    return (FLAT_BITS[encoding],) if encoding in FLAT_BITS else LEVELS


codings = st.sampled_from([(encoding, level) for encoding in ENCODINGS for level in levels_of(encoding)])
columns = st.integers(1, 100) | st.sampled_from([64, 128, 192, 256, 384])


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal to the bit, where a NaN is as good as another."""
    missing = left.isnan()
    if not torch.equal(missing, right.isnan()):
        return False
    return torch.equal(left.masked_fill(missing, 0).view(torch.int32), right.masked_fill(missing, 0).view(torch.int32))


@PROPERTY
@given(
    coding=codings,
    cells=st.sampled_from(CELLS),
    tokens=st.integers(0, 20),
    rows=st.integers(1, 70),
    columns=columns,
    scale=st.sampled_from([1e-38, 1e-32, 1e-3, 1.0, 1e30]),
    biased=st.booleans(),
    threads=st.sampled_from([1, 3]),
    seed=st.integers(0, 1000),
)
def test_bits_are_the_reference(
    isa: str,
    coding: tuple[Encoding, int],
    cells: tuple[int, int],
    tokens: int,
    rows: int,
    columns: int,
    scale: float,
    biased: bool,
    threads: int,
    seed: int,
) -> None:
    encoding, level = coding
    source = Source(seed)
    matrix = random_matrix(source, encoding, rows, columns, cells=cells)
    x_TK = source.normal(tokens, columns) * scale
    bias_N = source.normal(rows) if biased else None
    kernels = CpuKernels(threads=threads)
    out_TN = kernels.packed_linear(x_TK, matrix.spec, matrix.addresses, level, bias_N)
    expected_TN = REFERENCE.packed_linear(x_TK, matrix.spec, matrix.addresses, level, bias_N)
    assert out_TN.shape == (tokens, rows)
    assert same_bits(out_TN, expected_TN)


@pytest.mark.parametrize(("encoding", "level"), [("nested", 4), ("nested", 8), ("signs", 8), ("flat8", 8)])
def test_more_rows_than_a_task_takes(isa: str, encoding: Encoding, level: int) -> None:
    source = Source(level)
    matrix = random_matrix(source, encoding, 50, 256)
    x_TK = source.normal(150, 256)
    out_TN = CpuKernels(threads=3).packed_linear(x_TK, matrix.spec, matrix.addresses, level)
    assert same_bits(out_TN, REFERENCE.packed_linear(x_TK, matrix.spec, matrix.addresses, level))


@PROPERTY
@given(coding=codings, rows=st.integers(1, 40), tokens=st.integers(2, 20), seed=st.integers(0, 1000))
def test_a_row_does_not_depend_on_the_others(
    isa: str, coding: tuple[Encoding, int], rows: int, tokens: int, seed: int
) -> None:
    encoding, level = coding
    source = Source(seed)
    matrix = random_matrix(source, encoding, rows, 160)
    x_TK = source.normal(tokens, 160)
    kernels = CpuKernels(threads=2)
    together_TN = kernels.packed_linear(x_TK, matrix.spec, matrix.addresses, level)
    for token in range(tokens):
        alone_1N = kernels.packed_linear(x_TK[token : token + 1], matrix.spec, matrix.addresses, level)
        assert same_bits(together_TN[token : token + 1], alone_1N)


@PROPERTY
@given(
    coding=codings,
    spoilt=st.sets(st.integers(0, 8), min_size=1, max_size=3),
    column=st.integers(0, 95),
    value=st.sampled_from([float("nan"), float("inf"), -float("inf")]),
    seed=st.integers(0, 1000),
)
def test_nan_and_infinity_spoil_their_rows_only(
    isa: str, coding: tuple[Encoding, int], spoilt: set[int], column: int, value: float, seed: int
) -> None:
    encoding, level = coding
    source = Source(seed)
    matrix = random_matrix(source, encoding, 33, 96)
    x_TK = source.normal(9, 96)
    kernels = CpuKernels(threads=2)
    clean_TN = kernels.packed_linear(x_TK, matrix.spec, matrix.addresses, level)
    for token in spoilt:
        x_TK[token, column] = value
    out_TN = kernels.packed_linear(x_TK, matrix.spec, matrix.addresses, level)
    for token in range(9):
        if token in spoilt:
            assert bool(out_TN[token].isnan().all())
        else:
            assert same_bits(out_TN[token], clean_TN[token])


def test_rows_may_be_apart(isa: str) -> None:
    source = Source(1)
    matrix = random_matrix(source, "flat4", 20, 64)
    wide_TK = source.normal(5, 100)
    out_TN = CpuKernels(threads=1).packed_linear(wide_TK[:, 7:71], matrix.spec, matrix.addresses, 4)
    assert same_bits(out_TN, REFERENCE.packed_linear(wide_TK[:, 7:71].contiguous(), matrix.spec, matrix.addresses, 4))


@PROPERTY
@given(
    coding=codings, cells=st.sampled_from(CELLS), rows=st.integers(1, 40), columns=columns, seed=st.integers(0, 1000)
)
def test_unpack_is_the_reference(
    coding: tuple[Encoding, int], cells: tuple[int, int], rows: int, columns: int, seed: int
) -> None:
    encoding, level = coding
    matrix = random_matrix(Source(seed), encoding, rows, columns, cells=cells)
    out_NK = CpuKernels(threads=2).unpack(matrix.spec, matrix.addresses, level)
    assert out_NK.shape == (rows, columns)
    assert same_bits(out_NK, REFERENCE.unpack(matrix.spec, matrix.addresses, level))


@pytest.mark.parametrize("encoding", ["nested", "signs"])
@pytest.mark.parametrize("level", LEVELS)
def test_unpack_is_what_the_encoding_says(encoding: Encoding, level: int) -> None:
    rows, columns = 20, 160
    maker = make_encoding(encoding)
    planes = maker.encode(Source(3).normal(rows, columns) * 0.02, levels=LEVELS)
    spec = MatrixSpec(encoding, rows, columns, group_size(columns), (0, 0, 0, 0))
    out_NK = CpuKernels(threads=1).unpack(spec, [plane.data_ptr() for plane in planes.values()], level)
    torch.testing.assert_close(out_NK, maker.decode(list(planes.values()), rows, columns, level), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("encoding", "bits"), FLAT_BITS.items())
def test_rows_of_a_flat_matrix(encoding: Encoding, bits: int) -> None:
    rows, columns = 50, 96
    region = flat_encode(Source(4).normal(rows, columns), bits)
    spec = MatrixSpec(encoding, rows, columns, group_size(columns), (0,))
    ids = torch.tensor([49, 0, 17, 17, 31])
    expected_RK = flat_decode(region, rows, columns, bits)[ids]
    for kernels in (CpuKernels(threads=2), REFERENCE):
        out_RK = kernels.packed_rows(spec, (region.data_ptr(),), ids)
        torch.testing.assert_close(out_RK, expected_RK, rtol=1e-6, atol=1e-8)
        for wrong in (-1, rows):
            with pytest.raises(ValueError, match=str(wrong)):
                kernels.packed_rows(spec, (region.data_ptr(),), torch.tensor([0, wrong]))


@pytest.mark.parametrize("kernels", [CpuKernels(threads=1), REFERENCE], ids=["cpu", "reference"])
def test_wrong_levels_and_absent_planes_are_refused(kernels: CpuKernels | ReferenceKernels) -> None:
    matrix = random_matrix(Source(5), "nested", 16, 64)
    flat = random_matrix(Source(5), "flat8", 16, 64)
    x_TK = torch.ones(1, 64)
    with pytest.raises(ValueError, match="level 5"):
        kernels.packed_linear(x_TK, matrix.spec, matrix.addresses, 5)
    with pytest.raises(ValueError, match="level 4"):
        kernels.packed_linear(x_TK, flat.spec, flat.addresses, 4)
    with pytest.raises(ValueError, match="level 4 needs"):
        kernels.packed_linear(x_TK, matrix.spec, (*matrix.addresses[:2], 0, 0), 4)
    with pytest.raises(ValueError, match="level 3 needs"):
        kernels.unpack(matrix.spec, matrix.addresses[:1], 3)


def test_quantised_products_are_near_exact_ones() -> None:
    """The whole way, from weights to products: 8-bit codes and activations lose about a percent at most."""
    source = Source(6)
    weights_NK, x_TK = source.normal(64, 256), source.normal(10, 256)
    region = flat_encode(weights_NK, 8)
    spec = MatrixSpec("flat8", 64, 256, group_size(256), (0,))
    out_TN = CpuKernels(threads=1).packed_linear(x_TK, spec, (region.data_ptr(),), 8)
    exact_TN = x_TK @ weights_NK.T
    assert float((out_TN - exact_TN).norm() / exact_TN.norm()) < 0.01
