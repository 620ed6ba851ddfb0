"""How a matrix is cut: columns into groups that share a scale, rows into tiles that lie together.

Shapes: N rows (outputs), K columns (inputs), G groups of a row, g columns of a group.
"""

from __future__ import annotations

TILE = 16
"""Rows of a tile: one row per 32-bit lane of the widest vector that the kernels use."""

GROUP_SIZES = (128, 64, 32)


def group_size(columns: int) -> int:
    """The largest group size that divides a row, or the smallest there is (the row is then padded)."""
    return next((size for size in GROUP_SIZES if columns % size == 0), GROUP_SIZES[-1])


def padded_columns(columns: int) -> int:
    """Columns of a row as it is stored: whole groups."""
    return groups(columns) * group_size(columns)


def padded_rows(rows: int) -> int:
    """Rows as they are stored: whole tiles."""
    return -(-rows // TILE) * TILE


def groups(columns: int) -> int:
    """Groups of a row."""
    return -(-columns // group_size(columns))
