"""`linear` of the compiled kernels: right, and the same bits whatever else is computed with a row."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moestro import _native
from moestro.kernels import make_kernels
from moestro.kernels.base import WEIGHT_DTYPES
from moestro.kernels.cpu import CpuKernels
from moestro.kernels.reference import ReferenceKernels

REFERENCE = ReferenceKernels()
PROPERTY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
dtypes = st.sampled_from(WEIGHT_DTYPES)


def make(seed: int, shape: tuple[int, ...], scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(left.view(torch.int32), right.view(torch.int32))


@PROPERTY
@given(
    tokens=st.integers(0, 30),
    outputs=st.integers(1, 70),
    inputs=st.integers(1, 90),
    weight_dtype=dtypes,
    bias_dtype=st.none() | dtypes,
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e4]),
    seed=st.integers(0, 1000),
)
def test_matches_reference(
    isa: str,
    tokens: int,
    outputs: int,
    inputs: int,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    scale: float,
    seed: int,
) -> None:
    x_TK, weight_NK = make(seed, (tokens, inputs), scale), make(seed + 1, (outputs, inputs)).to(weight_dtype)
    bias_N = None if bias_dtype is None else make(seed + 2, (outputs,)).to(bias_dtype)
    out_TN = CpuKernels(threads=2).linear(x_TK, weight_NK, bias_N)
    expected_TN = REFERENCE.linear(x_TK.double(), weight_NK, bias_N)
    magnitude_TN = REFERENCE.linear(x_TK.double().abs(), weight_NK.abs(), None if bias_N is None else bias_N.abs())
    assert out_TN.shape == (tokens, outputs)
    assert out_TN.dtype is torch.float32
    # A sum of n terms in any order is within n rounding steps of its terms' magnitudes; eight lanes need an eighth.
    steps = math.ceil(inputs / 8) + 8
    assert bool(((out_TN - expected_TN).abs() <= magnitude_TN * steps * 2**-24 + 1e-44).all())


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("inputs", [1, 7, 8, 100, 513, 1100])
def test_row_has_same_bits_among_any_others(dtype: torch.dtype, inputs: int) -> None:
    kernels = CpuKernels(threads=2)
    x_TK, weight_NK, bias_N = make(0, (600, inputs)), make(1, (101, inputs)).to(dtype), make(2, (101,))
    alone_TN = torch.cat([kernels.linear(x_TK[t : t + 1], weight_NK, bias_N) for t in range(64)])
    for tokens in (*range(2, 20), 33, 60, 61, 64, 121, 600):
        out_TN = kernels.linear(x_TK[:tokens], weight_NK, bias_N)
        assert same_bits(out_TN[:64], alone_TN[:tokens]), tokens


@PROPERTY
@given(
    tokens=st.integers(1, 140),
    outputs=st.integers(1, 120),
    inputs=st.integers(1, 600),
    dtype=dtypes,
    seed=st.integers(0, 1000),
    threads=st.sampled_from([1, 2, 3]),
)
def test_same_bits_for_any_threads_and_row_order(
    tokens: int, outputs: int, inputs: int, dtype: torch.dtype, seed: int, threads: int
) -> None:
    x_TK, weight_NK = make(seed, (tokens, inputs)), make(seed + 1, (outputs, inputs)).to(dtype)
    order_T = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
    rows_N = torch.randperm(outputs, generator=torch.Generator().manual_seed(seed))
    out_TN = CpuKernels(threads=1).linear(x_TK, weight_NK)
    permuted_TN = CpuKernels(threads=threads).linear(x_TK[order_T], weight_NK[rows_N])
    assert same_bits(permuted_TN, out_TN[order_T][:, rows_N])


@pytest.mark.parametrize("tokens", [1, 3, 8, 13, 70])
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_every_instruction_set_gives_the_same_bits(tokens: int, dtype: torch.dtype) -> None:
    kernels = CpuKernels(threads=2)
    x_TK, weight_NK, bias_N = make(0, (tokens, 531)), make(1, (67, 531)).to(dtype), make(2, (67,)).to(dtype)
    before, outs = _native.get_isa(), []
    for isa in _native.available_isas():
        _native.set_isa(isa)
        outs.append(kernels.linear(x_TK, weight_NK, bias_N))
    _native.set_isa(before)
    assert all(same_bits(out, outs[0]) for out in outs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_weight_is_converted_exactly(isa: str, dtype: torch.dtype) -> None:
    weight_N1 = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).reshape(-1, 1)
    out_TN = CpuKernels(threads=2).linear(torch.ones(20, 1), weight_N1)
    alone_TN = CpuKernels(threads=2).linear(torch.ones(1, 1), weight_N1)
    expected_N = weight_N1.float().squeeze(1)
    assert torch.equal(out_TN[11].nan_to_num(0.5), expected_N.nan_to_num(0.5))
    assert torch.equal(alone_TN[0].nan_to_num(0.5), expected_N.nan_to_num(0.5))
    assert torch.equal(out_TN[11].isnan(), expected_N.isnan())


@pytest.mark.parametrize("tokens", [2, 40])
def test_nan_stays_in_its_row_and_column(isa: str, tokens: int) -> None:
    x_TK, weight_NK = torch.ones(tokens, 19), torch.ones(11, 19)
    x_TK[1, 18] = math.nan
    weight_NK[4, 3] = math.nan
    out_TN = CpuKernels(threads=2).linear(x_TK, weight_NK)
    expected_TN = torch.zeros(tokens, 11, dtype=torch.bool)
    expected_TN[1] = expected_TN[:, 4] = True
    assert torch.equal(out_TN.isnan(), expected_TN)


def test_infinities_and_overflow(isa: str) -> None:
    out_TN = CpuKernels(threads=1).linear(
        torch.tensor([[math.inf, 1.0], [3e38, 3e38]]), torch.tensor([[1.0, 1.0], [-1.0, 0.5]])
    )
    assert out_TN[0].tolist() == [math.inf, -math.inf]
    assert out_TN[1, 0].item() == math.inf


def test_no_inputs_gives_the_bias(isa: str) -> None:
    kernels, bias_N = CpuKernels(threads=2), torch.arange(5.0)
    assert torch.equal(kernels.linear(torch.empty(3, 0), torch.empty(5, 0), bias_N), bias_N.expand(3, 5))
    assert torch.equal(kernels.linear(torch.empty(30, 0), torch.empty(5, 0)), torch.zeros(30, 5))
    assert kernels.linear(torch.empty(3, 4), torch.empty(0, 4)).shape == (3, 0)


@pytest.mark.parametrize("tokens", [1, 3, 50])
def test_rows_may_be_strided(tokens: int) -> None:
    kernels, wide_TK, weight_NK = CpuKernels(threads=2), make(0, (tokens, 90)), make(1, (20, 33))
    assert same_bits(
        kernels.linear(wide_TK[:, 7:40], weight_NK), kernels.linear(wide_TK[:, 7:40].contiguous(), weight_NK)
    )


def test_denormals_are_kept_when_torch_flushes_them() -> None:
    kernels = CpuKernels(threads=2)
    x_TK, weight_NK = torch.full((1, 64), 1e-20), torch.full((2000, 64), 1e-21)
    expected_TN = kernels.linear(x_TK, weight_NK)
    assert expected_TN[0, 0] > 0
    assert torch.set_flush_denormal(True)
    try:
        out_TN = kernels.linear(x_TK, weight_NK)
    finally:
        torch.set_flush_denormal(False)
    assert same_bits(out_TN, expected_TN)


def test_bad_operands_are_refused() -> None:
    kernels = make_kernels("cpu", threads=1)
    x_TK, weight_NK = torch.ones(2, 8), torch.ones(3, 8)
    bad: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = [
        (x_TK.double(), weight_NK, None),
        (x_TK.T.contiguous().T, weight_NK, None),
        (x_TK, torch.ones(3, 9), None),
        (x_TK, torch.ones(8, 3).T, None),
        (x_TK.to("meta"), weight_NK, None),
        (x_TK, weight_NK, torch.ones(4)),
    ]
    for operands in bad:
        with pytest.raises(AssertionError):
            kernels.linear(*operands)
    with pytest.raises(KeyError):
        kernels.linear(x_TK, weight_NK.double())
