"""What fine-tunes add to matrices: the reference's bits from every instruction set, thread count and batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moestro.kernels.cpu import CpuKernels
from moestro.kernels.reference import ReferenceKernels
from moestro.quant.delta import DELTA_BITS
from packed_matrices import Source, random_delta, random_matrix

REFERENCE = ReferenceKernels()
PROPERTY = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

columns = st.integers(1, 100) | st.sampled_from([64, 128, 192, 384])
shares = st.sampled_from([0.0, 0.02, 0.5, 1.0])


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal to the bit, where a NaN is as good as another."""
    missing = left.isnan()
    if not torch.equal(missing, right.isnan()):
        return False
    return torch.equal(left.masked_fill(missing, 0).view(torch.int32), right.masked_fill(missing, 0).view(torch.int32))


def salient_of(width: int, share: float) -> int:
    """None, one or two, half, or all."""
    return min(width, round(width * share) + (share == 0.02))


@PROPERTY
@given(
    bits=st.sampled_from(DELTA_BITS),
    tokens=st.integers(0, 20) | st.just(70),
    rows=st.integers(1, 70),
    width=columns,
    share=shares,
    biased=st.booleans(),
    scale=st.sampled_from([1e-38, 1e-3, 1.0, 1e30]),
    threads=st.sampled_from([1, 3]),
    seed=st.integers(0, 1000),
)
def test_bits_are_the_reference(
    isa: str,
    bits: int,
    tokens: int,
    rows: int,
    width: int,
    share: float,
    biased: bool,
    scale: float,
    threads: int,
    seed: int,
) -> None:
    source = Source(seed)
    delta = random_delta(source, rows, width, bits=bits, salient=salient_of(width, share), biased=biased)
    x_TK, before_TN = source.normal(tokens, width) * scale, source.normal(tokens, rows)
    out_TN, expected_TN = before_TN.clone(), before_TN.clone()
    CpuKernels(threads=threads).add_delta(x_TK, delta.region, delta.address, out_TN)
    REFERENCE.add_delta(x_TK, delta.region, delta.address, expected_TN)
    assert same_bits(out_TN, expected_TN)


def test_more_salient_channels_than_a_task_keeps_ready(isa: str) -> None:
    source = Source(1)
    for tokens, width in ((1, 4200), (9, 700)):
        delta = random_delta(source, 33, width, bits=2, salient=width)
        x_TK, out_TN, expected_TN = source.normal(tokens, width), torch.zeros(tokens, 33), torch.zeros(tokens, 33)
        CpuKernels(threads=2).add_delta(x_TK, delta.region, delta.address, out_TN)
        REFERENCE.add_delta(x_TK, delta.region, delta.address, expected_TN)
        assert same_bits(out_TN, expected_TN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_what_the_bytes_stand_for(dtype: torch.dtype) -> None:
    """The whole way beside an unquantised matrix: quantised activations lose about a percent at most."""
    source = Source(2)
    delta = random_delta(source, 40, 192, bits=2, salient=5, biased=True)
    weight_NK, x_TK = (source.normal(40, 192) * 0.1).to(dtype), source.normal(6, 192)
    kernels = CpuKernels(threads=2)
    out_TN = kernels.linear(x_TK, weight_NK)
    kernels.add_delta(x_TK, delta.region, delta.address, out_TN)
    sum_NK = weight_NK.float() + kernels.unpack_delta(delta.region, delta.address)
    bias_N = delta.bytes[delta.region.bias_at :].view(torch.float32)[:40]
    exact_TN = x_TK @ sum_NK.T + bias_N
    assert float((out_TN - exact_TN).norm() / exact_TN.norm()) < 0.01


@PROPERTY
@given(bits=st.sampled_from(DELTA_BITS), tokens=st.integers(2, 20), share=shares, seed=st.integers(0, 1000))
def test_a_row_does_not_depend_on_the_others(isa: str, bits: int, tokens: int, share: float, seed: int) -> None:
    source = Source(seed)
    delta = random_delta(source, 37, 160, bits=bits, salient=salient_of(160, share), biased=True)
    x_TK, before_TN = source.normal(tokens, 160), source.normal(tokens, 37)
    kernels = CpuKernels(threads=2)
    together_TN = before_TN.clone()
    kernels.add_delta(x_TK, delta.region, delta.address, together_TN)
    for token in range(tokens):
        alone_1N = before_TN[token : token + 1].clone()
        kernels.add_delta(x_TK[token : token + 1], delta.region, delta.address, alone_1N)
        assert same_bits(together_TN[token : token + 1], alone_1N)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("bits", DELTA_BITS)
def test_nan_and_infinity_spoil_their_rows_only(isa: str, bits: int, value: float) -> None:
    source = Source(bits)
    delta = random_delta(source, 33, 96, bits=bits, salient=3)
    x_TK, kernels = source.normal(9, 96), CpuKernels(threads=2)
    clean_TN, out_TN = torch.zeros(9, 33), torch.zeros(9, 33)
    kernels.add_delta(x_TK, delta.region, delta.address, clean_TN)
    x_TK[4, 17] = value
    kernels.add_delta(x_TK, delta.region, delta.address, out_TN)
    assert bool(out_TN[4].isnan().all())
    out_TN[4] = clean_TN[4]
    assert same_bits(out_TN, clean_TN)


def test_rows_may_be_apart(isa: str) -> None:
    source = Source(3)
    delta = random_delta(source, 20, 64, bits=2, salient=2)
    wide_TK, wide_TN = source.normal(5, 100), source.normal(5, 30)
    expected_TN = wide_TN.clone()
    REFERENCE.add_delta(wide_TK[:, 7:71].contiguous(), delta.region, delta.address, expected_TN[:, 3:23])
    CpuKernels(threads=1).add_delta(wide_TK[:, 7:71], delta.region, delta.address, wide_TN[:, 3:23])
    assert same_bits(wide_TN, expected_TN)


@PROPERTY
@given(
    bits=st.sampled_from(DELTA_BITS), rows=st.integers(1, 40), width=columns, share=shares, seed=st.integers(0, 1000)
)
def test_unpacked_and_rows_are_the_reference(bits: int, rows: int, width: int, share: float, seed: int) -> None:
    source = Source(seed)
    delta = random_delta(source, rows, width, bits=bits, salient=salient_of(width, share))
    kernels = CpuKernels(threads=2)
    expected_NK = REFERENCE.unpack_delta(delta.region, delta.address)
    assert same_bits(kernels.unpack_delta(delta.region, delta.address), expected_NK)
    ids = torch.randint(0, rows, (7,), generator=source.generator)
    before_RK = source.normal(7, width)
    for each in (kernels, REFERENCE):
        out_RK = before_RK.clone()
        each.add_delta_rows(delta.region, delta.address, ids, out_RK)
        assert same_bits(out_RK, before_RK + expected_NK[ids])
        for wrong in (-1, rows):
            with pytest.raises(ValueError, match=f"{wrong}"):
                each.add_delta_rows(delta.region, delta.address, torch.tensor([0, wrong]), out_RK[:2])


def test_a_delta_of_flat_codes_is_their_product() -> None:
    """Without salient channels it is packed_linear, added."""
    source = Source(4)
    delta = random_delta(source, 50, 128, bits=4, salient=0)
    matrix = random_matrix(source, "flat4", 50, 128)
    x_TK, kernels = source.normal(3, 128), CpuKernels(threads=1)
    base_TN = kernels.packed_linear(x_TK, matrix.spec, matrix.addresses, 4)
    own_TN = torch.zeros_like(base_TN)
    kernels.add_delta(x_TK, delta.region, delta.address, own_TN)
    kernels.add_delta(x_TK, delta.region, delta.address, base_TN)
    assert bool(own_TN.any())
    assert same_bits(base_TN, kernels.packed_linear(x_TK, matrix.spec, matrix.addresses, 4) + own_TN)
