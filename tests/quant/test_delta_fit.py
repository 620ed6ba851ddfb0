"""Deltas whose codes keep outputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from moestro.quant.delta_codes import fit_codes
from moestro.quant.delta_fit import choose_channels, fit_outputs


def _case(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A delta, and inputs that have directions and a few large channels."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn((columns, columns), generator=generator) / columns**0.5 + torch.eye(columns)
    inputs = torch.randn((4 * columns, columns), generator=generator) @ mix
    inputs[:, :: max(1, columns // 3)] *= 6
    return torch.randn((rows, columns), generator=generator) * 1e-3, inputs


def _cost(inputs: torch.Tensor, delta: torch.Tensor, found: torch.Tensor) -> float:
    """How far outputs point away from where they should: the square of a sine."""
    wanted, outputs = (inputs @ one.T for one in (delta, found))
    along = (wanted * outputs).sum()
    return float(1 - along.square() / (wanted.square().sum() * outputs.square().sum().clamp_min(1e-30)))


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("kept", [0, 3])
def test_outputs_are_nearer_than_with_plain_codes(bits: int, kept: int) -> None:
    delta, inputs = _case(48, 256)
    hessian = inputs.T @ inputs / len(inputs)
    channels = choose_channels(delta, bits, kept, hessian)
    assert channels.tolist() == sorted(set(channels.tolist()))
    assert len(channels) == kept
    plain = fit_codes(delta, bits, channels).decoded(bits)
    fitted = fit_outputs(delta, bits, channels, hessian).decoded(bits)
    assert _cost(inputs, delta, fitted) < {1: 0.95, 2: 0.8, 4: 0.8}[bits] * _cost(inputs, delta, plain)


def test_kept_channels_are_those_that_cost_most() -> None:
    delta, inputs = _case(32, 128)
    inputs[:, 77] *= 100
    assert 77 in choose_channels(delta, 2, 1, inputs.T @ inputs).tolist()
    delta[:, 5] *= 100
    assert choose_channels(delta, 2, 1, None).tolist() == [5]


def test_kept_channels_make_up_for_others() -> None:
    delta, inputs = _case(32, 128)
    hessian = inputs.T @ inputs / len(inputs)
    channels = choose_channels(delta, 1, 4, hessian)
    parts = fit_outputs(delta, 1, channels, hessian)
    alone = parts.decoded(1)
    alone[:, channels.long()] = delta[:, channels.long()]
    assert _cost(inputs, delta, parts.decoded(1)) < _cost(inputs, delta, alone)


@example(rows=1, columns=149, bits=2, kept=0)
@given(rows=st.integers(1, 20), columns=st.integers(1, 150), bits=st.sampled_from([1, 2, 4]), kept=st.integers(0, 3))
def test_any_shape(rows: int, columns: int, bits: int, kept: int) -> None:
    delta, inputs = _case(rows, columns)
    hessian = inputs.T @ inputs / len(inputs)
    parts = fit_outputs(delta, bits, choose_channels(delta, bits, min(kept, columns), hessian), hessian)
    assert parts.code_NK.shape == (rows, columns)
    assert int(parts.code_NK.max()) < 2**bits
    found = parts.decoded(bits)
    assert found.isfinite().all()
    assert _cost(inputs, delta, found) < 1.05


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_inputs_without_anything_leave_plain_codes(bits: int) -> None:
    delta, _ = _case(16, 64)
    channels = choose_channels(delta, bits, 2, torch.zeros(64, 64))
    fitted = fit_outputs(delta, bits, channels, torch.zeros(64, 64))
    assert torch.equal(fitted.code_NK, fit_codes(delta, bits, channels).code_NK)
    assert torch.equal(fitted.decoded(bits), fit_outputs(delta, bits, channels, None).decoded(bits))
    assert not fit_outputs(torch.zeros(16, 64), bits, channels, torch.eye(64)).decoded(bits).any()


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("calibrated", [False, True])
def test_rows_keep_their_size_along_themselves(bits: int, calibrated: bool) -> None:
    delta, inputs = _case(32, 128)
    hessian = inputs.T @ inputs if calibrated else None
    found = fit_outputs(delta, bits, choose_channels(delta, bits, 3, hessian), hessian).decoded(bits)
    torch.testing.assert_close((found * delta).sum(1), delta.square().sum(1), rtol=5e-3, atol=0)
