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


@dataclass(frozen=True)
class Rule:
    """What a code stands for: `scales_NG` of the planes (one for nested codes), the levels' steps in scales, and for
    8 bits the two integers that join code and nibble. `priorities` weighs the levels' squared errors."""

    scales_NG: Sequence[torch.Tensor]
    steps: Mapping[int, float]
    priorities: Mapping[int, float]
    hi: int
    lo: int

    @property
    def pushed(self) -> int:
        """Of so many levels, the lowest, errors are pushed on."""
        return max((LEVELS.index(level) + 1 for level in self.priorities if level < 8), default=0)

    def values(self, codes: Codes, group_of_K: torch.Tensor) -> torch.Tensor:
        """What nested codes stand for at the levels whose errors are pushed on, [L, N, K]."""
        scale_NK = self.scales_NG[0][:, group_of_K]
        centred = ((codes.code_NK >> (4 - bits)).float() - (2**bits - 1) / 2 for bits in LEVELS[: self.pushed])
        steps = (self.steps.get(bits, 0.0) for bits in LEVELS[: self.pushed])
        return torch.stack([scale_NK * step * centred_NK for step, centred_NK in zip(steps, centred, strict=True)])

    def rows(self, rows: slice) -> Rule:
        """The rule for some of the rows."""
        return replace(self, scales_NG=[scale_NG[rows].contiguous() for scale_NG in self.scales_NG])


@dataclass(frozen=True)
class _Pushes:
    """`pushes_KK` of a block, and the values [L, N, K] `before` that changes are counted from."""

    pushes_KK: torch.Tensor
    before_LNK: torch.Tensor


def round_nearest(offset_NK: torch.Tensor, rule: Rule, group: int) -> Codes:
    """Codes of the weights for their own sake. `offset_NK` is their distance from the middles of their groups, fp32."""
    targets_BNK = offset_NK.expand(len(LEVELS), *offset_NK.shape)
    return _round_block(targets_BNK, rule, torch.arange(offset_NK.shape[1]) // group)[0]


def round_compensated(
    offsets: Sequence[torch.Tensor], rule: Rule, group: int, compensation: Compensation, *, sweeps: int
) -> Codes:
    """Codes that push the error of each column into those that come after it, then `sweeps` of coordinate descent.

    `offsets` are what each of LEVELS aims at, [N, K], as distances from the middles of groups, fp32.
    """
    parts = []
    for start in range(0, len(offsets[0]), ROWS):
        rows = slice(start, start + ROWS)
        aims_BNK = torch.stack([offset_NK[rows, compensation.order_K] for offset_NK in offsets])
        parts.append(RowsRounding(aims_BNK, rule.rows(rows), group, compensation).run(sweeps))
    back_K = compensation.order_K.argsort()
    code_NK, nibble_NK = torch.cat([part.code_NK for part in parts]), torch.cat([part.nibble_NK for part in parts])
    return Codes(code_NK[:, back_K], nibble_NK[:, back_K])


class RowsRounding:
    """Some rows under way, columns in the order of rounding."""

    def __init__(self, aims_BNK: torch.Tensor, rule: Rule, group: int, how: Compensation) -> None:
        self._aims_BNK, self._rule, self._how = aims_BNK, rule, how
        self._group_of_K = how.order_K // group
        columns = aims_BNK.shape[2]
        self._blocks = [slice(start, min(start + BLOCK, columns)) for start in range(0, columns, BLOCK)]

    def run(self, sweeps: int) -> Codes:
        """Codes, after so many sweeps."""
        codes, errors_LNK = self._first()
        if not sweeps or not len(errors_LNK):
            return codes
        gradient_LNK = (errors_LNK @ self._how.hessian_KK).neg_()
        values_LNK = errors_LNK.add_(self._aims_BNK[: len(errors_LNK)])
        for sweep in range(sweeps):
            codes = self._sweep(values_LNK, gradient_LNK, is_last=sweep + 1 == sweeps)
        return codes

    def again(self, values_LNK: torch.Tensor) -> Codes:
        """Codes after one sweep from those that stand for these values, which are brought up to date."""
        gradient_LNK = (self._aims_BNK[: len(values_LNK)] - values_LNK) @ self._how.hessian_KK
        return self._sweep(values_LNK, gradient_LNK, is_last=True)

    def _first(self) -> tuple[Codes, torch.Tensor]:
        """The first codes, and how far their values are from the aims."""
        pushed, feedback_KK = self._rule.pushed, self._how.feedback_KK
        targets_BNK = self._aims_BNK.clone()
        errors_LNK = torch.empty_like(targets_BNK[:pushed])
        parts = []
        for block in self._blocks:
            pushes = _Pushes(feedback_KK[block, block], self._aims_BNK[:pushed, :, block])
            codes, found_LNK = _round_block(targets_BNK[:, :, block], self._rule, self._group_of_K[block], pushes)
            parts.append(codes)
            errors_LNK[:, :, block] = found_LNK
            targets_BNK[:pushed, :, block.stop :] -= found_LNK @ feedback_KK[block, block.stop :]
        return _side_by_side(parts), errors_LNK

    def _sweep(self, values_LNK: torch.Tensor, gradient_LNK: torch.Tensor, *, is_last: bool) -> Codes:
        """Codes chosen again; values and what is left of the gradient are brought up to date."""
        hessian_KK, pushed = self._how.hessian_KK, len(values_LNK)
        parts = []
        for block in self._blocks:
            diagonal_K = hessian_KK.diagonal()[block]
            targets_BNK = self._aims_BNK[:, :, block].clone()
            targets_BNK[:pushed] = values_LNK[:, :, block] + gradient_LNK[:, :, block] / diagonal_K
            pushes = _Pushes((hessian_KK[block, block] / diagonal_K).contiguous(), values_LNK[:, :, block].contiguous())
            codes, changes_LNK = _round_block(targets_BNK, self._rule, self._group_of_K[block], pushes)
            parts.append(codes)
            values_LNK[:, :, block] += changes_LNK
            left = slice(block.stop if is_last else 0, None)
            gradient_LNK[:, :, left] -= changes_LNK @ hessian_KK[block, left]
        return _side_by_side(parts)


def _side_by_side(parts: Sequence[Codes]) -> Codes:
    return Codes(
        torch.cat([part.code_NK for part in parts], dim=1), torch.cat([part.nibble_NK for part in parts], dim=1)
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
    scales = [scale.contiguous() for scale in rule.scales_NG]
    group_of = group_of_K.to(torch.int32)
    _native.round_columns(
        targets_BNK.data_ptr(),
        targets_BNK.stride(0),
        targets_BNK.stride(1),
        [scale.data_ptr() for scale in scales] + [0] * (len(LEVELS) - len(scales)),
        scales[0].shape[1],
        group_of.data_ptr(),
        pushed,
        pushes.pushes_KK.data_ptr() if pushes else 0,
        pushes.pushes_KK.stride(0) if pushes else 0,
        before_LNK.data_ptr(),
        changes_LNK.data_ptr(),
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
    return Codes(code_NK, nibble_NK), changes_LNK
