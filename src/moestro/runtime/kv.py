"""The KV cache: blocks of rows in one preallocated buffer, a block table per sequence.

Shapes: N blocks, B rows a block, H heads, D key width, V value width, T rows of the packed batch, R gathered rows.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch

BLOCK_ROWS = 16
"""Rows of one block. Small, so that a sequence wastes little; a block holds these rows of every layer."""

_ALIGNMENT = 64


@dataclass(frozen=True)
class LayerKV:
    """What one layer's attention caches for a row: `heads` x (`key_width` + `value_width`) fp32 values.

    `gathered` says that the model builds its attention keys from the cached rows (latent attention), so that the whole
    history has to be handed back to it; otherwise attention reads the blocks in place.
    """

    heads: int
    key_width: int
    value_heads: int
    value_width: int
    gathered: bool

    @property
    def key_block_bytes(self) -> int:
        return _aligned(4 * BLOCK_ROWS * self.heads * self.key_width)

    @property
    def value_block_bytes(self) -> int:
        return _aligned(4 * BLOCK_ROWS * self.value_heads * self.value_width)


def block_bytes(layers: Sequence[LayerKV]) -> int:
    """Bytes of one block over all layers."""
    return sum(layer.key_block_bytes + layer.value_block_bytes for layer in layers)


def blocks_for(rows: int) -> int:
    """Blocks that `rows` tokens of one sequence take."""
    return -(-rows // BLOCK_ROWS)


class KVPool:
    """Blocks over one byte buffer of `blocks * block_bytes(layers)` bytes; nothing else is allocated.

    A block is contiguous, all layers' rows of it, and the first free ones are taken: what is in use lies at the
    buffer's beginning, and the rest of it need not have pages. Blocks below `limit` (all of them at first) may be used.
    """

    def __init__(self, *, layers: Sequence[LayerKV], blocks: int, buffer: torch.Tensor) -> None:
        assert buffer.dtype == torch.uint8
        assert buffer.numel() >= blocks * block_bytes(layers)
        self.layers = tuple(layers)
        self.blocks = blocks
        self.block_bytes = block_bytes(layers)
        self.limit = blocks
        self._free = list(range(blocks))  # a heap
        self._used = bytearray(blocks)
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        offset = 0
        for layer in layers:
            for pools, heads, width, nbytes in (
                (self._keys, layer.heads, layer.key_width, layer.key_block_bytes),
                (self._values, layer.value_heads, layer.value_width, layer.value_block_bytes),
            ):
                pools.append(_pool_view(buffer[offset:], blocks, heads, width, self.block_bytes))
                offset += nbytes

    @property
    def free_blocks(self) -> int:
        """Blocks below the limit that nobody has."""
        return len(self._free) - (self.blocks - self.limit)

    @property
    def used_until(self) -> int:
        """The number after that of the last block in use, 0 where none is."""
        return self._used.rfind(1) + 1

    def resize(self, limit: int) -> None:
        """Use blocks below `limit` only, from now on."""
        assert self.used_until <= limit <= self.blocks
        self.limit = limit

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks; the scheduler has made sure that they exist."""
        assert count <= self.free_blocks, "KV blocks were promised that do not exist"
        blocks = [heapq.heappop(self._free) for _ in range(count)]
        for block in blocks:
            self._used[block] = 1
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Give blocks back."""
        for block in blocks:
            assert self._used[block], "a KV block was released twice"
            self._used[block] = 0
            heapq.heappush(self._free, block)

    def pools(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's key blocks [N, H, B, D] and value blocks [N, H, B, V]."""
        return self._keys[layer], self._values[layer]

    def write(self, layer: int, keys_HTD: torch.Tensor, values_HTV: torch.Tensor, rows: RowAddress) -> None:
        """Store the new rows of a packed batch."""
        self._keys[layer][rows.block_T, :, rows.row_T] = keys_HTD.transpose(0, 1)
        self._values[layer][rows.block_T, :, rows.row_T] = values_HTV.transpose(0, 1)

    def gather(self, layer: int, rows: RowAddress) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of the addressed rows: keys [1, H, R, D] and values [1, H, R, V]."""
        keys_RHD = self._keys[layer][rows.block_T, :, rows.row_T]
        values_RHV = self._values[layer][rows.block_T, :, rows.row_T]
        return keys_RHD.transpose(0, 1).unsqueeze(0), values_RHV.transpose(0, 1).unsqueeze(0)


@dataclass(frozen=True)
class RowAddress:
    """Where rows lie in the pool: block number and row in the block, int64 [T] each."""

    block_T: torch.Tensor
    row_T: torch.Tensor


def _pool_view(storage: torch.Tensor, blocks: int, heads: int, width: int, stride_bytes: int) -> torch.Tensor:
    floats = storage.view(torch.float32)
    return floats.as_strided(
        (blocks, heads, BLOCK_ROWS, width), (stride_bytes // 4, BLOCK_ROWS * width, width, 1), floats.storage_offset()
    )


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
