"""`attention` of the compiled kernels: right, and the same bits whatever else is computed with a row."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moestro import _native
from moestro.kernels import Kernels
from moestro.kernels.cpu import CpuKernels
from moestro.kernels.reference import ReferenceKernels

PROPERTY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@dataclass(frozen=True)
class Case:
    """The arguments of one call."""

    query_THD: torch.Tensor
    key_pool: torch.Tensor
    value_pool: torch.Tensor
    block_table: torch.Tensor
    row_sequence: torch.Tensor
    row_position: torch.Tensor
    scale: float = 0.25
    window: int = 0
    softcap: float = 0.0
    sinks_H: torch.Tensor | None = None

    def run(self, kernels: Kernels) -> torch.Tensor:
        arguments = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return kernels.attention(**arguments)

    def rows(self, order_T: torch.Tensor) -> Case:
        return dataclasses.replace(
            self,
            query_THD=self.query_THD[order_T],
            row_sequence=self.row_sequence[order_T],
            row_position=self.row_position[order_T],
        )

    def double(self) -> Case:
        return dataclasses.replace(
            self,
            query_THD=self.query_THD.double(),
            key_pool=self.key_pool.double(),
            value_pool=self.value_pool.double(),
            sinks_H=None if self.sinks_H is None else self.sinks_H.double(),
        )


def make_case(
    *,
    rows: int = 20,
    heads_kv: int = 2,
    group: int = 2,
    dim: int = 24,
    value_dim: int = 24,
    block_size: int = 16,
    length: int = 100,
    sequences: int = 2,
    window: int = 0,
    softcap: float = 0.0,
    sinks: bool = False,
    seed: int = 0,
) -> Case:
    """Random rows (in order of sequence) over a pool whose unused rows are NaN: a kernel that uses one shows it."""
    random = torch.Generator().manual_seed(seed)
    max_blocks = -(-length // block_size)
    blocks = max_blocks * sequences + 1
    table = torch.randperm(blocks, generator=random)[: max_blocks * sequences].reshape(sequences, max_blocks)
    key_pool = torch.randn((blocks, block_size, heads_kv, dim), generator=random).transpose(1, 2)
    value_pool = torch.randn((blocks, heads_kv, block_size, value_dim), generator=random)
    key_pool[table[:, -1], :, (length - 1) % block_size + 1 :] = math.nan
    value_pool[table[:, -1], :, (length - 1) % block_size + 1 :] = math.nan
    return Case(
        query_THD=torch.randn((rows, heads_kv * group, dim), generator=random),
        key_pool=key_pool,
        value_pool=value_pool,
        block_table=table.int(),
        row_sequence=torch.randint(sequences, (rows,), generator=random).sort().values.int(),
        row_position=torch.randint(length, (rows,), generator=random).int(),
        window=window,
        softcap=softcap,
        sinks_H=torch.randn(heads_kv * group, generator=random) if sinks else None,
    )


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(left.view(torch.int32), right.view(torch.int32))


cases = st.builds(
    make_case,
    rows=st.integers(0, 40),
    heads_kv=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 5, 8, 17, 40]),
    dim=st.integers(1, 40),
    value_dim=st.integers(1, 75),
    block_size=st.sampled_from([1, 2, 16, 37, 256]),
    length=st.integers(1, 150),
    sequences=st.integers(1, 3),
    window=st.sampled_from([0, 1, 5, 64, 1000]),
    softcap=st.sampled_from([0.0, 0.5, 30.0]),
    sinks=st.booleans(),
    seed=st.integers(0, 1000),
)


@PROPERTY
@given(case=cases)
def test_matches_reference(isa: str, case: Case) -> None:
    out_THDv = case.run(CpuKernels(threads=2))
    expected_THDv = case.double().run(ReferenceKernels())
    assert out_THDv.dtype is torch.float32
    torch.testing.assert_close(out_THDv.double(), expected_THDv, rtol=1e-5, atol=1e-5)


@PROPERTY
@given(case=cases, threads=st.sampled_from([1, 2, 3]), seed=st.integers(0, 100))
def test_row_has_same_bits_alone_and_in_any_order(case: Case, threads: int, seed: int) -> None:
    kernels = CpuKernels(threads=threads)
    out_THDv = case.run(kernels)
    rows = len(out_THDv)
    for t in range(min(rows, 8)):
        assert same_bits(case.rows(torch.tensor([t])).run(kernels), out_THDv[t : t + 1])
    order_T = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    assert same_bits(case.rows(order_T).run(CpuKernels(threads=1)), out_THDv[order_T])


@pytest.mark.parametrize("window", [0, 30])
def test_prefill_has_the_bits_of_decode(window: int) -> None:
    case = make_case(rows=200, length=200, sequences=1, dim=64, value_dim=64, window=window, sinks=True)
    case = dataclasses.replace(case, row_position=torch.arange(200, dtype=torch.int32))
    kernels = CpuKernels(threads=2)
    one_by_one = [case.rows(torch.tensor([t])).run(kernels) for t in range(200)]
    assert same_bits(case.run(kernels), torch.cat(one_by_one))


@PROPERTY
@given(case=cases, block_size=st.sampled_from([1, 3, 64]))
def test_blocks_do_not_show_in_the_bits(case: Case, block_size: int) -> None:
    sequences, max_blocks = case.block_table.shape
    old_size = case.key_pool.shape[2]
    length = -(-max_blocks * old_size // block_size) * block_size

    def repack(pool: torch.Tensor) -> torch.Tensor:
        rows_SGJD = pool[case.block_table.long()].transpose(1, 2).flatten(2, 3)
        padded_SGJD = torch.nn.functional.pad(rows_SGJD, (0, 0, 0, length - rows_SGJD.shape[2]))
        return padded_SGJD.unflatten(2, (-1, block_size)).transpose(1, 2).flatten(0, 1)

    table = torch.arange(sequences * (length // block_size), dtype=torch.int32).reshape(sequences, -1)
    repacked = dataclasses.replace(
        case, key_pool=repack(case.key_pool), value_pool=repack(case.value_pool), block_table=table
    )
    kernels = CpuKernels(threads=2)
    assert same_bits(repacked.run(kernels), case.run(kernels))


@pytest.mark.parametrize("group", [1, 4, 6])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_every_instruction_set_gives_the_same_bits(group: int, softcap: float) -> None:
    case = make_case(rows=30, group=group, dim=44, value_dim=83, window=50, softcap=softcap, sinks=True)
    kernels, before, outs = CpuKernels(threads=2), _native.get_isa(), []
    for isa in _native.available_isas():
        _native.set_isa(isa)
        outs.append(case.run(kernels))
    _native.set_isa(before)
    assert all(same_bits(out, outs[0]) for out in outs)


def two_scores(scores: torch.Tensor, softcap: float = 0.0) -> torch.Tensor:
    """Each score's weight against one of 0: exp(score) / (1 + exp(score)), through the kernel's own exp and tanh."""
    rows = len(scores)
    keys = torch.stack((torch.zeros(rows), scores), 1).reshape(-1, 1, 1, 1)
    values = torch.tensor([0.0, 1.0]).repeat(rows).reshape(-1, 1, 1, 1)
    case = Case(
        query_THD=torch.ones(rows, 1, 1),
        key_pool=keys,
        value_pool=values,
        block_table=torch.arange(2 * rows, dtype=torch.int32).reshape(rows, 2),
        row_sequence=torch.arange(rows, dtype=torch.int32),
        row_position=torch.ones(rows, dtype=torch.int32),
        scale=1.0,
        softcap=softcap,
    )
    return case.run(CpuKernels(threads=2)).flatten()


def test_exp_is_accurate(isa: str) -> None:
    scores = torch.cat((torch.linspace(-87.0, 0.0, 4001), -torch.logspace(-20, 1, 500)))
    expected = torch.sigmoid(scores.double())
    assert ((two_scores(scores) - expected) / expected).abs().max() < 2.5e-7


def test_exp_underflows_to_zero(isa: str) -> None:
    scores = torch.tensor([-100.0, -103.0, -110.0, -1e30, -math.inf])
    expected = torch.exp(scores.double())
    assert bool(((two_scores(scores) - expected).abs() <= 2**-149).all())
    assert two_scores(scores)[-3:].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("softcap", [1.0, 30.0])
def test_softcap_is_accurate(isa: str, softcap: float) -> None:
    scores = -torch.cat((torch.logspace(-6, 3, 2000), torch.linspace(0, 2 * softcap, 2000)))
    expected = torch.sigmoid(softcap * torch.tanh(scores.double() / softcap))
    # An error in the capped score s shows as |s| times its relative error.
    assert ((two_scores(scores, softcap) - expected) / expected).abs().max() < (2 + softcap) * 3e-7


@pytest.mark.parametrize("where", ["query", "key", "value", "sink"])
def test_nan_spoils_only_what_reads_it(isa: str, where: str) -> None:
    case = make_case(rows=30, sequences=1, length=60, sinks=True)
    clean = case.run(CpuKernels(threads=2))
    assert not clean.isnan().any()
    spoilt_THDv = torch.zeros_like(clean, dtype=torch.bool)
    assert case.sinks_H is not None
    if where == "query":
        case.query_THD[7, 1, 3] = math.nan
        spoilt_THDv[7, 1] = True
    elif where == "sink":
        case.sinks_H[3] = math.nan
        spoilt_THDv[:, 3] = True
    else:
        sees_T = case.row_position >= 33
        block = case.block_table[0, 33 // 16]
        if where == "key":
            case.key_pool[block, 1, 33 % 16, 5] = math.nan
            spoilt_THDv[sees_T, 2:] = True
        else:
            case.value_pool[block, 1, 33 % 16, 5] = math.nan
            spoilt_THDv[sees_T, 2:, 5] = True
    out = case.run(CpuKernels(threads=2))
    assert torch.equal(out.isnan(), spoilt_THDv)
    assert torch.equal(out[~spoilt_THDv], clean[~spoilt_THDv])


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e6, -1e6])
def test_extreme_scales(isa: str, scale: float) -> None:
    case = dataclasses.replace(make_case(dim=8), scale=scale)
    out_THDv = case.run(CpuKernels(threads=2))
    expected_THDv = case.double().run(ReferenceKernels())
    # At a million times the score, weights are all or nothing unless two scores are within rounding of each other.
    close_THDv = (out_THDv - expected_THDv).abs() <= 1e-4
    assert close_THDv.double().mean() >= (0.97 if abs(scale) > 1 else 1.0)


def test_every_score_infinite_gives_nan_as_softmax_does(isa: str) -> None:
    assert two_scores(torch.tensor([math.inf])).isnan().all()


def test_query_may_be_strided(isa: str) -> None:
    case = make_case()
    strided = dataclasses.replace(case, query_THD=case.query_THD.transpose(0, 1).contiguous().transpose(0, 1))
    assert not strided.query_THD.is_contiguous()
    assert same_bits(strided.run(CpuKernels(threads=2)), case.run(CpuKernels(threads=2)))


@pytest.mark.parametrize("kernels", [CpuKernels(threads=2), ReferenceKernels()], ids=lambda kernels: str(kernels.name))
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("row_sequence", 2, "sequence 2"),
        ("row_sequence", -1, "sequence -1"),
        ("row_position", 112, "position 112"),
        ("row_position", -1, "position -1"),
        ("block_table", 15, "block"),
        ("block_table", -1, "block"),
    ],
)
def test_rows_outside_the_pool_are_refused(kernels: Kernels, field: str, value: int, message: str) -> None:
    case = make_case(rows=40)
    spoilt = getattr(case, field).clone()
    spoilt[-1 if spoilt.ndim == 1 else (1, 0)] = value
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(case, **{field: spoilt}).run(kernels)


def test_unneeded_blocks_may_hold_anything() -> None:
    case = make_case(rows=40, window=10)
    case = dataclasses.replace(case, row_position=case.row_position.clamp(32, 47))
    expected = case.run(CpuKernels(threads=2))
    table = case.block_table.clone()
    table[:, :1] = -7
    table[:, 3:] = 1_000_000
    assert same_bits(dataclasses.replace(case, block_table=table).run(CpuKernels(threads=2)), expected)


def test_bad_operands_are_refused() -> None:
    case = make_case()
    bad: list[dict[str, object]] = [
        {"query_THD": case.query_THD.double()},
        {"query_THD": case.query_THD[:, :3]},
        {"key_pool": case.key_pool[..., :5]},
        {"key_pool": case.key_pool[:2]},
        {"row_position": case.row_position.long()},
        {"row_position": case.row_position[:3]},
        {"block_table": case.block_table.T},
        {"sinks_H": torch.ones(3)},
        {"window": -1},
        {"softcap": -1.0},
    ]
    for change in bad:
        with pytest.raises(AssertionError):
            dataclasses.replace(case, **change).run(CpuKernels(threads=1))  # type: ignore[arg-type]
