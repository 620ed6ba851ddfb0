"""Codes of a delta that keep a linear map's outputs: errors are pushed into later columns, steps solved for exactly.

A kept channel's values are free, so whatever the codes of the other columns leave over is pushed into them in the end.
What then matters of the others is the Hessian without the kept channels' part (its Schur complement).

Shapes: N rows (outputs), K columns (inputs) filled up to whole groups, G groups, C channels that are kept, R others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from moestro.quant.codes import LEVELS
from moestro.quant.delta_codes import DeltaParts, fit_codes, largest_channels
from moestro.quant.grid import spread
from moestro.quant.groups import group_size, padded_columns, padded_rows
from moestro.quant.hessian import DAMPING, compensation, importance
from moestro.quant.rounding import Compensation, Rule, round_compensated

_ROUNDS = 3
"""How often codes are chosen and steps solved for. Measured on deltas of fine-tunes of the built-in model at 2 bits:
with one round, 4 points in 1000 less of the fine-tune's gain."""

_SWEEPS = 2
_ROWS = 256
"""Rows whose steps are solved for at once: they bound the memory."""

_RIDGE = 1e-5
_MOST = 60000.0
"""Nearly the largest number of fp16."""

_MOST_LONGER = 2.0
"""Rows are made longer by at most this, however little their codes say."""


@dataclass(frozen=True)
class _Aim:
    """What codes are to come near to, in units, and how errors count: `hessian_KK` has nothing to do with columns
    that are kept; `push_RC` is what errors of others are worth in kept ones, `rest_R` their places."""

    group: int
    target_NK: torch.Tensor
    hessian_KK: torch.Tensor
    how: Compensation
    rest_R: torch.Tensor
    push_RC: torch.Tensor


def choose_channels(delta_NK: torch.Tensor, bits: int, count: int, hessian_KK: torch.Tensor | None) -> torch.Tensor:
    """The channels to keep, int32 [C] ascending: those in which plain codes cost the outputs most.

    The error of channel j is that of its codes, squared, times the mean square of its inputs (ME-Switch,
    arXiv 2406.09041); without a Hessian all inputs are alike.
    """
    nothing = torch.empty(0, dtype=torch.int32)
    if not count:
        return nothing
    weight_K = importance(hessian_KK, delta_NK.shape[1])
    codes_NK = fit_codes(delta_NK, bits, nothing).decoded(bits)
    return largest_channels((codes_NK - delta_NK).square().sum(0) * weight_K, count)


def fit_outputs(delta_NK: torch.Tensor, bits: int, kept_C: torch.Tensor, hessian_KK: torch.Tensor | None) -> DeltaParts:
    """Codes, steps and kept values that keep the outputs for inputs whose mean of x x^T is the Hessian, and their size.

    Without a Hessian, or with an empty one, they keep the values themselves.
    """
    if hessian_KK is None or not bool(hessian_KK.any()) or not bool(delta_NK.any()):
        return _sized(fit_codes(delta_NK, bits, kept_C), delta_NK, bits)
    columns = delta_NK.shape[1]
    aim = _aim(delta_NK, kept_C, hessian_KK)
    weight_K = aim.hessian_KK.diagonal()[:columns].float()
    parts = fit_codes(delta_NK, bits, kept_C, weight_K / weight_K.mean())
    aim = replace(aim, target_NK=aim.target_NK / parts.unit)
    scale_NG, middle_NG = parts.scale_NG.float(), parts.middle_NG.float()
    for _ in range(_ROUNDS):
        code_NK = _round(aim, scale_NG, middle_NG, bits)
        scale_NG, middle_NG = _solve_steps(aim, code_NK, bits)
        # What fp16 makes of them is what later codes are chosen for, and codes ascend with their values.
        scale_NG = scale_NG.abs().clamp(max=_MOST).half().float()
        middle_NG = middle_NG.clamp(-_MOST, _MOST).half().float()
    code_NK = _round(aim, scale_NG, middle_NG, bits)[:, :columns].contiguous()
    parts = replace(parts, code_NK=code_NK, scale_NG=scale_NG.half(), middle_NG=middle_NG.half())
    return _sized(_with_values(parts, delta_NK, bits, aim), delta_NK, bits)


def _aim(delta_NK: torch.Tensor, kept_C: torch.Tensor, hessian_KK: torch.Tensor) -> _Aim:
    columns = delta_NK.shape[1]
    extra = padded_columns(columns) - columns
    damped_KK = functional.pad(hessian_KK.double(), (0, extra, 0, extra))
    damped_KK.diagonal().add_(float(hessian_KK.diagonal().double().mean()) * DAMPING)
    kept = kept_C.long()
    is_kept_K = torch.zeros(len(damped_KK), dtype=torch.bool)
    is_kept_K[kept] = True
    rest_R = (~is_kept_K).nonzero()[:, 0]
    cross_CR = damped_KK[kept][:, rest_R]
    push_CR = torch.linalg.solve(damped_KK[kept][:, kept], cross_CR) if len(kept) else cross_CR
    left_RR = damped_KK[rest_R][:, rest_R] - cross_CR.T @ push_CR
    alone_KK = torch.zeros_like(damped_KK)
    alone_KK[rest_R.unsqueeze(1), rest_R] = left_RR
    alone_KK[kept, kept] = float(left_RR.diagonal().mean()) * DAMPING
    how = compensation(alone_KK, len(alone_KK))
    assert how is not None
    target_NK = functional.pad(delta_NK, (0, extra))
    return _Aim(group_size(columns), target_NK, alone_KK.float(), how, rest_R, push_CR.T.float().contiguous())


def _round(aim: _Aim, scale_NG: torch.Tensor, middle_NG: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes, uint8 [N, K], for these steps."""
    group = aim.group
    offset_NK = aim.target_NK - spread(middle_NG, group)
    if bits == 1:
        return _round_signs(offset_NK, spread(scale_NG, group), aim.how)
    # A chain that cares for one level only has just that level's codes.
    # Rounding wants more than one row: strides of a single one are no matter to torch, and are to it.
    rows = len(offset_NK)
    extra = (0, 0, 0, padded_rows(rows) - rows)
    rule = Rule([functional.pad(scale_NG, extra).contiguous()], {bits: 1.0}, {bits: 1.0}, 0, 0)
    offsets = [functional.pad(offset_NK, extra)] * len(LEVELS)
    return round_compensated(offsets, rule, group, aim.how, sweeps=_SWEEPS).code_NK[:rows] >> (4 - bits)


def _round_signs(offset_NK: torch.Tensor, scale_NK: torch.Tensor, how: Compensation) -> torch.Tensor:
    """Codes of one bit, column after column."""
    left_NK, half_NK = offset_NK[:, how.order_K].clone(), scale_NK[:, how.order_K] / 2
    aim_NK = left_NK.clone()
    positive_NK = torch.empty(left_NK.shape, dtype=torch.bool)
    for column in range(left_NK.shape[1]):
        positive_NK[:, column] = left_NK[:, column] >= 0
        value_N = torch.where(positive_NK[:, column], half_NK[:, column], -half_NK[:, column])
        error_N1 = (value_N - aim_NK[:, column]).unsqueeze(1)
        left_NK[:, column + 1 :] -= error_N1 * how.feedback_KK[column, column + 1 :]
    return positive_NK[:, how.order_K.argsort()].to(torch.uint8)


def _solve_steps(aim: _Aim, code_NK: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and middles [N, G] with the least error of outputs for these codes."""
    group = aim.group
    count = code_NK.shape[1] // group
    ones_GK = torch.eye(count).repeat_interleave(group, dim=1) @ aim.hessian_KK
    solved = []
    for start in range(0, len(code_NK), _ROWS):
        target_NK = aim.target_NK[start : start + _ROWS]
        position_NK = code_NK[start : start + _ROWS].float() - (2**bits - 1) / 2
        rows = len(position_NK)
        matrix_NUU = torch.empty((rows, 2 * count, 2 * count))
        wanted_NU = torch.empty((rows, 2 * count))
        for place in range(count):
            own = slice(place * group, (place + 1) * group)
            along_NK = position_NK[:, own] @ aim.hessian_KK[own]
            matrix_NUU[:, place, :count] = (along_NK * position_NK).view(rows, count, group).sum(-1)
            matrix_NUU[:, place, count:] = along_NK.view(rows, count, group).sum(-1)
            matrix_NUU[:, count:, place] = matrix_NUU[:, place, count:]
            matrix_NUU[:, count + place, count:] = ones_GK[place].view(count, group).sum(-1)
            wanted_NU[:, place] = (along_NK * target_NK).sum(-1)
        wanted_NU[:, count:] = target_NK @ ones_GK.T
        matrix_NUU = matrix_NUU.double()
        diagonal_NU = matrix_NUU.diagonal(dim1=1, dim2=2)
        diagonal_NU.add_(diagonal_NU.mean(-1, keepdim=True) * _RIDGE + 1e-30)
        solved.append(torch.linalg.solve(matrix_NUU, wanted_NU.double()).float())
    solved_NU = torch.cat(solved)
    return solved_NU[:, :count].contiguous(), solved_NU[:, count:].contiguous()


def _with_values(parts: DeltaParts, delta_NK: torch.Tensor, bits: int, aim: _Aim) -> DeltaParts:
    """The values of kept channels: their own, and what makes up for the errors of the others."""
    codes_NK = parts.decoded_codes(bits)
    kept = parts.kept_C.long()
    columns = delta_NK.shape[1]
    inside_R = aim.rest_R < columns
    error_NR = (codes_NK - delta_NK)[:, aim.rest_R[inside_R]]
    value_NC = delta_NK[:, kept] - codes_NK[:, kept] - error_NR @ aim.push_RC[inside_R]
    return replace(parts, value_CN=value_NC.T.half().contiguous())


def _sized(parts: DeltaParts, delta_NK: torch.Tensor, bits: int) -> DeltaParts:
    """The same with every row as large along the difference itself as that is.

    Least squares makes all rows too short, by 6% at 2 bits, and all of them towards the base. Measured on the Python
    fine-tune of the built-in model at 2 bits (1 bit): .967 (.913) of its gain as they are, .974 (.932) when sizes are
    those of the outputs, whose largest part hardly tells tokens apart, .988 (.958) with these.
    """
    found_N = (parts.decoded(bits) * delta_NK).sum(1)
    factor_N = torch.where(found_N > 0, delta_NK.square().sum(1) / found_N.clamp_min(1e-30), 1.0)
    factor_N1 = factor_N.clamp(1 / _MOST_LONGER, _MOST_LONGER).unsqueeze(1)
    return replace(
        parts,
        scale_NG=(parts.scale_NG.float() * factor_N1).clamp(max=_MOST).half(),
        middle_NG=(parts.middle_NG.float() * factor_N1).clamp(-_MOST, _MOST).half(),
        value_CN=(parts.value_CN.float() * factor_N1.T).half(),
    )
