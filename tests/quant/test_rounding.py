"""The compiled loops against plain torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moestro import _native
from moestro.quant.codes import LEVELS, Codes
from moestro.quant.grid import Grid, positions
from moestro.quant.hessian import compensation
from moestro.quant.rounding import Compensation, Rule, descend, round_compensated, round_nearest

GROUP = 32
PRIORITIES = {2: 0.5, 3: 1.0, 4: 3.0, 8: 60.0}
STEPS = {2: 4.1, 3: 2.05, 4: 1.0, 8: 1 / 32}


def case(rows: int = 20, columns: int = 96) -> tuple[torch.Tensor, Grid, Rule]:
    generator = torch.Generator().manual_seed(3)
    offset = torch.randn((rows, columns), generator=generator)
    scale = (offset.view(rows, -1, GROUP).abs().amax(-1) / 7).half()
    grid = Grid(scale, torch.zeros_like(scale), 1.0, STEPS)
    return offset, grid, Rule([grid.real_scale_NG], STEPS, PRIORITIES, grid.hi, grid.lo)


def values_of(codes: Codes, grid: Grid) -> torch.Tensor:
    scale = grid.real_scale_NG.repeat_interleave(GROUP, dim=1)
    return torch.stack([scale * STEPS[level] * positions(codes, level, grid) for level in LEVELS])


def costs(targets: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Weighted squared error of all 256 codes, [256, N, K]."""
    found = []
    for code in range(256):
        codes = Codes(
            torch.full(targets.shape[1:], code >> 4, dtype=torch.uint8),
            torch.full(targets.shape[1:], code & 15, dtype=torch.uint8),
        )
        errors = (targets - values_of(codes, grid)).square()
        found.append(sum(PRIORITIES[level] * error for level, error in zip(LEVELS, errors, strict=True)))
    return torch.stack(found)


def objective(codes: Codes, offset: torch.Tensor, grid: Grid, hessian: torch.Tensor) -> float:
    errors = offset - values_of(codes, grid)
    return sum(
        PRIORITIES[level] * float(((error @ hessian) * error).sum())
        for level, error in zip(LEVELS, errors, strict=True)
    )


def compensated(offset: torch.Tensor, rule: Rule, how: Compensation, *, sweeps: int) -> Codes:
    return round_compensated([offset] * len(LEVELS), rule, GROUP, how, sweeps=sweeps)


def hessian_of(columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn((400, columns), generator=generator) @ torch.randn((columns, columns), generator=generator)
    return inputs.T @ inputs


def test_nearest_codes_have_the_least_cost_of_all() -> None:
    offset, grid, rule = case()
    codes = round_nearest(offset, rule, GROUP)
    chosen = (codes.code_NK.long() << 4 | codes.nibble_NK.long())[None]
    all_costs = costs(offset.expand(len(LEVELS), *offset.shape), grid)
    torch.testing.assert_close(all_costs.gather(0, chosen)[0], all_costs.amin(0), rtol=1e-4, atol=1e-6)


def test_compensation_and_sweeps_lower_the_error_of_outputs() -> None:
    offset, grid, rule = case(columns=160)
    hessian = hessian_of(160)
    how = compensation(hessian, 160)
    assert how is not None
    nearest = round_nearest(offset, rule, GROUP)
    pushed, swept = compensated(offset, rule, how, sweeps=0), compensated(offset, rule, how, sweeps=1)
    order = [objective(codes, offset, grid, hessian) for codes in (nearest, pushed, swept)]
    assert order[1] < 0.9 * order[0]
    assert order[2] < order[1]


def test_no_single_code_can_be_bettered_after_many_sweeps() -> None:
    offset, grid, rule = case(rows=5, columns=64)
    how = compensation(hessian_of(64), 64)
    assert how is not None
    codes = compensated(offset, rule, how, sweeps=30)
    back = how.order_K.argsort()
    hessian = how.hessian_KK[back][:, back]
    values = values_of(codes, grid)
    targets = values + ((offset - values) @ hessian) / hessian.diagonal()
    targets[-1] = offset  # whose errors are not pushed on
    chosen = (codes.code_NK.long() << 4 | codes.nibble_NK.long())[None]
    all_costs = costs(targets, grid)
    torch.testing.assert_close(all_costs.gather(0, chosen)[0], all_costs.amin(0), rtol=1e-3, atol=1e-4)


def descended(
    codes: Codes, offset: torch.Tensor, grid: Grid, hessian: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Code and nibble as one number [N, K], and values [B, N, K], after one sweep in plain torch."""
    values = values_of(codes, grid)
    chosen = codes.code_NK.long() << 4 | codes.nibble_NK.long()
    for column in range(offset.shape[1]):
        targets = values + ((offset - values) @ hessian) / hessian.diagonal()
        targets[-1] = offset  # whose errors are not pushed on
        chosen[:, column] = costs(targets, grid)[:, :, column].argmin(0)
        values = values_of(Codes((chosen >> 4).byte(), (chosen & 15).byte()), grid)
    return chosen, values


@pytest.mark.parametrize("rows", [8, 21])
def test_a_sweep_is_coordinate_descent_and_keeps_its_books(rows: int) -> None:
    offset, grid, rule = case(rows=rows, columns=64)
    how = compensation(hessian_of(64), 64)
    assert how is not None
    how = replace(how, order_K=torch.arange(64), hessian_KK=hessian_of(64))
    codes = round_nearest(offset, rule, GROUP)
    wanted, wanted_values = descended(codes, offset, grid, how.hessian_KK)
    aims, group_of = offset.expand(len(LEVELS), *offset.shape).contiguous(), how.groups_of(GROUP)
    values = rule.values(codes, group_of)
    downhill = (aims[:3] - values) @ how.hessian_KK
    descend(codes, aims, values, downhill, rule, how, group_of)
    found = codes.code_NK.long() << 4 | codes.nibble_NK.long()
    assert float((found != wanted).float().mean()) < 0.01  # where two codes cost the same but for roundings
    torch.testing.assert_close(values, rule.values(codes, group_of), rtol=0, atol=0)
    torch.testing.assert_close(downhill, (aims[:3] - values) @ how.hessian_KK, rtol=1e-4, atol=1e-2)
    assert (values != wanted_values[:3]).float().mean() < 0.01


@pytest.mark.parametrize("signs", [False, True])
def test_every_instruction_set_and_thread_count_gives_the_same_codes(signs: bool) -> None:
    offset, grid, rule = case(rows=37, columns=160)
    if signs:
        scale = grid.real_scale_NG
        rule = Rule([scale, scale, scale / 2, scale / 16], {2: 3.0}, PRIORITIES, 0, 0)
    how = compensation(hessian_of(160), 160)
    assert how is not None
    found = []
    for isa in _native.available_isas():
        for threads in (1, 3):
            _native.set_isa(isa)
            _native.set_threads(threads)
            found.append(compensated(offset, rule, how, sweeps=0 if signs else 2))
    _native.set_isa(_native.available_isas()[0])
    assert all(torch.equal(found[0].code_NK, codes.code_NK) for codes in found)
    assert all(torch.equal(found[0].nibble_NK, codes.nibble_NK) for codes in found)
