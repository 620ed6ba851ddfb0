"""Codes whose every prefix is a good code: rounding that looks at all levels at once, with compensation of errors.

Columns are rounded one after another. Each level aims at a copy of the weights of its own, and what errors it made in
earlier columns moves its aims in later ones, as GPTQ does (arXiv 2210.17323) for one level; moves are computed from the
errors and a factor of the Hessian, without its inverse (QuIP's form, arXiv 2307.13304, which is the same rounding). Of
nested codes, a column's is the one of the 16 whose errors, weighted over levels, are least together: where a weight
lies between two cells of a low level almost any side will do for that level, and the high levels decide. Sign planes
take the nearer side, plane by plane. Sweeps of coordinate descent then choose every code again, all others given. The
loops over columns are compiled (csrc/rounding.cpp).

At 8 bits errors are so small that they are not pushed on: that level just aims at its weights.

Shapes: B = 4 levels, L of them whose errors are pushed on, N rows, K columns, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from moestro import _native
from moestro.quant.codes import LEVELS, Codes

BLOCK = 128
"""Columns that are rounded before their errors are pushed into all others at once."""

ROWS = 512
"""Rows that are rounded at once: they bound the memory, and have no part in each other's codes."""


@dataclass(frozen=True)
class Compensation:
    """How errors are pushed into other columns, in the order `order_K` in which columns are rounded.

    `hessian_KK` is the damped Hessian in that order; an error e in column j moves the target of a later column k by
    e * feedback_KK[j, k].
    """

    order_K: torch.Tensor
    hessian_KK: torch.Tensor
    feedback_KK: torch.Tensor

    def groups_of(self, group: int) -> torch.Tensor:
        """The groups that columns are of, in their order, int32."""
        return (self.order_K // group).to(torch.int32)


@dataclass(frozen=True)
class Rule:
    """What a code stands for: `scales_NG` of the planes (one for nested codes), the levels' steps in scales, and for
    8 bits the two integers that join code and nibble. `priorities` weighs the levels' squared errors."""

    scales_NG: Sequence[torch.Tensor]
    steps: Mapping[int, float]
    priorities: Mapping[int, float]
    hi: int
    lo: int

    @cached_property
    def compiled(self) -> _native.CodeRule:
        """As compiled code takes it; scales are where they are as long as this rule is."""
        return _native.CodeRule(
            [scale.data_ptr() for scale in self._scales],
            self._scales[0].shape[1],
            [self.steps.get(level, 0.0) for level in LEVELS],
            [self.priorities.get(level, 0.0) for level in LEVELS],
            self.hi,
            self.lo,
            len(self._scales) > 1,
        )

    @cached_property
    def _scales(self) -> list[torch.Tensor]:
        return [scale_NG.contiguous() for scale_NG in self.scales_NG]

    @property
    def pushed(self) -> int:
        """Of so many levels, the lowest, errors are pushed on."""
        return max((LEVELS.index(level) + 1 for level in self.priorities if level < 8), default=0)

    def values(self, codes: Codes, group_of_K: torch.Tensor) -> torch.Tensor:
        """What nested codes stand for at the levels whose errors are pushed on, [L, N, K]: the bits that compiled code
        has for them."""
        assert len(self.scales_NG) == 1
        scale_NK = self.scales_NG[0][:, group_of_K]
        centred = ((codes.code_NK >> (4 - bits)).float() - (2**bits - 1) / 2 for bits in LEVELS[: self.pushed])
        steps = (self.steps.get(bits, 0.0) for bits in LEVELS[: self.pushed])
        return torch.stack([scale_NK * step * centred_NK for step, centred_NK in zip(steps, centred, strict=True)])

    def rows(self, rows: slice) -> Rule:
        """The rule for some of the rows."""
        return replace(self, scales_NG=[scale_NG[rows] for scale_NG in self.scales_NG])


@dataclass(frozen=True)
class _Pushes:
    """`pushes_KK` of a block, and the values [L, N, K] `before` that changes are counted from."""

    pushes_KK: torch.Tensor
    before_LNK: torch.Tensor


def round_nearest(offset_NK: torch.Tensor, rule: Rule, group: int) -> Codes:
    """Codes of the weights for their own sake. `offset_NK` is their distance from the middles of their groups, fp32."""
    targets_BNK = offset_NK.expand(len(LEVELS), *offset_NK.shape)
    group_of_K = (torch.arange(offset_NK.shape[1]) // group).to(torch.int32)
    return _round_block(targets_BNK, rule, group_of_K)[0]


def round_compensated(
    offsets: Sequence[torch.Tensor], rule: Rule, group: int, compensation: Compensation, *, sweeps: int
) -> Codes:
    """Codes that push the error of each column into those that come after it, then `sweeps` of coordinate descent (for
    nested codes).

    `offsets` are what each of LEVELS aims at, [N, K], as distances from the middles of groups, fp32.
    """
    parts, group_of_K = [], compensation.groups_of(group)
    for start in range(0, len(offsets[0]), ROWS):
        rows = slice(start, start + ROWS)
        aims_BNK = torch.stack([offset_NK[rows, compensation.order_K] for offset_NK in offsets])
        parts.append(round_rows(aims_BNK, rule.rows(rows), group_of_K, compensation, sweeps=sweeps))
    back_K = compensation.order_K.argsort()
    code_NK, nibble_NK = torch.cat([part.code_NK for part in parts]), torch.cat([part.nibble_NK for part in parts])
    return Codes(code_NK[:, back_K], nibble_NK[:, back_K])


def round_rows(
    aims_BNK: torch.Tensor, rule: Rule, group_of_K: torch.Tensor, how: Compensation, *, sweeps: int
) -> Codes:
    """As `round_compensated`, columns in the order of rounding."""
    codes = _pushed_on(aims_BNK, rule, group_of_K, how.feedback_KK)
    if sweeps and rule.pushed:
        values_LNK = rule.values(codes, group_of_K)
        downhill_LNK = (aims_BNK[: rule.pushed] - values_LNK) @ how.hessian_KK
        for _ in range(sweeps):
            descend(codes, aims_BNK, values_LNK, downhill_LNK, rule, how, group_of_K)
    return codes


def _pushed_on(aims_BNK: torch.Tensor, rule: Rule, group_of_K: torch.Tensor, feedback_KK: torch.Tensor) -> Codes:
    """Codes of columns one after another, the errors of each pushed into those that come after it."""
    targets_BNK, pushed = aims_BNK.clone(), rule.pushed
    parts = []
    for start in range(0, aims_BNK.shape[2], BLOCK):
        block, after = slice(start, start + BLOCK), slice(start + BLOCK, None)
        pushes = _Pushes(feedback_KK[block, block], aims_BNK[:pushed, :, block])
        codes, errors_LNK = _round_block(targets_BNK[:, :, block], rule, group_of_K[block], pushes)
        parts.append(codes)
        targets_BNK[:pushed, :, after] -= errors_LNK @ feedback_KK[block, after]
    return Codes(
        torch.cat([part.code_NK for part in parts], dim=1), torch.cat([part.nibble_NK for part in parts], dim=1)
    )


def descend(
    codes: Codes,
    aims_BNK: torch.Tensor,
    values_LNK: torch.Tensor,
    downhill_LNK: torch.Tensor,
    rule: Rule,
    how: Compensation,
    group_of_K: torch.Tensor,
) -> None:
    """Choose the codes of these rows again, column by column, all others given.

    `downhill_LNK` is half of what the cost falls by as a value grows. It, the codes and the values they stand for are
    brought up to date. Work grows with the codes that change.
    """
    pushed, rows, columns = values_LNK.shape
    assert all(one.stride()[1:] == (columns, 1) for one in (aims_BNK, values_LNK, downhill_LNK))
    assert codes.code_NK.is_contiguous()
    assert codes.nibble_NK.is_contiguous()
    _native.descend(
        rule.compiled,
        group_of_K.data_ptr(),
        pushed,
        how.hessian_KK.data_ptr(),
        aims_BNK.data_ptr(),
        aims_BNK.stride(0),
        values_LNK.data_ptr(),
        values_LNK.stride(0),
        downhill_LNK.data_ptr(),
        downhill_LNK.stride(0),
        codes.code_NK.data_ptr(),
        codes.nibble_NK.data_ptr(),
        rows,
        columns,
    )


def _round_block(
    targets_BNK: torch.Tensor, rule: Rule, group_of_K: torch.Tensor, pushes: _Pushes | None = None
) -> tuple[Codes, torch.Tensor]:
    """Codes of one block, and the changes that are left to push into the other columns."""
    _, rows, columns = targets_BNK.shape
    before_LNK = torch.empty(0) if pushes is None else pushes.before_LNK
    pushed = len(before_LNK)
    assert targets_BNK.stride(2) == 1 or columns == 1
    assert not pushed or before_LNK.stride() == targets_BNK.stride()
    code_NK, nibble_NK = torch.empty((2, rows, columns), dtype=torch.uint8)
    changes_LNK = torch.empty((pushed, rows, columns))
    _native.round_columns(
        rule.compiled,
        targets_BNK.data_ptr(),
        targets_BNK.stride(0),
        targets_BNK.stride(1),
        group_of_K.data_ptr(),
        pushed,
        pushes.pushes_KK.data_ptr() if pushes else 0,
        pushes.pushes_KK.stride(0) if pushes else 0,
        before_LNK.data_ptr(),
        changes_LNK.data_ptr(),
        code_NK.data_ptr(),
        nibble_NK.data_ptr(),
        rows,
        columns,
    )
    return Codes(code_NK, nibble_NK), changes_LNK
