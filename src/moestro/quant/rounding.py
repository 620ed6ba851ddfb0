"""Codes whose every prefix is a good code: rounding that looks at all levels at once, with compensation of errors.

Columns are rounded one after another. Each level aims at a copy of the weights of its own, into whose later columns the
errors that it made so far are pushed, as GPTQ does (arXiv 2210.17323) for one level. Of nested codes, a column's is the
one of the 16 whose errors, weighted over levels, are least together: where a weight lies between two cells of a low
level almost any side will do for that level, and the high levels decide. Sign planes take the nearer side, plane by
plane. The loop over columns is compiled (csrc/rounding.cpp).

Shapes: B = 4 levels, N rows, K columns, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from moestro import _native
from moestro.quant.codes import LEVELS, Codes

BLOCK = 128
"""Columns that are rounded before their errors are pushed into all later ones at once."""


@dataclass(frozen=True)
class Compensation:
    """How errors are pushed into later columns.

    `order_K` is the order in which columns are rounded; `root_KK` is upper triangular, R^T R the inverse of the
    Hessian in that order.
    """

    order_K: torch.Tensor
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


def round_columns(offset_NK: torch.Tensor, rule: Rule, group: int, compensation: Compensation | None) -> Codes:
    """Codes of the weights, given as their distance from the middles of their groups (fp32)."""
    rows, columns = offset_NK.shape
    code_NK, nibble_NK = torch.empty((2, rows, columns), dtype=torch.uint8)
    order_K = torch.arange(columns) if compensation is None else compensation.order_K
    targets_BNK = offset_NK[:, order_K].expand(len(LEVELS), rows, columns)
    if compensation is not None:
        targets_BNK = targets_BNK.contiguous()
    for start in range(0, columns, BLOCK):
        block = slice(start, min(start + BLOCK, columns))
        root_KK = None if compensation is None else compensation.root_KK[block, block]
        codes, errors_BNK = _round_block(targets_BNK[:, :, block], rule, order_K[block] // group, root_KK)
        code_NK[:, order_K[block]], nibble_NK[:, order_K[block]] = codes.code_NK, codes.nibble_NK
        if compensation is not None and block.stop < columns:
            later = slice(block.stop, columns)
            flat = errors_BNK.view(-1, block.stop - start) @ compensation.root_KK[block, later]
            targets_BNK[:, :, later] -= flat.view(len(LEVELS), rows, -1)
    return Codes(code_NK, nibble_NK)


def _round_block(
    targets_BNK: torch.Tensor, rule: Rule, group_of_K: torch.Tensor, root_KK: torch.Tensor | None
) -> tuple[Codes, torch.Tensor]:
    """Codes of one block, and the errors that are left to push into the columns after it."""
    _, rows, columns = targets_BNK.shape
    assert targets_BNK.stride(2) == 1 or columns == 1
    code_NK, nibble_NK = torch.empty((2, rows, columns), dtype=torch.uint8)
    errors_BNK = torch.empty(targets_BNK.shape if root_KK is not None else (0,))
    scales = [scale.contiguous() for scale in rule.scales_NG]
    group_of = group_of_K.to(torch.int32)
    _native.round_columns(
        targets_BNK.data_ptr(),
        targets_BNK.stride(0),
        targets_BNK.stride(1),
        [scale.data_ptr() for scale in scales] + [0] * (len(LEVELS) - len(scales)),
        scales[0].shape[1],
        group_of.data_ptr(),
        0 if root_KK is None else root_KK.data_ptr(),
        0 if root_KK is None else root_KK.stride(0),
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
