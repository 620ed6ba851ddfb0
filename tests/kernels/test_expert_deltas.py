"""Experts of fine-tunes beside those of their base: the reference's bits, and a row's own whatever runs beside it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moestro import _native
from moestro.kernels.cpu import CpuKernels
from moestro.kernels.reference import ReferenceKernels
from moestro.kernels.specs import GATES, Encoding, ExpertDeltas, Gate
from moestro.quant import LEVELS
from moestro.quant.delta import DELTA_BITS
from packed_matrices import Experts, FineTune, Source, expert_deltas, random_experts, random_fine_tune

REFERENCE = ReferenceKernels()
PROPERTY = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TOKENS = 9
# Inputs this small keep activations of the random matrices in the range where every function does something.
INPUT_SCALE = 1e-3

Cuts = list[tuple[int, int]]
"""(rows, fine-tune or -1 for the base), one after another through a job's list."""


def run(
    kernels: CpuKernels | ReferenceKernels,
    experts: Experts,
    levels: list[int],
    rows: list[list[int]],
    hidden_TH: torch.Tensor,
    deltas: ExpertDeltas | None,
) -> torch.Tensor:
    jobs = experts.jobs(levels, rows, list(range(sum(map(len, rows)))))
    out_PH = torch.full((len(jobs.places), hidden_TH.shape[1]), -77.0)
    kernels.experts(experts.spec, jobs, hidden_TH, out_PH, deltas)
    return out_PH


def place(jobs: list[Cuts], tunes: list[FineTune]) -> ExpertDeltas:
    placed, first = [], 0
    for job, cuts in enumerate(jobs):
        for rows, tune in cuts:
            if tune >= 0:
                placed.append((job, first, first + rows, tune))
            first += rows
    return expert_deltas(tunes, placed[::-1])  # in no particular order


cuts = st.lists(st.tuples(st.integers(0, 4), st.integers(-1, 2)), max_size=4)


@PROPERTY
@given(
    encoding=st.sampled_from(["nested", "signs"]),
    gate=st.sampled_from(GATES),
    hidden=st.integers(1, 70) | st.sampled_from([128, 192]),
    width=st.integers(1, 70) | st.sampled_from([128, 200, 256]),
    changed=st.lists(
        st.tuples(
            st.sampled_from(DELTA_BITS),
            st.sampled_from([0.0, 0.05, 1.0]),
            st.booleans(),
            st.booleans(),
            st.booleans(),
        ),
        min_size=3,
        max_size=3,
    ),
    biased=st.booleans(),
    jobs=st.lists(cuts, min_size=1, max_size=3),
    levels=st.lists(st.sampled_from(LEVELS), min_size=3, max_size=3),
    threads=st.sampled_from([1, 2, 7]),
    seed=st.integers(0, 1000),
)
def test_bits_are_the_reference(
    isa: str,
    encoding: Encoding,
    gate: Gate,
    hidden: int,
    width: int,
    changed: list[tuple[int, float, bool, bool, bool]],
    biased: bool,
    jobs: list[Cuts],
    levels: list[int],
    threads: int,
    seed: int,
) -> None:
    source = Source(seed)
    experts = random_experts(
        source, len(jobs), encoding=encoding, hidden=hidden, width=width, gate=gate, activation="relu", biased=biased
    )
    tunes = [
        random_fine_tune(source, experts, bits=bits, share=share, up=up, down=down, biased=own_bias)
        for bits, share, up, down, own_bias in changed
    ]
    rows = [[(job + r) % TOKENS for r in range(sum(count for count, _ in each))] for job, each in enumerate(jobs)]
    hidden_TH, deltas = source.normal(TOKENS, hidden) * INPUT_SCALE, place(jobs, tunes)
    levels = levels[: len(jobs)]
    out_PH = run(CpuKernels(threads=threads), experts, levels, rows, hidden_TH, deltas)
    expected_PH = run(REFERENCE, experts, levels, rows, hidden_TH, deltas)
    torch.testing.assert_close(out_PH, expected_PH, rtol=0, atol=0, equal_nan=True)


def mixed(seed: int) -> tuple[Experts, list[FineTune], list[list[int]], list[Cuts], torch.Tensor]:
    """Three experts, one of them with more rows than are computed together, cut between fine-tunes."""
    source = Source(seed)
    experts = random_experts(
        source, 3, encoding="nested", hidden=160, width=136, gate="interleaved", activation="silu", biased=True
    )
    tunes = [
        random_fine_tune(source, experts, bits=2, share=0.02),
        random_fine_tune(source, experts, bits=1, share=0.1, biased=True),
        random_fine_tune(source, experts, bits=4, share=0.0, up=False),
    ]
    jobs: list[Cuts] = [[(50, 0), (5, -1), (70, 1), (25, 2)], [(1, 1)], [(2, -1), (3, 2)]]
    rows = [list(range(150)), [7], [3, 4, 5, 6, 6]]
    return experts, tunes, rows, jobs, source.normal(150, 160) * INPUT_SCALE


def test_same_bits_on_all_isas_and_threads() -> None:
    experts, tunes, rows, jobs, hidden_TH = mixed(1)
    outputs, before = [], _native.get_isa()
    for isa in _native.available_isas():
        _native.set_isa(isa)
        for threads in (1, 2, 5, 16):
            outputs.append(run(CpuKernels(threads=threads), experts, [4, 2, 8], rows, hidden_TH, place(jobs, tunes)))
    _native.set_isa(before)
    assert all(torch.equal(out_PH, outputs[0]) for out_PH in outputs)
    assert bool(outputs[0].isfinite().all())


def test_a_row_does_not_depend_on_other_rows_or_fine_tunes(isa: str) -> None:
    experts, tunes, rows, jobs, hidden_TH = mixed(2)
    kernels, levels = CpuKernels(threads=3), [4, 2, 8]
    together_PH = run(kernels, experts, levels, rows, hidden_TH, place(jobs, tunes))
    of_rows = [(job, tune) for job, each in enumerate(jobs) for count, tune in each for _ in range(count)]
    listed = [row for each in rows for row in each]
    for row in (0, 49, 50, 54, 55, 63, 64, 124, 125, 149, 150, 151, 152, 153, 155):
        job, tune = of_rows[row]
        one = Experts(experts.spec, (experts.planes[job],))
        own = [] if tune < 0 else [FineTune(tunes[tune].spec, (tunes[tune].planes[job],))]
        deltas = place([[(1, 0)]], own) if own else None
        alone_1H = run(kernels, one, [levels[job]], [[listed[row]]], hidden_TH, deltas)
        assert torch.equal(together_PH[row], alone_1H[0])


def test_rows_of_the_base_are_untouched(isa: str) -> None:
    experts, tunes, rows, jobs, hidden_TH = mixed(3)
    kernels = CpuKernels(threads=2)
    base_PH = run(kernels, experts, [4, 2, 8], rows, hidden_TH, None)
    out_PH = run(kernels, experts, [4, 2, 8], rows, hidden_TH, place(jobs, tunes))
    same = [bool(torch.equal(left, right)) for left, right in zip(base_PH, out_PH, strict=True)]
    assert same == [tune < 0 for each in jobs for count, tune in each for _ in range(count)]


def test_nan_spoils_its_row_only(isa: str) -> None:
    experts, tunes, rows, jobs, hidden_TH = mixed(4)
    kernels, deltas = CpuKernels(threads=2), place(jobs, tunes)
    clean_PH = run(kernels, experts, [4, 2, 8], rows, hidden_TH, deltas)
    hidden_TH[60, 3] = float("nan")
    out_PH = run(kernels, experts, [4, 2, 8], rows, hidden_TH, deltas)
    assert bool(out_PH[60].isnan().all())
    out_PH[60] = clean_PH[60]
    assert torch.equal(out_PH, clean_PH)


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"jobs": ints(0, 3)}, "delta 1 is of a job that does not exist"),
        ({"firsts": ints(0, 3)}, "delta 1 is on rows that are not its job's"),
        ({"ends": ints(2, 6)}, "delta 1 is on rows that are not its job's"),
        ({"firsts": ints(0, 1), "jobs": ints(0, 0), "ends": ints(2, 4)}, "two deltas are on the same rows"),
        ({"spec": ints(0, 2)}, "delta 1 has a shape that does not exist"),
        ({"spec": ints(0, 1)}, "delta 1 has another shape than the matrices"),
        ({"planes": np.zeros(2, dtype=np.int64)}, "delta 0 has no plane"),
        ({"planes": np.zeros(1, dtype=np.int64)}, "different lengths"),
    ],
)
def test_wrong_deltas_are_refused(changes: dict[str, np.ndarray], message: str) -> None:
    source = Source(5)
    experts, other = (
        random_experts(source, 2, encoding="nested", hidden=hidden, width=32, gate="none", activation="relu")
        for hidden in (32, 64)
    )
    tunes = [random_fine_tune(source, each, bits=2, share=0.1) for each in (experts, other)]
    good = expert_deltas(tunes, [(0, 0, 2, 0), (1, 4, 5, 0)])
    out_PH = torch.zeros(5, 32)
    jobs = experts.jobs([4, 4], [[0, 1, 2, 3], [4]], list(range(5)))
    deltas = dataclasses.replace(good, **changes)
    with pytest.raises(ValueError, match=message):
        CpuKernels(threads=1).experts(experts.spec, jobs, torch.ones(5, 32), out_PH, deltas)
    assert not bool(out_PH.any())
