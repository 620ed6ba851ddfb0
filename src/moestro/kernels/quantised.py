"""Linear maps from quantised weights in plain torch: the numbers of the compiled kernels, to the bit.

A group of activations has int8 codes a and a scale sx. A matrix is a sum of terms, each with integers p (twice the
distance of a code from the middle of its grid) and an fp16 scale s per group; the first brings the group's middle m:

    acc = fma(s, float(sum(p * a)) * (sx * factor), acc)         term by term
    acc = fma(m, sx * float(sum(a)), acc)                        after the first
    out = acc * unit                                             after the last group

Shapes: T rows (tokens), K inputs, N outputs, G groups of a row, g inputs of a group; K and N padded.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from moestro.kernels.specs import FLAT_BITS, MatrixSpec
from moestro.quant import LEVELS, make_encoding
from moestro.quant.codes import Codes
from moestro.quant.flat import FORMS as FLAT_FORMS
from moestro.quant.flat import flat_bytes
from moestro.quant.groups import group_size, padded_columns, padded_rows
from moestro.quant.nested import FORMS
from moestro.quant.signs import unpack_sign_plane
from moestro.quant.tiles import HEADER, unpack_codes, unpack_scaled

_LEAST_MAGNITUDE = 1e-30
_MOST_CODE = 127.0


@dataclass(frozen=True)
class QuantisedRows:
    """Codes [T, G, g] (whole numbers in fp64) and the fp32 scale of each group [T, G]."""

    code_TGg: torch.Tensor
    scale_TG: torch.Tensor


@dataclass(frozen=True)
class Term:
    """`position_NGg` holds whole numbers in fp64, `scale_NG` fp32."""

    position_NGg: torch.Tensor
    scale_NG: torch.Tensor
    factor: float


@dataclass(frozen=True)
class Matrix:
    """The parts of a quantised matrix at one level."""

    terms: tuple[Term, ...]
    middle_NG: torch.Tensor
    unit: float


def quantise_rows(x_TK: torch.Tensor, group: int) -> QuantisedRows:
    """Activations in groups of `group`; one with NaN or infinity gets codes 0 and scale NaN."""
    rows, columns = x_TK.shape
    x_TGg = functional.pad(x_TK, (0, -columns % group)).view(rows, -(-columns // group), group)
    magnitude_TG = x_TGg.abs().amax(-1)
    finite_TG = x_TGg.isfinite().all(-1)
    used_TG = finite_TG & (magnitude_TG >= _LEAST_MAGNITUDE)
    # A number over a tensor would be the number times the tensor's reciprocal, which is rounded twice.
    inverse_TG = torch.tensor(_MOST_CODE) / torch.where(used_TG, magnitude_TG, 1.0)
    code_TGg = (torch.where(used_TG[..., None], x_TGg, 0.0) * inverse_TG[..., None]).round()
    scale_TG = torch.where(used_TG, magnitude_TG / _MOST_CODE, 0.0).masked_fill(~finite_TG, float("nan"))
    return QuantisedRows(code_TGg.double(), scale_TG)


def fused_multiply_add(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """a * b + c of fp32 tensors, rounded once.

    The product is exact in fp64. The sum is rounded to odd there (an inexact one takes the neighbour with an odd last
    bit), after which rounding to fp32 is the same as rounding the exact sum (Boldo and Melquiond, 2008).
    """
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)
    even = total.view(torch.int64) & 1 == 0
    towards = torch.where(error > 0, torch.inf, -torch.inf).to(total.dtype)
    return torch.where(even & (error != 0) & total.isfinite(), torch.nextafter(total, towards), total).float()


def matrix_at(matrix: MatrixSpec, planes: Sequence[int], level: int) -> Matrix:
    """The parts of a matrix that lies in planes at these addresses."""
    regions = _regions(matrix, planes, level)
    constants = regions[0][:HEADER].clone().view(torch.float32).tolist()
    wide, tall = padded_columns(matrix.columns), padded_rows(matrix.rows)
    form = FLAT_FORMS[FLAT_BITS[matrix.encoding]] if matrix.flat else FORMS[2]
    scales_NG, code_NK = unpack_scaled(regions[0][HEADER:], 2, tall, wide, matrix.group, form)
    scale_NG, middle_NG = scales_NG
    if matrix.encoding == "nested":
        terms = [_nested_term(matrix, regions, code_NK, scale_NG, constants, level)]
    elif matrix.encoding == "signs":
        terms = [_term(matrix, 2 * code_NK.double() - 3, scale_NG, constants[1])]
        terms += [_sign_term(matrix, region, above) for region, above in zip(regions[1:], LEVELS[1:], strict=False)]
    elif matrix.encoding == "flat8":
        terms = [_term(matrix, 2 * code_NK.view(torch.int8).double() + 1, scale_NG, constants[1])]
    else:
        most = 2 ** FLAT_BITS[matrix.encoding] - 1
        terms = [_term(matrix, 2 * code_NK.double() - most, scale_NG, constants[1])]
    return Matrix(tuple(terms), middle_NG.float(), constants[0])


def linear(x: QuantisedRows, matrix: Matrix, rows: int) -> torch.Tensor:
    """Products [T, rows] of quantised rows with the first `rows` rows of a matrix."""
    out_TN = x.scale_TG.new_zeros((len(x.scale_TG), len(matrix.middle_NG)))
    for group in range(x.scale_TG.shape[1]):
        code_Tg, scale_T = x.code_TGg[:, group], x.scale_TG[:, group]
        for place, term in enumerate(matrix.terms):
            sum_TN = (code_Tg @ term.position_NGg[:, group].T).float()
            step_TN = sum_TN * (scale_T * torch.tensor(term.factor, dtype=torch.float32))[:, None]
            out_TN = fused_multiply_add(term.scale_NG[:, group], step_TN, out_TN)
            if place == 0:
                offset_T = scale_T * code_Tg.sum(-1).float()
                out_TN = fused_multiply_add(matrix.middle_NG[:, group], offset_T[:, None], out_TN)
    return (out_TN * matrix.unit)[:, :rows]


def values(matrix: Matrix) -> torch.Tensor:
    """What the codes stand for, fp32 [N, K] (padded)."""
    value_NGg = matrix.middle_NG[..., None]
    for term in matrix.terms:
        value_NGg = value_NGg + term.scale_NG[..., None] * (term.position_NGg.float() * term.factor)
    return (value_NGg * matrix.unit).flatten(1)


def _regions(matrix: MatrixSpec, planes: Sequence[int], level: int) -> list[torch.Tensor]:
    """Views of the matrix's bytes in each plane that the level needs."""
    assert matrix.group == group_size(matrix.columns), matrix
    if matrix.flat:
        if level != FLAT_BITS[matrix.encoding]:
            raise ValueError(f"{matrix.encoding} has no level {level}")
        sizes = [flat_bytes(matrix.rows, matrix.columns, level)]
    else:
        if level not in LEVELS:
            raise ValueError(f"{matrix.encoding} has no level {level}")
        needed = LEVELS[: LEVELS.index(level) + 1]
        sizes = [make_encoding(matrix.encoding).plane_bytes(matrix.rows, matrix.columns, each) for each in needed]
    if len(planes) < len(sizes) or len(matrix.offsets) < len(sizes) or not all(planes[: len(sizes)]):
        raise ValueError(f"level {level} needs {len(sizes)} planes of {matrix}, given {planes}")
    places = zip(planes, matrix.offsets, sizes, strict=False)
    return [bytes_at(address + offset, size) for address, offset, size in places]


def bytes_at(address: int, size: int) -> torch.Tensor:
    """The bytes at an address, uint8 [size], as a view."""
    return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)


def _term(matrix: MatrixSpec, position_NK: torch.Tensor, scale_NG: torch.Tensor, factor: float) -> Term:
    return Term(position_NK.view(len(scale_NG), -1, matrix.group), scale_NG.float(), factor)


def _nested_term(
    matrix: MatrixSpec,
    regions: list[torch.Tensor],
    base_NK: torch.Tensor,
    scale_NG: torch.Tensor,
    constants: list[float],
    level: int,
) -> Term:
    tiles, groups = padded_rows(matrix.rows) // 16, padded_columns(matrix.columns) // matrix.group
    planes_NK = [base_NK]
    for region, above in zip(regions[1:], LEVELS[1:], strict=False):
        planes_NK.append(unpack_codes(region.view(tiles, groups, -1), matrix.group, FORMS[above]))
    codes = Codes.join(planes_NK)
    factor = constants[1 + LEVELS.index(level)]
    if level < 8:
        code_NK = (codes.code_NK >> (4 - level)).double()
        return _term(matrix, 2 * code_NK - (2**level - 1), scale_NG, factor)
    high, low = constants[5], constants[6]
    position_NK = 2 * (high * codes.code_NK.double() + low * codes.nibble_NK.double()) - 15 * (high + low)
    return _term(matrix, position_NK, scale_NG, factor)


def _sign_term(matrix: MatrixSpec, region: torch.Tensor, level: int) -> Term:
    tall, wide = padded_rows(matrix.rows), padded_columns(matrix.columns)
    scale_NG, code_NK = unpack_sign_plane(region, tall, wide, matrix.group, level)
    if level == 8:
        return _term(matrix, 2 * code_NK.double() - 15, scale_NG, 0.5)
    return _term(matrix, 2 * code_NK.double() - 1, scale_NG, 1.0)
