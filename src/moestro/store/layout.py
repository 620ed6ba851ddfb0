"""Where the tensors of one expert lie inside its planes.

An expert is a chain of planes, levels ascending; a tensor's bytes inside a plane start on a 64-byte boundary and a
plane is padded with zeros to whole pages of 4096 bytes, so that it can be read directly from disk into memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moestro.quant import LEVELS, make_encoding
from moestro.quant.groups import group_size
from moestro.store.dtypes import STORED_FLOATS, TORCH_DTYPES, tensor_bytes

if TYPE_CHECKING:
    from moestro.hf.skeleton import ExpertParam

ALIGNMENT = 64
PAGE = 4096
PLANE_KINDS = ("base", "bit", "delta", "raw")
ENCODED = ("nested", "signs")
"""Element types of matrices that are quantised, plane by plane."""

RAW_LEVELS = {"BF16": 16, "F16": 16, "F32": 32}
"""The level of a raw plane: the bits of its elements."""


@dataclass(frozen=True)
class TensorLayout:
    """One tensor: `nbytes` bytes from `offset` of the plane. `group_size` is None where nothing is grouped."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    group_size: int | None


@dataclass(frozen=True)
class PlaneLayout:
    """One plane: its kind, the level that an expert reaches with it, its size (whole pages) and its tensors."""

    kind: str
    level: int
    nbytes: int
    tensors: tuple[TensorLayout, ...]


@dataclass(frozen=True)
class Layout:
    """The planes of one expert, in the order in which they are applied."""

    planes: tuple[PlaneLayout, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all planes of one expert."""
        return sum(plane.nbytes for plane in self.planes)


def align(nbytes: int, boundary: int) -> int:
    """The next multiple of `boundary` that is at least `nbytes`."""
    return -(-nbytes // boundary) * boundary


def raw_layout(params: Sequence[ExpertParam], dtype: str) -> Layout:
    """The layout of an expert whose values are kept as they are: one plane of kind `raw` in element type `dtype`."""
    assert dtype in STORED_FLOATS, dtype
    tensors = []
    end = 0
    for param in params:
        nbytes = tensor_bytes(dtype, param.shape)
        tensors.append(TensorLayout(param.name, dtype, param.shape, align(end, ALIGNMENT), nbytes, None))
        end = tensors[-1].offset + nbytes
    return Layout(planes=(PlaneLayout("raw", RAW_LEVELS[dtype], align(end, PAGE), tuple(tensors)),))


def quantised_layout(params: Sequence[ExpertParam], encoding: str, levels: Sequence[int]) -> Layout:
    """The layout of an expert whose matrices are quantised so that all of `levels` can be computed.

    The chain has every plane up to the highest level. Each plane holds a region per matrix, in the order of `params`;
    the base plane also holds the biases, as F32.
    """
    chain = LEVELS[: LEVELS.index(max(levels)) + 1]
    return Layout(planes=tuple(_quantised_plane(params, encoding, level) for level in chain))


def _quantised_plane(params: Sequence[ExpertParam], encoding: str, level: int) -> PlaneLayout:
    is_base = level == LEVELS[0]
    tensors = []
    end = 0
    for param in params:
        if len(param.shape) == 2:
            rows, columns = param.shape
            nbytes = make_encoding(encoding).plane_bytes(rows, columns, level)
            group: int | None = group_size(columns)
            dtype = encoding
        elif is_base:
            nbytes, group, dtype = tensor_bytes("F32", param.shape), None, "F32"
        else:
            continue
        tensors.append(TensorLayout(param.name, dtype, param.shape, align(end, ALIGNMENT), nbytes, group))
        end = tensors[-1].offset + nbytes
    return PlaneLayout("base" if is_base else "bit", level, align(end, PAGE), tuple(tensors))


def layout_problem(layout: Layout) -> str | None:
    """What is wrong with a layout that was read from a file, or None."""
    if not layout.planes:
        return "a layout without planes"
    level = 0
    for plane in layout.planes:
        if plane.kind not in PLANE_KINDS:
            return f"a plane of unknown kind {plane.kind!r}"
        if plane.level <= level:
            return f"planes whose levels do not ascend ({level}, then {plane.level})"
        if plane.nbytes <= 0 or plane.nbytes % PAGE:
            return f"a plane of {plane.nbytes} bytes, which is not a positive multiple of {PAGE}"
        problem = _tensors_problem(plane)
        if problem:
            return problem
        level = plane.level
    return None


def _tensors_problem(plane: PlaneLayout) -> str | None:
    end = 0
    for tensor in plane.tensors:
        if tensor.offset % ALIGNMENT or tensor.offset < end or tensor.offset + tensor.nbytes > plane.nbytes:
            return f"tensor {tensor.name!r} at a place where it cannot be ({tensor.offset}, {tensor.nbytes} bytes)"
        if plane.kind != "delta" and tensor.nbytes != _region_bytes(tensor, plane.level):
            return f"tensor {tensor.name!r} of {tensor.nbytes} bytes, which does not match its shape"
        end = tensor.offset + tensor.nbytes
    return None


def _region_bytes(tensor: TensorLayout, level: int) -> int | None:
    """The size that a tensor must have, None for one that cannot be."""
    if tensor.dtype in TORCH_DTYPES:
        return tensor_bytes(tensor.dtype, tensor.shape) if tensor.group_size is None else None
    if tensor.dtype not in ENCODED or level not in LEVELS or len(tensor.shape) != 2 or 0 in tensor.shape:
        return None
    rows, columns = tensor.shape
    if tensor.group_size != group_size(columns):
        return None
    return make_encoding(tensor.dtype).plane_bytes(rows, columns, level)
