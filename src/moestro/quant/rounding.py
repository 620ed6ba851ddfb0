"""Codes whose every prefix is a good code: rounding that looks at all levels at once, with compensation of errors.

Columns are rounded one after another. Each level aims at a copy of the weights of its own, into whose later columns the
errors that it made so far are pushed, as GPTQ does (arXiv 2210.17323) for one level. Of nested codes, a column's is the
one of the 16 whose errors, weighted over levels, are least together: where a weight lies between two cells of a low
level almost any side will do for that level, and the high levels decide. Sign planes take the nearer side, plane by
plane. Sweeps of coordinate descent then choose every code again, all others given. The loops over columns are compiled
(csrc/rounding.cpp).

Shapes: B = 4 levels, N rows, K columns, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from moestro import _native
from moestro.quant.codes import LEVELS, Codes

BLOCK = 128
"""Columns that are rounded before their errors are pushed into all others at once."""


@dataclass(frozen=True)
class Compensation:
    """How errors are pushed into other columns, in the order `order_K` in which columns are rounded.

    `hessian_KK` is the damped Hessian in that order, `root_KK` is upper triangular, R^T R the Hessian's inverse.
    """

    order_K: torch.Tensor
    hessian_KK: torch.Tensor
    root_KK: torch.Tensor


@dataclass(frozen=True)
class Rule:
    """What a code stands for: `scales_NG` of the planes (one for nested codes), the levels' steps in scales, and for
    8 bits the two integers that join code and nibble. `priorities` weighs the levels' squared errors."""

    scales_NG: Sequence[torch.Tensor]
    steps: Mapping[int, float]
    priorities: Mapping[int, float]
    hi: int
    lo: int


def round_nearest(offset_NK: torch.Tensor, rule: Rule, group: int) -> Codes:
    """Codes of the weights for their own sake. `offset_NK` is their distance from the middles of their groups, fp32."""
    targets_BNK = offset_NK.expand(len(LEVELS), *offset_NK.shape)
    group_of_K = torch.arange(offset_NK.shape[1]) // group
    return _round_block(targets_BNK, rule, group_of_K)[0]


def round_compensated(offset_NK: torch.Tensor, rule: Rule, group: int, compensation: Compensation) -> Codes:
    """Codes that push the error of each column into those that come after it."""
    columns, order_K = offset_NK.shape[1], compensation.order_K
    targets_BNK = offset_NK[:, order_K].repeat(len(LEVELS), 1, 1)
    parts = []
    for block in _blocks(columns):
        root_KK = compensation.root_KK[block]
        codes, errors_BNK = _round_block(targets_BNK[:, :, block], rule, order_K[block] // group, root_KK[:, block])
        parts.append(codes)
        targets_BNK[:, :, block.stop :] -= errors_BNK @ root_KK[:, block.stop :]
    return _in_place(parts, order_K)


def improve(
    offset_NK: torch.Tensor,
    values_BNK: torch.Tensor,
    rule: Rule,
    group: int,
    compensation: Compensation,
) -> Codes:
    """One sweep of coordinate descent over codes that stand for `values_BNK` (from the middles of their groups)."""
    columns, order_K = offset_NK.shape[1], compensation.order_K
    hessian_KK = compensation.hessian_KK
    values_BNK = values_BNK[:, :, order_K].contiguous()
    gradient_BNK = (offset_NK[:, order_K] - values_BNK) @ hessian_KK
    parts = []
    for block in _blocks(columns):
        diagonal_K = hessian_KK.diagonal()[block]
        old_BNK = values_BNK[:, :, block].contiguous()
        targets_BNK = old_BNK + gradient_BNK[:, :, block] / diagonal_K
        pushes_KK = (hessian_KK[block, block] / diagonal_K).contiguous()
        codes, errors_BNK = _round_block(targets_BNK, rule, order_K[block] // group, pushes_KK, old_BNK)
        parts.append(codes)
        gradient_BNK -= errors_BNK @ hessian_KK[block]
    return _in_place(parts, order_K)


def _blocks(columns: int) -> list[slice]:
    return [slice(start, min(start + BLOCK, columns)) for start in range(0, columns, BLOCK)]


def _in_place(parts: Sequence[Codes], order_K: torch.Tensor) -> Codes:
    """Codes of blocks in rounding order, back in the order of the columns."""
    back_K = order_K.argsort()
    code_NK = torch.cat([part.code_NK for part in parts], dim=1)
    nibble_NK = torch.cat([part.nibble_NK for part in parts], dim=1)
    return Codes(code_NK[:, back_K], nibble_NK[:, back_K])


def _round_block(
    targets_BNK: torch.Tensor,
    rule: Rule,
    group_of_K: torch.Tensor,
    pushes_KK: torch.Tensor | None = None,
    old_BNK: torch.Tensor | None = None,
) -> tuple[Codes, torch.Tensor]:
    """Codes of one block, and the errors that are left to push into the other columns."""
    _, rows, columns = targets_BNK.shape
    assert targets_BNK.stride(2) == 1 or columns == 1
    assert old_BNK is None or old_BNK.stride() == targets_BNK.stride()
    code_NK, nibble_NK = torch.empty((2, rows, columns), dtype=torch.uint8)
    errors_BNK = torch.empty(targets_BNK.shape if pushes_KK is not None else (0,))
    scales = [scale.contiguous() for scale in rule.scales_NG]
    group_of = group_of_K.to(torch.int32)
    _native.round_columns(
        targets_BNK.data_ptr(),
        targets_BNK.stride(0),
        targets_BNK.stride(1),
        [scale.data_ptr() for scale in scales] + [0] * (len(LEVELS) - len(scales)),
        scales[0].shape[1],
        group_of.data_ptr(),
        0 if pushes_KK is None else pushes_KK.data_ptr(),
        0 if pushes_KK is None else pushes_KK.stride(0),
        0 if old_BNK is None else old_BNK.data_ptr(),
        errors_BNK.data_ptr(),
        code_NK.data_ptr(),
        nibble_NK.data_ptr(),
        [rule.steps.get(level, 0.0) for level in LEVELS],
        [rule.priorities.get(level, 0.0) for level in LEVELS],
        rule.hi,
        rule.lo,
        len(scales) > 1,
        rows,
        columns,
    )
    return Codes(code_NK, nibble_NK), errors_BNK
