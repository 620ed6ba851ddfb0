"""The KV pool: what is written is what is read, blocks are neither lost nor handed out twice."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moestro.runtime.batch import PackedBatch, Segment
from moestro.runtime.kv import BLOCK_ROWS, KVPool, LayerKV, block_bytes, blocks_for

LAYERS = (
    LayerKV(heads=2, key_width=6, value_heads=1, value_width=5, gathered=False),
    LayerKV(heads=1, key_width=3, value_heads=1, value_width=7, gathered=True),
)


def _pool(blocks: int) -> KVPool:
    buffer = torch.zeros(blocks * block_bytes(LAYERS), dtype=torch.uint8)
    return KVPool(layers=LAYERS, blocks=blocks, buffer=buffer)


def test_written_rows_are_gathered_in_order_of_sequence_and_position() -> None:
    pool = _pool(8)
    blocks = {0: pool.allocate(2), 1: pool.allocate(3)}
    written: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    for start_0, start_1, count_0, count_1 in ((0, 0, 5, 30), (5, 30, 20, 1), (25, 31, 1, 9)):
        batch = PackedBatch(
            [
                Segment(0, [1] * count_0, start_0, blocks[0], True),
                Segment(1, [1] * count_1, start_1, blocks[1], True),
            ]
        )
        keys, values = torch.randn(1, batch.rows, 3), torch.randn(1, batch.rows, 7)
        pool.write(1, keys, values, batch.new_rows)
        both = torch.cat([keys[0], values[0]], dim=-1)
        written[0].append(both[:count_0])
        written[1].append(both[count_0:])
        gathered_keys, gathered_values = pool.gather(1, batch.history)
        actual = torch.cat([gathered_keys[0, 0], gathered_values[0, 0]], dim=-1)
        assert torch.equal(actual, torch.cat([*written[0], *written[1]]))


def test_layers_do_not_overlap() -> None:
    pool = _pool(3)
    for layer in range(len(LAYERS)):
        for tensor in pool.pools(layer):
            assert not tensor.any()
            tensor.fill_(layer + 1.0)
    for layer in range(len(LAYERS)):
        assert all((tensor == layer + 1.0).all() for tensor in pool.pools(layer))


@given(st.lists(st.integers(min_value=0, max_value=5), max_size=30))
def test_blocks_are_handed_out_once(sizes: list[int]) -> None:
    pool = _pool(12)
    held: list[list[int]] = []
    for size in sizes:
        if size <= pool.free_blocks:
            held.append(pool.allocate(size))
        elif held:
            pool.release(held.pop(0))
        taken = [block for blocks in held for block in blocks]
        assert len(set(taken)) == len(taken) == 12 - pool.free_blocks


def test_releasing_twice_is_a_bug() -> None:
    pool = _pool(2)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="twice"):
        pool.release(blocks)


@given(st.integers(min_value=1, max_value=10_000))
def test_blocks_hold_the_rows(rows: int) -> None:
    assert (blocks_for(rows) - 1) * BLOCK_ROWS < rows <= blocks_for(rows) * BLOCK_ROWS
