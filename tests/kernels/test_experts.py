"""Experts from quantised planes: right, and the same bits whatever runs beside them."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moestro import _native
from moestro.kernels.cpu import CpuKernels, scratch_bytes
from moestro.kernels.reference import ReferenceKernels
from moestro.kernels.shapes import native_experts
from moestro.kernels.specs import ACTIVATIONS, GATES, ActivationName, Encoding, ExpertJobs, Gate
from moestro.quant import LEVELS
from packed_matrices import Experts, Source, random_experts

REFERENCE = ReferenceKernels()
PROPERTY = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TOKENS = 9
TESTS = Path(__file__).parents[1]
# Inputs this small keep activations of the random matrices in the range where every function does something.
INPUT_SCALE = 1e-3


def run(
    kernels: CpuKernels | ReferenceKernels, experts: Experts, jobs: ExpertJobs, hidden_TH: torch.Tensor
) -> torch.Tensor:
    out_PH = torch.full((len(jobs.places), hidden_TH.shape[1]), -77.0)
    kernels.experts(experts.spec, jobs, hidden_TH, out_PH)
    return out_PH


def make_jobs(experts: Experts, levels: list[int], rows: list[list[int]], seed: int) -> ExpertJobs:
    order = torch.randperm(sum(map(len, rows)), generator=torch.Generator().manual_seed(seed)).tolist()
    return experts.jobs(levels, rows, order)


rows_of_a_job = st.lists(st.integers(0, TOKENS - 1), max_size=12)


@PROPERTY
@given(
    encoding=st.sampled_from(["nested", "signs"]),
    gate=st.sampled_from(GATES),
    activation=st.sampled_from(["relu", "relu2"]),
    hidden=st.integers(1, 70) | st.sampled_from([128, 192]),
    width=st.integers(1, 70) | st.sampled_from([128, 200, 256]),
    biased=st.booleans(),
    rows=st.lists(rows_of_a_job, min_size=1, max_size=4),
    levels=st.lists(st.sampled_from(LEVELS), min_size=4, max_size=4),
    threads=st.sampled_from([1, 2, 7]),
    seed=st.integers(0, 1000),
)
def test_bits_are_the_reference(
    isa: str,
    encoding: Encoding,
    gate: Gate,
    activation: ActivationName,
    hidden: int,
    width: int,
    biased: bool,
    rows: list[list[int]],
    levels: list[int],
    threads: int,
    seed: int,
) -> None:
    """With activations that torch computes exactly, the whole MLP has the reference's bits."""
    source = Source(seed)
    experts = random_experts(
        source,
        len(rows),
        encoding=encoding,
        hidden=hidden,
        width=width,
        gate=gate,
        activation=activation,
        biased=biased,
    )
    jobs = make_jobs(experts, levels[: len(rows)], rows, seed)
    hidden_TH = source.normal(TOKENS, hidden) * INPUT_SCALE
    out_PH = run(CpuKernels(threads=threads), experts, jobs, hidden_TH)
    torch.testing.assert_close(out_PH, run(REFERENCE, experts, jobs, hidden_TH), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("activation", "gate"),
    [pair for pair in itertools.product(ACTIVATIONS, GATES) if pair != ("clamped_swiglu", "none")],
)
def test_every_activation_is_near_the_reference(isa: str, activation: ActivationName, gate: Gate) -> None:
    source = Source(7)
    experts = random_experts(
        source, 2, encoding="nested", hidden=96, width=72, gate=gate, activation=activation, biased=True
    )
    jobs = make_jobs(experts, [4, 8], [[0, 1, 2], [3, 3]], 1)
    hidden_TH = source.normal(TOKENS, 96) * INPUT_SCALE
    out_PH, expected_PH = run(CpuKernels(threads=2), experts, jobs, hidden_TH), run(REFERENCE, experts, jobs, hidden_TH)
    # An activation that differs in its last bit may be rounded to the next of 127 codes.
    assert float((out_PH - expected_PH).norm() / expected_PH.norm()) < 2e-3


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_to_the_last_bits(isa: str, activation: ActivationName) -> None:
    gate: Gate = "halves" if activation == "clamped_swiglu" else "none"
    experts = random_experts(Source(8), 1, encoding="nested", hidden=32, width=32, gate=gate, activation=activation)
    x = torch.cat((torch.linspace(-12, 12, 4001), torch.tensor([0.0, -0.0, 1e-30, 80.0, -80.0, float("nan"), 3.0])))
    up, out = torch.ones_like(x), torch.empty_like(x)
    names = (x, up) if gate == "halves" else (x, x)
    _native.activate(native_experts(experts.spec), names[0].data_ptr(), names[1].data_ptr(), len(x), out.data_ptr())
    wide = x.double()
    expected = {
        "silu": wide * torch.sigmoid(wide),
        "gelu": torch.nn.functional.gelu(wide),
        "gelu_tanh": torch.nn.functional.gelu(wide, approximate="tanh"),
        "gelu_quick": wide * torch.sigmoid(1.702 * wide),
        "relu": wide.relu(),
        "relu2": wide.relu().square(),
        "sigmoid": torch.sigmoid(wide),
        "clamped_swiglu": 1.8 * wide.clamp(max=0.8) * torch.sigmoid(1.702 * wide.clamp(max=0.8)),
    }[activation]
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=6e-7, equal_nan=True)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "clamped_swiglu"])
@pytest.mark.parametrize("encoding", ["nested", "signs"])
def test_same_bits_on_all_isas_and_threads(encoding: Encoding, activation: ActivationName) -> None:
    source = Source(9)
    experts = random_experts(
        source, 3, encoding=encoding, hidden=160, width=136, gate="interleaved", activation=activation, biased=True
    )
    jobs = make_jobs(experts, [2, 8, 4], [[0, 5], list(range(TOKENS)) * 8, [1]], 2)
    hidden_TH = source.normal(TOKENS, 160) * INPUT_SCALE
    outputs = []
    before = _native.get_isa()
    for isa in _native.available_isas():
        _native.set_isa(isa)
        outputs += [run(CpuKernels(threads=threads), experts, jobs, hidden_TH) for threads in (1, 2, 5, 16)]
    _native.set_isa(before)
    assert all(torch.equal(out_PH, outputs[0]) for out_PH in outputs)
    assert bool(outputs[0].isfinite().all())


def test_a_row_does_not_depend_on_other_rows_or_jobs(isa: str) -> None:
    source = Source(10)
    experts = random_experts(source, 3, encoding="nested", hidden=96, width=100, gate="halves", activation="silu")
    hidden_TH = source.normal(70, 96) * INPUT_SCALE
    kernels = CpuKernels(threads=3)
    rows = [list(range(70)), [3, 4], [5, 5, 69]]
    levels = [3, 8, 2]
    together_PH = run(kernels, experts, experts.jobs(levels, rows, list(range(75))), hidden_TH)
    place = 0
    for job, (level, listed) in enumerate(zip(levels, rows, strict=True)):
        one = Experts(experts.spec, (experts.planes[job],))
        for row in listed:
            alone_1H = run(kernels, one, one.jobs([level], [[row]], [0]), hidden_TH)
            assert torch.equal(together_PH[place], alone_1H[0])
            place += 1


def test_nan_and_infinity_spoil_their_rows_only(isa: str) -> None:
    source = Source(11)
    experts = random_experts(source, 2, encoding="nested", hidden=64, width=48, gate="halves", activation="silu")
    jobs = experts.jobs([4, 4], [[0, 1, 2], [2, 3]], [0, 1, 2, 3, 4])
    hidden_TH = source.normal(4, 64) * INPUT_SCALE
    kernels = CpuKernels(threads=2)
    clean_PH = run(kernels, experts, jobs, hidden_TH)
    hidden_TH[1, 5], hidden_TH[3, 63] = float("nan"), float("inf")
    out_PH = run(kernels, experts, jobs, hidden_TH)
    assert bool(out_PH[[1, 4]].isnan().all())
    assert torch.equal(out_PH[[0, 2, 3]], clean_PH[[0, 2, 3]])


def test_only_the_places_are_written() -> None:
    source = Source(12)
    experts = random_experts(source, 1, encoding="nested", hidden=40, width=32, gate="none", activation="relu")
    jobs = experts.jobs([2], [[1, 0]], [6, 2])
    wide = torch.full((8, 50), -77.0)
    CpuKernels(threads=2).experts(experts.spec, jobs, source.normal(2, 40), wide[:, :40])
    written = (wide != -77.0).any(1)
    assert written.tolist() == [False, False, True, False, False, False, True, False]
    assert bool((wide[:, 40:] == -77.0).all())


def test_no_jobs_and_jobs_without_rows() -> None:
    experts = random_experts(Source(13), 2, encoding="nested", hidden=32, width=32, gate="none", activation="relu")
    for jobs in (experts.jobs([], [], []), experts.jobs([4, 4], [[], []], [])):
        assert run(CpuKernels(threads=2), experts, jobs, torch.ones(1, 32)).shape == (0, 32)


def wrong_jobs(experts: Experts) -> dict[str, ExpertJobs]:
    good = experts.jobs([4, 4], [[0], [1]], [0, 1])
    absent = good.planes.copy()
    absent[1, 2] = 0

    def ints(*values: int) -> np.ndarray:
        return np.array(values, dtype=np.int32)

    return {
        r"level 5": dataclasses.replace(good, levels=ints(4, 5)),
        r"needs plane 2": dataclasses.replace(good, planes=absent),
        r"rows\[1\] is 2": dataclasses.replace(good, rows=ints(0, 2)),
        r"places\[0\] is -1": dataclasses.replace(good, places=ints(-1, 1)),
        r"starts of job 1": dataclasses.replace(good, starts=ints(0, 3, 2)),
        r"starts do not span": dataclasses.replace(good, starts=ints(0, 1, 1)),
        r"different lengths": dataclasses.replace(good, places=ints(0, 1, 2)),
    }


def test_wrong_jobs_are_refused() -> None:
    experts = random_experts(Source(14), 2, encoding="nested", hidden=32, width=32, gate="none", activation="relu")
    for message, jobs in wrong_jobs(experts).items():
        out_PH = torch.zeros(2, 32)
        with pytest.raises(ValueError, match=message):
            CpuKernels(threads=1).experts(experts.spec, jobs, torch.ones(2, 32), out_PH)
        assert not bool(out_PH.any())


def test_scratch_stays_within_what_is_planned() -> None:
    """In a process of its own, where nothing has used the pool before."""
    program = """
import torch
from packed_matrices import Source, random_experts
from moestro import _native
from moestro.kernels.cpu import CpuKernels, scratch_bytes
source = Source(1)
experts = random_experts(source, 3, encoding="nested", hidden=256, width=192, gate="halves", activation="silu")
for threads, tokens in ((1, 1), (2, 1), (6, 1), (6, 40)):
    rows = [list(range(tokens))] * 3
    kernels = CpuKernels(threads=threads)
    jobs = experts.jobs([4, 4, 4], rows, list(range(3 * tokens)))
    kernels.experts(experts.spec, jobs, source.normal(tokens, 256), torch.empty(3 * tokens, 256))
    planned = scratch_bytes(
        threads=threads, positions=1, value_dim=1, rows=tokens, top_k=3, hidden=256, expert_width=192
    )
    held = _native.scratch_bytes()
    assert 0 < held <= planned, (threads, tokens, held, planned)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=TESTS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_planned_scratch_counts_the_rows() -> None:
    common = {"threads": 2, "positions": 1, "value_dim": 1}
    without = scratch_bytes(**common)
    small = scratch_bytes(**common, rows=256, top_k=8, hidden=2048, expert_width=1024)
    large = scratch_bytes(**common, rows=512, top_k=8, hidden=2048, expert_width=1024)
    assert without < small < large < small + 256 * (2048 + 8 * 1024) * 1.2
    assert scratch_bytes(**common, rows=512, dense_width=1 << 20) > 512 << 20
